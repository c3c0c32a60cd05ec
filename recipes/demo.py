"""The whole workflow with a tiny model and a synthetic RAVDESS, on CPU: `make demo`.

Prepare, encode, train, resume, export, samples: the commands that a user types. The base model is random, so the demo
shows that every part works, not how Moshi sounds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from generate_samples import Sample, generate_samples

from hf_csm.cli import run_command
from hf_csm.errors import UserError


DEMO = Path("demo")
RUN_DIR = DEMO / "checkpoints" / "demo"
ACTORS = (*range(1, 9), *range(17, 25))
"""Eight to train, four to validate, four to test."""
EMOTIONS = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]
OUTPUTS = ("base", "raw", "prepared", "codes", "checkpoints", "export", "samples", "report.md", "loss.png")
TRAIN = [
    "accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml",
    "--num_cpu_threads_per_process", str(os.cpu_count()), "recipes/train.py", "--config", "recipes/configs/demo.yaml",
]  # fmt: skip
STAGES = {
    "prepare": ["hf-csm", "prepare", "ravdess", "--raw", "demo/raw", "--out", "demo/prepared/ravdess"],
    "encode": [
        "hf-csm", "encode", "demo/prepared/ravdess", "--out", "demo/codes/ravdess",
        "--base-model", "demo/base", "--duration-sec", "20",
    ],
    "train 100 steps": [*TRAIN, "--training.max_steps", "100"],
    "resume to 150 steps": [*TRAIN, "--resume-from-checkpoint", "latest"],
    "export": ["hf-csm", "export", str(RUN_DIR / "best"), "--out", "demo/export"],
}  # fmt: skip


def main() -> None:
    """Run every stage and print the results."""
    from hf_csm.models.moshi.tiny import write_tiny_moshi
    from hf_csm.testing.ravdess import write_ravdess

    os.chdir(Path(__file__).resolve().parent.parent)
    for name in OUTPUTS:
        path = DEMO / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    started = time.monotonic()
    write_tiny_moshi(DEMO / "base")
    write_ravdess(DEMO / "raw", actors=ACTORS, intensities=(1,), repetitions=(1,))
    seconds = {}
    for name, command in STAGES.items():
        stage_started = time.monotonic()
        print(f"\n--- {name}\n$", *command, flush=True)
        if subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]]).returncode != 0:
            raise UserError(f"The stage {name!r} failed.", "Its own message is above.")
        seconds[name] = time.monotonic() - stage_started
    print("\n--- samples", flush=True)
    stage_started = time.monotonic()
    # A model this small is silent at moshi's default temperatures.
    samples = generate_samples(
        DEMO / "export", DEMO / "samples", emotions=EMOTIONS, duration_s=6.0, temperature=1.0, seed=2
    )
    seconds["samples"] = time.monotonic() - stage_started
    write_report(samples, seconds | {"all": time.monotonic() - started})


def write_report(samples: list[Sample], seconds: dict[str, float]) -> None:
    """Write demo/report.md with the loss curve, and print its tables."""
    from hf_csm.training.metrics_log import read_metrics
    from hf_csm.training.plots import plot_losses

    metrics = read_metrics(RUN_DIR / "metrics.jsonl")
    plot_losses(metrics, DEMO / "loss.png", "The tiny Moshi on synthetic RAVDESS")
    tables = f"""## Results

{results_table(metrics)}

## Samples

| model | emotion | text padding | distinct semantic codes |
| --- | --- | ---: | ---: |
{lines(f"| {s.model} | {s.emotion} | {s.padding_share:.0%} | {s.num_semantic_codes} |" for s in samples)}

A clip with one semantic code is silence. The decoder of the tiny codec is random: every clip sounds like noise.

## Time

| stage | s |
| --- | ---: |
{lines(f"| {name} | {value:.1f} |" for name, value in seconds.items())}
"""
    (DEMO / "report.md").write_text(
        "# Demo\n\nA tiny Moshi (random base, random codec) on a synthetic RAVDESS. It shows that the whole workflow "
        f"runs;\nit says nothing about Moshi 7B. Every number is from this run.\n\n![Loss](loss.png)\n\n{tables}"
    )
    print(f"\n{tables}\nThe report is in {DEMO}/report.md.")


def results_table(metrics: list[dict]) -> str:
    """Return the last validation losses of base and adapter, and the speed of training."""
    last = [line for line in metrics if "eval_loss" in line][-1]
    steps = [line for line in metrics if "loss" in line]
    names = ("loss", "text_words", "text_padding", "codebook_0", "codebooks_rest")
    rate = sorted(step["tokens_per_s"] for step in steps)[len(steps) // 2]
    padding = sum(step["padding"] for step in steps) / len(steps)
    return f"""| validation, nats | base | adapter |
| --- | ---: | ---: |
{lines(f"| {name} | {last[f'eval_base_{name}']:.3f} | {last[f'eval_{name}']:.3f} |" for name in names)}

{len(steps)} optimizer steps; median {rate:,.0f} tokens/s; {padding:.1%} of the frames were padding."""


def lines(rows: Iterable[str]) -> str:
    """Join the rows of a table."""
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(run_command(main, debug="--debug" in sys.argv))
