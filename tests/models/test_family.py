"""A second model family goes through every stage without a line of its own outside its record."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

from hf_csm import models
from hf_csm.cli import main
from hf_csm.config_parser import parse_run_config
from hf_csm.encode.compose import Composition
from hf_csm.encode.run import encode
from hf_csm.serving.loaded import load_model
from hf_csm.serving.speech import say
from hf_csm.training.loop import train
from hf_csm.training.metrics_log import read_metrics
from tests.doubles.hub import LocalHub
from tests.doubles.toy_family import TOY, ToyTokenizer, write_toy


sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import generate_samples  # noqa: E402


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models.FAMILIES, "toy", "tests.doubles.toy_family:TOY")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="module")
def codes(base, prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("codes") / "ravdess"
    encode(prepared, out, TOY.load_codec(base), "toy", composition=Composition(duration_s=12.0), progress=False)
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


def test_an_adapter_is_exported_and_pushed_like_moshis(base, trained, tmp_path):
    assert main(["export", str(trained), "--out", str(tmp_path / "out")]) == 0
    assert main(["export", str(trained), "--out", str(tmp_path / "merged"), "--merged"]) == 0
    checkpoint = TOY.find_checkpoint(str(base))
    for name in ("out", "merged"):
        assert TOY.verify_export(tmp_path / name, trained / "adapter", checkpoint, device="cpu") < 1e-5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "delta.safetensors", "adapter_model.safetensors", "emotions.json", "corpora.json"}
    with LocalHub(tmp_path / "hub") as hub, hub.connected(tmp_path / "home"):
        HfApi().create_repo("user/base")
        HfApi().upload_folder(folder_path=base, repo_id="user/base")
        for source, repo_id in ((trained, "user/toy"), (tmp_path / "merged", "user/merged")):
            assert main(["push", str(source), "--repo-id", repo_id, "--base-model", "user/base"]) == 0
            assert str(TOY.find_checkpoint(repo_id).weights).startswith(str(tmp_path / "home"))
            assert TOY.verify_export(repo_id, trained / "adapter", checkpoint, device="cpu") < 1e-5


def test_a_text_is_spoken_by_adapter_and_base(trained, tmp_path):
    model = load_model([f"toy={trained}"])
    happy = say(model, "open the door", emotion="happy", seed=1)
    assert happy.text_tokens[:4] == ToyTokenizer().encode("(happy) open the door")
    base, none = (
        say(model, "open the door", adapter=adapter, strength=strength, seed=1)
        for adapter, strength in (("base", 1.0), ("toy", 0.0))
    )
    assert np.array_equal(base.audio, none.audio)
    assert not np.array_equal(base.audio[: len(happy.audio)], happy.audio[: len(base.audio)])


def test_samples_of_adapter_and_base_are_generated(trained, tmp_path):
    samples = generate_samples.generate_samples(trained, tmp_path, duration_s=8.0, seed=1)
    emotions = list(dict.fromkeys(sample.emotion for sample in samples))
    assert emotions == ["neutral", "happy", "sad", "angry"]
    assert [(sample.model, sample.emotion) for sample in samples] == [
        (model, emotion) for model in ("trained", "base") for emotion in emotions
    ]
    clips = {path.name: soundfile.read(path)[0].tobytes() for path in tmp_path.iterdir()}
    for emotion in emotions:
        assert clips[f"trained_{emotion}.wav"] != clips[f"base_{emotion}.wav"]


def test_the_family_is_that_of_config_json(base, trained, tiny_moshi, tmp_path):
    for folder in (base, trained):
        assert models.get_family(folder).name == "toy"
    assert models.get_family(tiny_moshi).name == "moshi"
    (tmp_path / "config.json").write_text('{"dim": 4096}')
    assert models.get_family(tmp_path).name == "moshi"
