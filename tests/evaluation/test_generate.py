import pytest
import torch

from hf_csm.evaluation.generate import generate
from hf_csm.models.moshi.checkpoint import find_checkpoint, load_mimi
from hf_csm.models.moshi.lora import adapter_parameters, add_lora, merged
from hf_csm.models.moshi.model import MoshiLM, load_moshi
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


NUM_FRAMES = 12


@pytest.fixture(scope="module")
def lm(tiny_moshi):
    return load_moshi(find_checkpoint(str(tiny_moshi)), dtype=torch.float32).lm


@pytest.fixture(scope="module")
def mimi(tiny_moshi):
    return load_mimi(find_checkpoint(str(tiny_moshi)))


def tone(pitch_hz=200, num_frames=NUM_FRAMES):
    time_s = torch.arange(num_frames * SAMPLES_PER_FRAME) / SAMPLE_RATE
    return 0.3 * torch.sin(2 * torch.pi * pitch_hz * time_s)


def talk(lm, mimi, user_audio=None, **kwargs):
    return generate(lm, mimi, user_audio=user_audio, num_frames=NUM_FRAMES, **kwargs)


def test_shapes_are_those_asked_for(lm, mimi):
    said = talk(lm, mimi)
    assert said.audio.shape == (NUM_FRAMES * SAMPLES_PER_FRAME,)
    assert said.audio.dtype == torch.float32
    assert said.text_tokens.shape == (NUM_FRAMES,)
    assert said.codes.shape == (8, NUM_FRAMES)
    assert ((said.codes >= 0) & (said.codes < lm.card)).all()


def test_the_seed_decides_and_the_callers_random_state_stays(lm, mimi):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = talk(lm, mimi, seed=1), talk(lm, mimi, seed=1), talk(lm, mimi, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.audio, same.audio)
    assert torch.equal(first.text_tokens, same.text_tokens)
    assert not torch.equal(first.codes, other.codes)


def test_the_prefix_stands_in_the_first_frames_of_the_text(lm, mimi):
    prefix = [300, 301, 302]
    said = talk(lm, mimi, prefix_tokens=prefix)
    assert said.text_tokens[:3].tolist() == prefix
    assert not torch.equal(said.codes, talk(lm, mimi).codes)


def test_greedy_tokens_are_the_likeliest_of_the_teacher_forced_model(lm, mimi):
    """Streaming and training agree on which frame is which: prefix, delays and the user's audio included."""
    audio = tone()
    said = talk(lm, mimi, audio, prefix_tokens=[300, 301], use_sampling=False)
    user = mimi.encode(audio[None, None])[0, :8]
    codes = torch.cat([said.text_tokens[None], said.codes, user])[None]
    codes = torch.nn.functional.pad(codes, (0, 1), value=-1)
    with torch.no_grad():
        output = lm(codes)
    assert output.text_logits[0, 0, 2:NUM_FRAMES].argmax(-1).tolist() == said.text_tokens[2:].tolist()
    # The delayed codebooks of the last frame depend on a text token that is no longer there.
    last = NUM_FRAMES - 1
    assert torch.equal(output.logits[0, :, :last].argmax(-1), said.codes[:, :last])
    assert output.logits[0, 0, last].argmax(-1) == said.codes[0, last]


def test_generated_codes_are_likelier_than_others(lm, mimi):
    said = talk(lm, mimi, temperature=0.3, text_temperature=0.3)
    user = torch.full((8, NUM_FRAMES), -1)
    codes = torch.nn.functional.pad(torch.cat([said.text_tokens[None], said.codes, user])[None], (0, 1), value=-1)
    shuffled = codes.clone()
    shuffled[:, 1:9, :NUM_FRAMES] = codes[:, 1:9, :NUM_FRAMES].roll(3, dims=-1)
    with torch.no_grad():
        scores = [MoshiLM(lm)(c).nll.mean() for c in (codes, shuffled)]
    assert scores[0] < scores[1]


def test_the_user_is_heard_from_the_first_frame(lm, mimi):
    silent, talking = (talk(lm, mimi, audio, use_sampling=False) for audio in (None, tone()))
    assert not torch.equal(silent.codes[:, 1:], talking.codes[:, 1:])
    assert torch.equal(silent.codes[0, :1], talking.codes[0, :1])


@pytest.mark.parametrize("num_samples", [100, 5 * SAMPLES_PER_FRAME + 7, 40 * SAMPLES_PER_FRAME])
def test_the_users_audio_may_have_any_length(lm, mimi, num_samples):
    assert talk(lm, mimi, tone(num_frames=40)[:num_samples]).audio.shape == (NUM_FRAMES * SAMPLES_PER_FRAME,)


def test_a_merged_adapter_talks_and_models_are_left_as_they_were(tiny_moshi, mimi):
    model = load_moshi(find_checkpoint(str(tiny_moshi)), dtype=torch.float32)
    add_lora(model, rank=2, alpha=4, target_modules="all-linear")
    base = talk(merged(model), mimi, use_sampling=False)
    for number, weight in enumerate(adapter_parameters(model)):
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(number))
    plain = merged(model).train()
    adapted = talk(plain, mimi, use_sampling=False)
    assert not torch.equal(adapted.codes, base.codes)
    assert plain.training
    assert not plain.is_streaming
    assert mimi.num_codebooks == mimi.total_codebooks
    assert not mimi.is_streaming
