"""A second model family goes through every stage without a line of its own outside its record."""

import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file

from hf_csm.config_parser import parse_run_config
from hf_csm.encode.compose import Composition
from hf_csm.encode.run import encode
from hf_csm.models import get_family
from hf_csm.models.emotion_control import EmotionControl, write_emotion_control
from hf_csm.training.loop import train
from hf_csm.training.metrics_log import read_metrics
from tests.doubles.toy_family import TOY


sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import generate_samples  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return TOY.write_tiny_checkpoint(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="module")
def codes(base, prepared, tmp_path_factory):
    checkpoint = TOY.find_checkpoint(str(base))
    out = tmp_path_factory.mktemp("codes") / "ravdess"
    composition = Composition(duration_s=12.0)
    encode(
        prepared,
        out,
        TOY.load_codec(checkpoint),
        TOY.codec_sha256(checkpoint),
        composition=composition,
        progress=False,
    )
    return out


def run(base, codes, run_dir, **more):
    options = {
        "run_dir": run_dir,
        "moshi_paths.hf_repo_id": base,
        "moshi_paths.dtype": "float32",
        "dataset.manifest_path": codes,
        "dataset.duration_sec": 12,
        "dataset.batch_size": 2,
        "lora.rank": 4,
        "lora.alpha": 8,
        "lora.dropout": 0.1,
        "optimizer.lr": 0.03,
        "scheduler.num_warmup_steps": 2,
        "training.max_steps": 8,
        "training.save_every": 4,
        "training.eval_every": 4,
        "training.eval_windows": 4,
        "training.keep_checkpoints": 0,
        "training.trackers": "[]",
        **more,
    }
    return train(
        parse_run_config([part for name, value in options.items() for part in (f"--{name}", str(value))]), TOY
    )


@pytest.fixture(scope="module")
def trained(base, codes, tmp_path_factory):
    return run(base, codes, tmp_path_factory.mktemp("run") / "straight")


def test_the_loss_of_every_stream_falls(trained):
    lines = [line for line in read_metrics(trained.parent / "metrics.jsonl") if "eval_loss" in line]
    assert lines[0]["eval_loss"] == lines[0]["eval_base_loss"]
    assert lines[-1]["eval_base_loss"] == lines[0]["eval_base_loss"]
    for name in ("eval_loss", "eval_text", "eval_audio"):
        assert lines[-1][name] < lines[0][name]


def test_a_run_resumes_bit_for_bit(base, codes, trained, tmp_path):
    half = trained.parent / "checkpoint_000004"
    resumed = run(base, codes, tmp_path / "resumed", resume_from_checkpoint=half)
    expected, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (trained, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_holds_an_export_that_equals_the_trained_model(base, trained):
    checkpoint = TOY.find_checkpoint(str(base))
    assert TOY.verify_export(trained / "consolidated", trained / "adapter", checkpoint, device="cpu") < 1e-5


def test_merged_weights_equal_the_trained_model(base, trained, tmp_path):
    checkpoint = TOY.find_checkpoint(str(base))
    TOY.merge_adapter(trained / "adapter", checkpoint, tmp_path / "merged")
    assert TOY.verify_export(tmp_path / "merged", trained / "adapter", checkpoint, device="cpu") < 1e-5


def test_samples_of_adapter_and_base_are_generated(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_csm.models.get_family", lambda name: TOY)
    folder = trained / "consolidated"
    write_emotion_control(EmotionControl("prefix", "({emotion})", ("happy", "sad")), folder)
    samples = generate_samples.generate_samples(folder, tmp_path, duration_s=8.0, seed=1)
    assert [(sample.model, sample.emotion) for sample in samples] == [
        (model, emotion) for model in ("trained", "base") for emotion in ("happy", "sad")
    ]
    clips = {path.name: soundfile.read(path)[0].tobytes() for path in tmp_path.iterdir()}
    for emotion in ("happy", "sad"):
        assert clips[f"trained_{emotion}.wav"] != clips[f"base_{emotion}.wav"]


def test_moshi_is_the_family_of_every_other_checkpoint(tiny_moshi):
    assert get_family(str(tiny_moshi)).name == "moshi"
