import json

import numpy as np
import pytest
import soundfile
from accelerate import Accelerator

from hf_csm.config import DatasetConfig, Replay, RunConfig, Source
from hf_csm.data.table import split_files
from hf_csm.errors import UserError
from hf_csm.models.moshi import MOSHI
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.codec import MimiCodec
from hf_csm.training.loop import train
from hf_csm.training.manifests import encode_manifests


@pytest.fixture
def write_manifest(tmp_path):
    """Write a manifest of one dialogue of four seconds."""

    def write(name):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, (4 * 24_000, 2))
        soundfile.write(folder / f"{name}.wav", noise, 24_000)
        alignments = [["hello", [1.0, 1.5], "SPEAKER_MAIN"], ["you", [2.0, 2.5], "SPEAKER_USER"]]
        (folder / f"{name}.json").write_text(json.dumps({"alignments": alignments}))
        manifest = folder / f"{name}.jsonl"
        manifest.write_text(json.dumps({"path": f"{name}.wav", "duration": 4.0}) + "\n")
        return str(manifest)

    return write


def test_manifests_become_tables_in_the_run_and_are_encoded_once(
    write_manifest, codes, tiny_moshi, tmp_path, monkeypatch
):
    calls = []
    real = MimiCodec.encode
    monkeypatch.setattr(MimiCodec, "encode", lambda *args: (calls.append(args), real(*args))[1])
    config = RunConfig(
        run_dir=str(tmp_path / "run"),
        dataset=DatasetConfig(
            sources=[Source(write_manifest("train"), 2.0), Source(str(codes))],
            val_manifest_path=write_manifest("val"),
            replay=Replay(write_manifest("train"), 0.1),
            duration_sec=12.0,
        ),
    )
    base = find_checkpoint(str(tiny_moshi))
    dataset = encode_manifests(config, MOSHI, base, Accelerator(cpu=True))
    assert dataset == encode_manifests(config, MOSHI, base, Accelerator(cpu=True))
    assert len(calls) == 2  # train and val
    of_manifest, of_codes = dataset.sources
    assert (of_manifest.weight, of_codes) == (2.0, Source(str(codes)))
    assert dataset.replay == Replay(of_manifest.path, 0.1)
    assert sorted(path.name[:-8] for path in (tmp_path / "run" / "codes").iterdir()) == ["train-", "val-"]
    assert all(split_files(path, "train") for path in (of_manifest.path, dataset.val_manifest_path))


def test_without_manifests_nothing_is_loaded(codes):
    config = RunConfig(dataset=DatasetConfig(manifest_path=str(codes)))
    assert encode_manifests(config, MOSHI, None, None) is config.dataset


def test_the_guides_jsonl_trains(write_manifest, run_config, tmp_path):
    config = run_config(
        dataset__manifest_path=write_manifest("train"),
        dataset__val_manifest_path=write_manifest("val"),
        training__max_steps=1,
        training__eval_every=1,
    )
    assert train(config, MOSHI).name == "checkpoint_000001"
    assert "eval_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_missing_manifest_is_named(run_config):
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        train(run_config(dataset__manifest_path="nowhere.jsonl"), MOSHI)
