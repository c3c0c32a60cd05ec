"""The whole way on the embedded model and a synthetic RAVDESS, on CPU: `make demo`.

Synthesize, prepare, encode, train, interrupt, resume, export, load through moshi, speak. The commands are those a user
types. The model is tiny and its base is random: the demo shows that every part works, not how good Moshi sounds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from generate_samples import Sample, generate_samples

from hf_csm.cli import run_command
from hf_csm.errors import UserError


DEMO = Path("demo")
RUN_DIR = DEMO / "checkpoints" / "demo"
CONFIG = Path("recipes/configs/demo.yaml")
INTERRUPT_AT_STEP = 30
ACTORS = (*range(1, 9), *range(17, 25))
"""Eight to train, four to validate, four to test."""
EMOTIONS = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]
LEFT_BY_EARLIER_DEMOS = (
    "base",
    "raw",
    "prepared",
    "codes",
    "checkpoints",
    "export",
    "samples",
    "report.md",
    "loss.png",
)


def main() -> None:
    """Go the whole way and print the results."""
    os.chdir(Path(__file__).resolve().parent.parent)
    started = time.monotonic()
    clear()
    seconds = {}
    for name, stage in (
        ("synthesize base and corpus", synthesize),
        ("prepare", prepare),
        ("encode", encode),
        ("train, interrupted", train_until_interrupted),
        ("train, resumed", resume),
        ("export, loaded back", export),
        ("speak", speak),
    ):
        print(f"\n--- {name}", flush=True)
        stage_started = time.monotonic()
        stage()
        seconds[name] = time.monotonic() - stage_started
    write_report(seconds, time.monotonic() - started)


def clear() -> None:
    """Remove what an earlier demo left: every number of the report is measured in this run."""
    for name in LEFT_BY_EARLIER_DEMOS:
        path = DEMO / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run(*command: str) -> None:
    """Run a command as a user would, from this environment."""
    print("$", *command, flush=True)
    program = Path(sys.executable).parent / command[0]
    if subprocess.run([str(program), *command[1:]]).returncode != 0:
        raise UserError(f"`{' '.join(command)}` failed.", "Its own message is above.")


def synthesize() -> None:
    """Write the tiny Moshi and the zip that stands for the one of RAVDESS."""
    from hf_csm.models.moshi.tiny import write_tiny_moshi
    from hf_csm.testing.ravdess import write_ravdess

    write_tiny_moshi(DEMO / "base")
    write_ravdess(DEMO / "raw", actors=ACTORS, intensities=(1,), repetitions=(1,))
    print(*sorted(str(path) for path in (*DEMO.glob("base/*"), *DEMO.glob("raw/*"))), sep="\n")


def prepare() -> None:
    """Zip to utterances."""
    run("hf-csm", "prepare", "ravdess", "--raw", f"{DEMO}/raw", "--out", f"{DEMO}/prepared/ravdess")


def encode() -> None:
    """Utterances to conversations to codes."""
    codes = f"{DEMO}/codes/ravdess"
    run(
        "hf-csm", "encode", f"{DEMO}/prepared/ravdess", "--out", codes,
        "--base-model", f"{DEMO}/base", "--duration-sec", "20",
    )  # fmt: skip


def train_command(*more: str) -> list[str]:
    """Return the training command of the README, for one CPU process."""
    return [
        "accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml",
        "--num_cpu_threads_per_process", str(os.cpu_count()),
        "recipes/train.py", "--config", str(CONFIG), *more,
    ]  # fmt: skip


def train_until_interrupted() -> None:
    """Press Ctrl-C in the middle of the run."""
    command = train_command()
    print("$", *command, flush=True)
    program = Path(sys.executable).parent / command[0]
    process = subprocess.Popen([str(program), *command[1:]], start_new_session=True)
    try:
        while process.poll() is None and last_step() < INTERRUPT_AT_STEP:
            time.sleep(0.05)
        if process.poll() is not None:
            raise UserError("Training ended before it could be interrupted.", "Its own message is above.")
        print(f"\n^C after step {last_step()}", flush=True)
        for child in psutil.Process(process.pid).children():  # the launcher itself would answer with a traceback
            child.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        deadline = time.monotonic() + 60
        while not list(RUN_DIR.glob("checkpoint_*/state/trainer.pt")) or list(RUN_DIR.glob(".checkpoint_*")):
            if time.monotonic() > deadline:  # the launcher may be gone before its process has written
                raise UserError("Ctrl-C left no checkpoint.", f"Look into {RUN_DIR}.")
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    print("checkpoint:", newest_checkpoint(), flush=True)


def resume() -> None:
    """Go on to the last step."""
    run(*train_command("--resume-from-checkpoint", "latest"))


def export() -> None:
    """Checkpoint to a folder that moshi's loader takes; the command compares the two."""
    run("hf-csm", "export", str(newest_checkpoint()), "--out", f"{DEMO}/export")


