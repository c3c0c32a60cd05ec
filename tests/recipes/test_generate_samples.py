import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from hf_csm.errors import UserError
from hf_csm.models.emotion_control import EmotionControl, write_emotion_control
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import export_native
from hf_csm.models.moshi.lora import adapter_parameters, add_lora, save_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.publish.export import export_checkpoint


sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from generate_samples import generate_samples, main  # noqa: E402


@pytest.fixture(scope="module")
def trained(tiny_moshi):
    model = add_lora(
        load_moshi(find_checkpoint(str(tiny_moshi)), dtype=torch.float32), rank=2, alpha=4, target_modules="all-linear"
    )
    for number, weight in enumerate(adapter_parameters(model)):
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


@pytest.fixture
def adapter(trained, tiny_moshi, tmp_path):
    folder = export_native(trained, find_checkpoint(str(tiny_moshi)), tmp_path / "adapter")
    write_emotion_control(EmotionControl("prefix", "({emotion})", ("happy", "sad")), folder)
    return folder


def test_every_emotion_that_the_adapter_knows_is_spoken_by_both_voices(adapter, tmp_path, capsys):
    main([str(adapter), "--out", str(tmp_path / "samples"), "--seconds", "0.4"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [(voice, emotion) for voice in ("trained", "base") for emotion in ("happy", "sad")]
    assert [(line["voice"], line["emotion"]) for line in lines] == expected
    clips = [soundfile.read(tmp_path / "samples" / f"{voice}_{emotion}.wav")[0] for voice, emotion in expected]
    assert all(len(clip) == 0.4 * 24000 for clip in clips)
    assert len({clip.tobytes() for clip in clips}) == 4  # the prefix is heard, and so is the adapter


def test_an_emotion_that_the_adapter_does_not_know_is_refused(adapter, tmp_path):
    with pytest.raises(UserError, match="does not know calm") as error:
        generate_samples(adapter, tmp_path / "samples", emotions=["calm"], duration_s=0.4)
    assert error.value.remedy == "Choose from happy, sad."
    (adapter / "emotions.json").unlink()
    with pytest.raises(UserError, match="does not know sad"):
        generate_samples(adapter, tmp_path / "samples", emotions=["sad"], duration_s=0.4)
    with pytest.raises(UserError, match="no revision 'v1'"):
        generate_samples(adapter, tmp_path / "samples", revision="v1", duration_s=0.4)
    assert not (tmp_path / "samples").exists()


def test_merged_weights_have_one_voice(trained, tmp_path):
    save_adapter(trained, tmp_path / "checkpoint_000001" / "adapter")
    merged = export_checkpoint(tmp_path / "checkpoint_000001", tmp_path / "merged", merged=True)
    (sample,) = generate_samples(merged, tmp_path / "samples", duration_s=0.4)
    assert (sample.voice, sample.emotion) == ("trained", "none")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["trained_none.wav"]
