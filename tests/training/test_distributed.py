"""Real launchers. Two processes over gloo stand for two GPUs: `accelerate launch --cpu` would start only one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_csm.training.metrics_log import read_metrics


ROOT = Path(__file__).parents[2]


def run_two(options, *, use_cpu="true", fails=False):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": use_cpu, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*torchrun, str(ROOT / "recipes" / "train.py"), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if not fails:
        assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def losses(run_dir, key="loss"):
    return {line["step"]: line[key] for line in read_metrics(run_dir / "metrics.jsonl") if key in line}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, module_run_options):
    """Six steps of two processes without interruption."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    run_two(module_run_options(run_dir=run_dir, training__max_steps=6, training__save_every=3))
    return run_dir


def test_there_really_are_two_processes(straight):
    """Each process writes its random state."""
    state = straight / "checkpoint_000006" / "state"
    assert {path.name for path in state.iterdir()} == {"trainer.pt", "rng_00000.pt", "rng_00001.pt"}


def test_two_processes_resume_bit_for_bit(straight, run_options, tmp_path):
    run_two(
        run_options(
            training__max_steps=6,
            training__save_every=3,
            resume_from_checkpoint=straight / "checkpoint_000003",
        )
    )
    expected = losses(straight)
    assert losses(tmp_path / "run") == {step: expected[step] for step in (4, 5, 6)}
    name = "checkpoint_000006/adapter/adapter_model.safetensors"
    ours, theirs = load_file(tmp_path / "run" / name), load_file(straight / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_two_processes_equal_one_with_twice_the_micro_batches(straight, run_config, tmp_path):
    from hf_csm.models.moshi import MOSHI
    from hf_csm.training.loop import train

    train(run_config(training__max_steps=6, training__save_every=3, training__gradient_accumulation_steps=2), MOSHI)
    one, two = losses(tmp_path / "run"), losses(straight)
    assert [one[step] for step in range(1, 7)] == pytest.approx([two[step] for step in range(1, 7)], rel=1e-5)
    evaluated = losses(tmp_path / "run", "eval_loss"), losses(straight, "eval_loss")
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)


@pytest.mark.slow
def test_processes_that_do_not_know_of_each_other_are_refused(run_options, tmp_path):
    """On a CPU and without ACCELERATE_USE_CPU, Accelerate runs each process separately, all on the same folder."""
    assert "2 processes were started, but Accelerate uses 1" in run_two(run_options(), use_cpu="false", fails=True)
    assert not list((tmp_path / "run").glob("checkpoint_*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_leaves_a_checkpoint_to_resume_from(run_options, tmp_path, number):
    """SIGTERM to `accelerate launch` alone, as from a scheduler; Ctrl-C to both processes, as from a terminal."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1"]
    options = run_options(training__max_steps=100_000, training__save_every=100_000, training__eval_every=0)
    command = [*launch, str(ROOT / "recipes" / "train.py"), *options]
    metrics, checkpoints = tmp_path / "run" / "metrics.jsonl", tmp_path / "run"
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) >= 2)
        launcher.terminate() if number == signal.SIGTERM else os.killpg(launcher.pid, number)
        launcher.wait(600)
        wait_for(lambda: list(checkpoints.glob("checkpoint_*/state/trainer.pt")))
    finally:
        launcher.kill()
    step = max(losses(tmp_path / "run"))
    (checkpoint,) = checkpoints.glob("checkpoint_*")
    assert checkpoint.name == f"checkpoint_{step:06d}"
    more = ["--resume-from-checkpoint", "latest", "--training.max_steps", str(step + 1)]
    subprocess.run([*command, *more], check=True, capture_output=True)
    assert sorted(losses(tmp_path / "run")) == list(range(1, step + 2))


def wait_for(condition, timeout_s=90.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
