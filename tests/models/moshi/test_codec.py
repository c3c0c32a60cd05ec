import numpy as np
import pytest
import torch

from hf_csm.models.moshi.checkpoint import find_checkpoint, load_mimi
from hf_csm.models.moshi.codec import encode_waveforms
from hf_csm.units import SAMPLES_PER_FRAME


@pytest.fixture(scope="module")
def mimi(tiny_moshi):
    return load_mimi(find_checkpoint(str(tiny_moshi)))


def noise(num_frames, seed):
    rng = np.random.default_rng(seed)
    envelope = np.repeat(rng.uniform(0.001, 0.3, size=(2, num_frames)), SAMPLES_PER_FRAME, axis=1)
    return (envelope * rng.standard_normal((2, num_frames * SAMPLES_PER_FRAME))).astype(np.float32)


def test_codes_have_every_codebook_of_the_codec(mimi):
    (codes,) = encode_waveforms(mimi, [noise(5, 0)])
    assert codes.shape == (2, mimi.total_codebooks, 5)
    assert codes.dtype == np.int16


def test_codes_do_not_depend_on_the_rest_of_the_batch(mimi):
    short, long = noise(7, 1), noise(30, 2)
    together = encode_waveforms(mimi, [short, long])
    np.testing.assert_array_equal(together[0], encode_waveforms(mimi, [short])[0])
    np.testing.assert_array_equal(together[1], encode_waveforms(mimi, [long])[0])


@pytest.fixture(scope="module")
def exact_mimi(tiny_moshi):
    """In float64, where the rounding of one processor or another flips no code."""
    return load_mimi(find_checkpoint(str(tiny_moshi))).double()


@pytest.mark.parametrize("num_frames", [1, 40, 800])
def test_codes_equal_the_streaming_encoders_frame_by_frame(exact_mimi, num_frames):
    """Training must have seen the codes a server gets from its 80 ms steps, past Mimi's 10 s of context too."""
    waveform = noise(num_frames, 3)
    (codes,) = encode_waveforms(exact_mimi, [waveform])
    frames = torch.from_numpy(waveform).double().reshape(2, 1, num_frames, SAMPLES_PER_FRAME)
    with torch.no_grad(), exact_mimi.streaming(2):
        streamed = torch.cat([exact_mimi.encode(frames[:, :, t]) for t in range(num_frames)], dim=2)
    np.testing.assert_array_equal(codes, streamed.numpy())


def test_past_its_context_the_codec_does_differ_between_steps_and_the_whole_window(exact_mimi):
    """Without this the test above could not fail."""
    waveform = noise(800, 3)
    with torch.no_grad():
        at_once = exact_mimi.encode(torch.from_numpy(waveform).double()[:, None]).numpy()
    (codes,) = encode_waveforms(exact_mimi, [waveform])
    assert (at_once != codes).any()
    np.testing.assert_array_equal(at_once[:, :, :100], codes[:, :, :100])
