from pathlib import Path

import pytest

from hf_csm.config import RunConfig
from hf_csm.config_parser import parse_run_config


@pytest.fixture(scope="module")
def module_run_options(tiny_moshi: Path, codes: Path):
    """Command line of a run of ten small steps; keyword arguments override (`lora__rank=4`)."""

    def make(**overrides) -> list[str]:
        options = {
            "moshi_paths__hf_repo_id": tiny_moshi,
            "moshi_paths__dtype": "float32",
            "dataset__manifest_path": codes,
            "dataset__duration_sec": 12,
            "dataset__batch_size": 2,
            "lora__rank": 4,
            "lora__alpha": 8,
            "optimizer__lr": 0.003,
            "scheduler__num_warmup_steps": 2,
            "training__max_steps": 10,
            "training__save_every": 5,
            "training__eval_every": 5,
            "training__eval_windows": 4,
            "training__keep_checkpoints": 0,
            "training__trackers": "[]",
            **overrides,
        }
        return [part for name, value in options.items() for part in (f"--{name.replace('__', '.')}", str(value))]

    return make


@pytest.fixture
def run_options(module_run_options, tmp_path: Path):
    """The same, in the folder `run` of `tmp_path`."""
    return lambda **overrides: module_run_options(**{"run_dir": tmp_path / "run", **overrides})


@pytest.fixture
def run_config(run_options):
    """The same as a `RunConfig`."""

    def make(**overrides) -> RunConfig:
        return parse_run_config(run_options(**overrides))

    return make