def speak() -> None:
    """One clip per emotion from the trained and the base model."""
    # At moshi's temperatures a model this small hardly ever breaks its silence; 1 is what it has learnt.
    samples = generate_samples(
        DEMO / "export", DEMO / "samples", emotions=EMOTIONS, duration_s=6.0, temperature=1.0, seed=2
    )
    (DEMO / "samples" / "samples.json").write_text(json.dumps([vars(sample) for sample in samples], indent=2))
    print(f"{len(samples)} clips in {DEMO}/samples")


def metrics() -> list[dict]:
    """Return the lines of the run's metrics.jsonl."""
    from hf_csm.training.metrics_log import read_metrics

    path = RUN_DIR / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def last_step() -> int:
    """Return the last optimizer step that was logged."""
    return max((line["step"] for line in metrics()), default=0)


def newest_checkpoint() -> Path:
    """Return the run's newest checkpoint."""
    from hf_csm.training.checkpoint import list_checkpoints

    return list_checkpoints(RUN_DIR)[-1]


def write_report(seconds: dict[str, float], total_s: float) -> None:
    """Write demo/report.md with the loss curve and print its tables."""
    from hf_csm.training.plots import plot_losses

    lines = metrics()
    plot_losses(lines, DEMO / "loss.png", "The tiny Moshi on synthetic RAVDESS")
    samples = [Sample(**values) for values in json.loads((DEMO / "samples" / "samples.json").read_text())]
    report = "\n\n".join(
        [
            "# Demo\n\nThe embedded tiny Moshi (random base, random codec) on a synthetic RAVDESS. It shows that the "
            "whole way works;\nit says nothing about how Moshi 7B sounds. Every number is from this run.",
            "![Loss](loss.png)",
            "## Results\n\n" + results_table(lines),
            "## Samples\n\n" + samples_table(samples),
            f"## Time\n\n{time_table(seconds, total_s)}",
        ]
    )
    (DEMO / "report.md").write_text(report + "\n")
    print(f"\n{report.partition('![Loss](loss.png)')[2].strip()}\n\nAll of it is in {DEMO}/report.md")


def results_table(lines: list[dict]) -> str:
    """Return first and last validation losses, base and adapter."""
    last = [line for line in lines if "eval_loss" in line][-1]
    training = [line for line in lines if "loss" in line]
    rows = ["| validation, nats | base | adapter |", "| --- | ---: | ---: |"]
    for key in ("loss", "text_words", "text_padding", "codebook_0", "codebooks_rest"):
        rows.append(f"| {key} | {last[f'eval_base_{key}']:.3f} | {last[f'eval_{key}']:.3f} |")
    steps = len({line["step"] for line in training})
    rate = sorted(line["tokens_per_s"] for line in training)[steps // 2]
    padding = sum(line["padding"] for line in training) / steps
    return "\n".join(rows) + (
        f"\n\n{steps} optimizer steps, one line each in metrics.jsonl across the interruption; "
        f"median {rate:,.0f} tokens/s; {padding:.1%} of frames were padding."
    )


def samples_table(samples: list[Sample]) -> str:
    """Return what can be counted in the generated clips."""
    rows = ["| model | emotion | text padding | different semantic codes |", "| --- | --- | ---: | ---: |"]
    for sample in samples:
        rows.append(
            f"| {sample.model} | {sample.emotion} | {sample.padding_share:.0%} | {sample.num_semantic_codes} |"
        )
    note = (
        "A clip with a single semantic code is the same sound in every frame: the model is silent. The decoder of "
        "the tiny codec is random, so the clips are noise to the ear whatever their codes."
    )
    return "\n".join([*rows, "", note])


def time_table(seconds: dict[str, float], total_s: float) -> str:
    """Return the seconds of each stage."""
    rows = ["| stage | s |", "| --- | ---: |", *(f"| {name} | {value:.1f} |" for name, value in seconds.items())]
    return "\n".join([*rows, f"| all | {total_s:.1f} |"])


if __name__ == "__main__":
    sys.exit(run_command(main, debug="--debug" in sys.argv))
