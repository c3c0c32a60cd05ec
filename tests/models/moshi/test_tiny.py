import json

import pytest
import torch
from moshi.models import loaders

from hf_csm.data.labels import EMOTIONS
from hf_csm.models.moshi.checkpoint import find_checkpoint, load_mimi, load_tokenizer
from hf_csm.models.moshi.tiny import write_tiny_moshi
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


def buzz(pitch_hz, duration_s, loudness=0.2, tilt=1.0):
    time_s = torch.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
    return loudness * sum(torch.sin(2 * torch.pi * k * pitch_hz * time_s) / k**tilt for k in range(1, 6))


def chirps(num_clips=4, num_frames=120):
    generator = torch.Generator().manual_seed(3)
    num_samples = num_frames * SAMPLES_PER_FRAME
    time_s = torch.arange(num_samples) / SAMPLE_RATE
    clips = []
    for clip in range(num_clips):
        envelope = torch.sin(2 * torch.pi * (1 + clip) * time_s).clamp(min=0)
        pitch_hz = 100 + 60 * clip + 50 * torch.sin(2 * torch.pi * 0.5 * time_s)
        phase = 2 * torch.pi * torch.cumsum(pitch_hz, 0) / SAMPLE_RATE
        clips.append(0.3 * envelope * (torch.sin(phase) + torch.sin(3 * phase) / 2))
    return torch.stack(clips)[:, None] + 1e-3 * torch.randn(num_clips, 1, num_samples, generator=generator)


@pytest.fixture(scope="module")
def mimi(tiny_moshi):
    return load_mimi(find_checkpoint(str(tiny_moshi)))


def test_moshis_own_loader_reads_the_folder(tiny_moshi):
    found = loaders.CheckpointInfo.from_hf_repo(
        "nobody/nothing",
        moshi_weights=tiny_moshi / "model.safetensors",
        mimi_weights=tiny_moshi / "mimi.safetensors",
        tokenizer=tiny_moshi / "tokenizer.model",
        config_path=tiny_moshi / "config.json",
        mimi_config_path=tiny_moshi / "mimi.json",
    )
    lm = found.get_moshi()
    assert (lm.n_q, lm.dep_q, lm.delays) == (16, 8, [0, 0, *[1] * 7, 0, *[1] * 7])
    assert lm.dtype == torch.bfloat16
    assert found.get_mimi().frame_size == SAMPLES_PER_FRAME
    assert found.get_text_tokenizer().vocab_size() == lm.text_card
    assert found.get_mimi().cardinality == lm.card


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_moshi, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{")  # an older folder is replaced
    torch.manual_seed(7)
    before = torch.get_rng_state()
    write_tiny_moshi(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    for path in sorted(tiny_moshi.iterdir()):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    write_tiny_moshi(folder, seed=1, num_layers=1)
    assert json.loads((folder / "config.json").read_text())["num_layers"] == 1
    for name in ("model.safetensors", "mimi.safetensors"):
        assert (tiny_moshi / name).read_bytes() != (folder / name).read_bytes()


def test_the_words_of_the_corpora_and_emotions_are_short_in_tokens(tiny_moshi):
    tokenizer = load_tokenizer(find_checkpoint(str(tiny_moshi)))
    assert [tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()] == [0, 1, 2, 3]
    for word in [*EMOTIONS, *["kids", "are", "talking", "by", "the", "door", "dogs", "sitting"]]:
        tokens = tokenizer.encode(word)
        assert len(tokens) <= 3, word
        assert tokenizer.decode(tokens) == word


def test_no_text_is_unknown_since_that_token_is_moshis_end_of_padding(tiny_moshi):
    tokenizer = load_tokenizer(find_checkpoint(str(tiny_moshi)))
    assert 0 not in tokenizer.encode("Überraschung 42 驚き !?")


def test_varied_audio_has_varied_codes_in_every_codebook(mimi):
    codes = mimi.encode(chirps())
    assert codes.shape[1] == mimi.total_codebooks == 16
    assert min(len(codes[:, k].unique()) for k in range(16)) >= 40
    assert min(len(clip[0].unique()) for clip in codes) >= 10


def test_different_pitch_has_different_codes(mimi):
    low, high = (mimi.encode(buzz(pitch_hz, 2.0)[None, None])[0, 0] for pitch_hz in (110, 320))
    assert not set(low[5:].tolist()) & set(high[5:].tolist())


def test_encoding_frame_by_frame_gives_the_codes_of_the_whole_window(mimi):
    audio = chirps()
    with torch.no_grad(), mimi.streaming(len(audio)):
        frames = [mimi.encode(frame) for frame in audio.split(SAMPLES_PER_FRAME, dim=-1)]
    assert torch.equal(torch.cat(frames, dim=-1), mimi.encode(audio))


def test_decoded_audio_is_about_as_loud_as_speech(mimi):
    with torch.no_grad():
        audio = mimi.decode(mimi.encode(chirps())[:, :8])
    assert 0.01 < audio.std() < 0.3
