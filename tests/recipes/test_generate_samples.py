import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from hf_csm.errors import UserError
from hf_csm.models.emotion_control import EmotionControl, write_emotion_control
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import export_adapter
from hf_csm.models.moshi.lora import save_adapter
from hf_csm.publish.export import export_checkpoint
from tests.doubles.random_adapter import random_adapter


sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from generate_samples import generate_samples, main  # noqa: E402


@pytest.fixture(scope="module")
def trained(tiny_moshi):
    model = random_adapter(find_checkpoint(str(tiny_moshi)), rank=2, alpha=4)
    return model


@pytest.fixture
def adapter(trained, tiny_moshi, tmp_path):
    folder = export_adapter(trained, find_checkpoint(str(tiny_moshi)), tmp_path / "adapter")
    write_emotion_control(EmotionControl("prefix", "({emotion})", ("happy", "sad")), folder)
    return folder


def test_adapter_and_base_generate_a_clip_for_every_emotion(adapter, tmp_path, capsys):
    main([str(adapter), "--out", str(tmp_path / "samples"), "--seconds", "0.4"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [(model, emotion) for model in ("trained", "base") for emotion in ("happy", "sad")]
    assert [(line["model"], line["emotion"]) for line in lines] == expected
    clips = [soundfile.read(tmp_path / "samples" / f"{model}_{emotion}.wav")[0] for model, emotion in expected]
    assert all(len(clip) == 0.4 * 24000 for clip in clips)
    assert len({clip.tobytes() for clip in clips}) == 4  # prefix and adapter both change the audio


def test_an_emotion_without_training_is_refused(adapter, tmp_path):
    with pytest.raises(UserError, match="calm") as error:
        generate_samples(adapter, tmp_path / "samples", emotions=["calm"], duration_s=0.4)
    assert "happy, sad" in error.value.remedy
    (adapter / "emotions.json").unlink()
    with pytest.raises(UserError, match="sad"):
        generate_samples(adapter, tmp_path / "samples", emotions=["sad"], duration_s=0.4)
    with pytest.raises(UserError, match="no revision 'v1'"):
        generate_samples(adapter, tmp_path / "samples", revision="v1", duration_s=0.4)
    assert not (tmp_path / "samples").exists()


def test_merged_weights_give_one_clip(trained, tmp_path):
    save_adapter(trained, tmp_path / "checkpoint_000001" / "adapter")
    merged = export_checkpoint(tmp_path / "checkpoint_000001", tmp_path / "merged", merged=True)
    (sample,) = generate_samples(merged, tmp_path / "samples", duration_s=0.4)
    assert (sample.model, sample.emotion) == ("trained", "none")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["trained_none.wav"]


def test_the_seed_decides_and_the_callers_random_state_is_restored(adapter, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    clips = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        generate_samples(adapter, out, emotions=["happy"], duration_s=0.4, seed=seed)
        clips.append((out / "trained_happy.wav").read_bytes())
    assert torch.equal(torch.get_rng_state(), before)
    assert clips[0] == clips[1] != clips[2]
