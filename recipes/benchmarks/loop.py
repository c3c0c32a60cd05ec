"""Measure what the training loop costs over a bare forward, backward and optimizer step, on the tiny model.

    NO_TORCH_COMPILE=1 python recipes/benchmarks/loop.py

Prints a Markdown table. `--steps 4 --pairs 1` shows only that it works.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from paired_timing import bare_step, in_pairs, print_header, print_row, timed

from hf_csm.config import DatasetConfig, LoraSettings, MoshiPaths, RunConfig, TrainingConfig
from hf_csm.encode.compose import Composition
from hf_csm.encode.run import encode
from hf_csm.mixture.loader import MixtureLoader
from hf_csm.mixture.windows import WindowTable
from hf_csm.models.moshi import MOSHI
from hf_csm.models.moshi.checkpoint import codec_sha256, find_checkpoint, load_tokenizer
from hf_csm.models.moshi.codec import load_codec
from hf_csm.models.moshi.layout import lay_out
from hf_csm.models.moshi.lora import adapter_parameters, add_lora
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.tiny import write_tiny_moshi
from hf_csm.prepare.run import prepare
from hf_csm.testing.ravdess import write_ravdess
from hf_csm.training.loop import train
from hf_csm.units import seconds_to_frames


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of a measurement (default: 100)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of measurements (default: 3)")
    options = parser.parse_args()
    loop_s, bare_s, ratio = loop_overhead(options.steps, options.pairs)
    print_header("what", "loop", "bare step", "ratio")
    print_row("training loop, tiny model", f"{1000 * loop_s:.1f} ms", f"{1000 * bare_s:.1f} ms", f"{ratio:.3f}")


def loop_overhead(num_steps: int, num_pairs: int) -> tuple[float, float, float]:
    """Return the median seconds of a step of `hf_csm.training.loop`, of a bare step, and their ratio.

    A loop step is what a run of twice `num_steps` takes beyond one of `num_steps`, so set-up and the last checkpoint
    cancel; it includes loading, laying out, weights, reductions, clipping, logging and the progress bar. The bare
    steps have the same micro-batches, already in memory: forward, backward, AdamW.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = _tiny_run(Path(folder))

        def run(num_steps: int) -> float:
            config.run_dir = tempfile.mkdtemp(dir=folder)
            config.training.max_steps = num_steps
            return timed(lambda: train(config, MOSHI))

        return in_pairs(
            lambda: (run(2 * num_steps) - run(num_steps)) / num_steps,
            lambda: _bare_steps(config, num_steps),
            num_pairs,
        )


def _tiny_run(folder: Path) -> RunConfig:
    """Write a tiny base and a small table of codes, and return the configuration of a run on them."""
    base = find_checkpoint(str(write_tiny_moshi(folder / "base")))
    raw = write_ravdess(folder / "raw", actors=(1, 2, 3, 4, 17), statements=(1,), repetitions=(1,), intensities=(1,))
    prepare("ravdess", raw, folder / "prepared", progress=False)
    encode(
        folder / "prepared",
        folder / "codes",
        load_codec(base),
        codec_sha256(base),
        composition=Composition(duration_s=20.0),
        progress=False,
    )
    return RunConfig(
        moshi_paths=MoshiPaths(str(folder / "base"), dtype="float32"),
        dataset=DatasetConfig(manifest_path=str(folder / "codes"), duration_sec=20, batch_size=4),
        lora=LoraSettings(rank=16, alpha=32),
        training=TrainingConfig(eval_every=0, save_every=10**6),
    )


def _bare_steps(config: RunConfig, num_steps: int) -> float:
    """Return the seconds of one of `num_steps` bare steps on the micro-batches that the run took."""
    base = find_checkpoint(config.moshi_paths.hf_repo_id)
    model = load_moshi(base, dtype=torch.float32).train()
    add_lora(
        model,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        target_modules=config.lora.target_modules,
        seed=config.seed,
    )
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=config.optimizer.lr)
    table = WindowTable(
        config.dataset.training_sources(),
        "train",
        codec_sha256=codec_sha256(base),
        max_frames=seconds_to_frames(config.dataset.duration_sec),
    )
    loader = MixtureLoader(
        table,
        model.layout,
        partial(lay_out, layout=model.layout, tokenize=load_tokenizer(base).encode),
        config.dataset,
        seed=config.seed,
    )
    # The second half of the longer run, which is the one that counts there.
    batches = [batch.codes for batch in islice(loader.batches(start=num_steps), num_steps)]
    bare_step(model, optimizer, batches[0])

    def run() -> None:
        for codes in batches:
            bare_step(model, optimizer, codes)

    return timed(run) / num_steps


if __name__ == "__main__":
    main()
