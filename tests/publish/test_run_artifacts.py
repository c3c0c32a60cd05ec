import json

import pytest
import yaml

from hf_csm.config import DatasetConfig, MoshiPaths, Replay, RunConfig, Source, TrainingConfig
from hf_csm.config_parser import dump_run_config, parse_run_config
from hf_csm.errors import UserError
from hf_csm.mixture.provenance import CorpusTerms
from hf_csm.publish.run_artifacts import copy_run_files, public_config, run_folder


ON_HUB = CorpusTerms("ravdess", "RAVDESS", "cc-by-nc-sa-4.0", table="user/ravdess")


def test_local_paths_are_removed_from_options(tmp_path):
    config = RunConfig(
        run_dir="ann/runs/happy",
        resume_from_checkpoint="/home/ann/runs/old/checkpoint_000005",
        moshi_paths=MoshiPaths(hf_repo_id="/home/ann/base"),
        dataset=DatasetConfig(
            sources=[Source("/home/ann/codes/mine"), Source("user/ravdess"), Source("codes/secret")],
            val_manifest_path="codes/ann/validation",
            replay=Replay("ann/talks/dialogues", 0.1),
        ),
        training=TrainingConfig(push_to_hub="user/happy"),
    )
    shown = public_config(yaml.safe_load(dump_run_config(config)), [ON_HUB], "kyutai/tiny")
    assert "ann" not in json.dumps(shown)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(shown))
    read = parse_run_config(["--config", str(tmp_path / "config.yaml")])
    assert [source.path for source in read.dataset.sources] == ["mine", "user/ravdess", "secret"]
    assert (read.run_dir, read.resume_from_checkpoint) == ("happy", "checkpoint_000005")
    assert (read.dataset.val_manifest_path, read.dataset.replay.manifest_path) == ("validation", "dialogues")
    assert read.moshi_paths.hf_repo_id == "kyutai/tiny" and read.training.push_to_hub == "user/happy"
    assert read.lora == config.lora and read.dataset.prefix_template == config.dataset.prefix_template


def test_local_paths_are_removed_from_unknown_options():
    shown = public_config({"note": "~/secret/x", "more": {"list": ["/home/ann/y", 3, "plain"]}}, [])
    assert shown == {"note": "x", "more": {"list": ["y", 3, "plain"]}}


def test_metrics_and_measures_are_numbers(run, tmp_path):
    lines = [{"step": 1, "loss": 2.0, "where": "/home/ann", "bad": float("nan")}, {"step": 2, "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    (run / "checkpoint_000010" / "health.json").write_text('{"voiced": 0.5, "file": "/home/ann/x.wav"}')
    out = tmp_path / "out"
    out.mkdir()
    copy_run_files(run / "checkpoint_000010", out, corpora=[ON_HUB])
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert found == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert json.loads((out / "health.json").read_text()) == {"voiced": 0.5}
    assert (out / "loss.png").is_file() and (out / "corpora.json").is_file()


def test_a_checkpoint_belongs_to_a_run_and_an_export_to_itself(run, tmp_path):
    assert run_folder(run / "best") == run.resolve() == run_folder(run / "checkpoint_000005")
    assert run_folder(tmp_path) == tmp_path.resolve()


def test_a_damaged_configuration_is_an_error(run, tmp_path):
    (run / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"config\.yaml: not valid YAML"):
        copy_run_files(run / "best", tmp_path, corpora=[])
