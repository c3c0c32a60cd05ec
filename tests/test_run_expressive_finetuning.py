import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_csm.testing.ravdess import write_ravdess
from tests.doubles.crema_d import write_crema_d


SCRIPT = Path(__file__).parent.parent / "recipes" / "run_expressive_finetuning.sh"


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment},
    )


@pytest.fixture
def config(tmp_path, tiny_moshi):
    """A configuration of two steps on three corpora, and the raw files of two of them."""
    raw = tmp_path / "raw"
    write_ravdess(
        raw / "ravdess",
        actors=(1, 2, 17, 18, 21),
        emotions=("happy", "sad"),
        intensities=(1,),
        repetitions=(1,),
        layout="actors",
        defects=False,
    )
    write_crema_d(
        raw / "crema_d", actors=(1001, 1002, 1015, 1020, 1010), sentences=("DFA",), layout="flat", defects=False
    )
    options = {
        "run_dir": str(tmp_path / "run"),
        "moshi_paths": {"hf_repo_id": str(tiny_moshi), "dtype": "float32"},
        "dataset": {
            "sources": [
                {"path": str(tmp_path / "codes" / name), "weight": weight}
                for name, weight in (("ravdess", 1.0), ("crema_d", 2.0), ("esd", 1.0))
            ],
            "duration_sec": 10,
            "batch_size": 1,
        },
        "lora": {"rank": 4, "alpha": 8},
        "training": {"max_steps": 1, "save_every": 1, "eval_every": 1, "eval_windows": 2, "trackers": []},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.mark.slow
def test_raw_corpora_become_an_adapter_and_a_second_run_skips_finished_stages(config, tmp_path):
    command = ("--gpus", 0, "--config", config, "--raw", tmp_path / "raw", "--sample-seconds", 1)
    first = run(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    stages = [line.removeprefix("--- ") for line in first.stdout.splitlines() if line.startswith("--- ")]
    assert stages == [
        *(f"{command} {corpus}" for corpus in ("ravdess", "crema_d") for command in ("prepare", "encode")),
        "mix", "train", "evaluate", "export",
    ]  # fmt: skip
    assert "codes/esd does not exist and is left out" in first.stderr
    run_dir = tmp_path / "run"
    assert {path.name for path in (run_dir / "export").iterdir()} >= {"lora.safetensors", "config.json"}
    assert (run_dir / "mixture.png").read_bytes()[:4] == b"\x89PNG"
    samples = [json.loads(line) for line in (run_dir / "samples" / "samples.jsonl").read_text().splitlines()]
    assert {(sample["model"], sample["emotion"]) for sample in samples} >= {("trained", "happy"), ("base", "sad")}

    made = (run_dir / "export").stat().st_mtime_ns
    again = run(*command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("is there already") == 3
    assert "--- prepare" not in again.stdout
    assert (run_dir / "export").stat().st_mtime_ns == made

    config.write_text(config.read_text().replace("weight: 2.0", "weight: 3.0"))
    other = run(*command)
    assert other.returncode == 1
    assert f"{run_dir} was trained on another mixture" in other.stderr
    config.write_text(config.read_text().replace("weight: 3.0", "weight: 2.0"))

    more = run(
        "--gpus", 0, "--config", config, "--skip-datasets", "--sample-seconds", 1,
        "--resume-from-checkpoint", run_dir / "checkpoint_000001", "--", "--training.max_steps", 2,
    )  # fmt: skip
    assert more.returncode == 0, more.stdout + more.stderr
    assert (run_dir / "checkpoint_000002").is_dir()
    assert (run_dir / "export").stat().st_mtime_ns > made


def test_a_failed_stage_stops_the_script_with_its_name(config, tmp_path):
    (tmp_path / "raw" / "ravdess" / "Actor_01" / "03-01-03-01-01-01-01.wav").write_bytes(b"not a sound")
    result = run("--gpus", 0, "--config", config, "--raw", tmp_path / "raw")
    assert result.returncode == 1
    assert "03-01-03-01-01-01-01.wav" in result.stderr
    assert 'error: the stage "prepare ravdess" failed.' in result.stderr
    assert "Traceback" not in result.stderr
    assert "--- encode" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", 1), "--gpu is not an option"),
        (("--gpus",), "--gpus has no value"),
        (("--gpus", "many"), "--gpus is many"),
        (("--sample-seconds", "abc"), "--sample-seconds is abc"),
        (("--resume-from-checkpoint", "nowhere"), "nowhere: no such checkpoint"),
    ],
)
def test_a_wrong_argument_is_an_error_of_two_lines(arguments, words):
    result = run(*arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 2


def test_without_any_corpus_the_error_is_in_stage_mix(config, tmp_path):
    result = run("--gpus", 0, "--config", config, "--skip-datasets")
    assert result.returncode == 1
    assert "None of the corpora is there." in result.stderr
    assert 'the stage "mix" failed' in result.stderr
