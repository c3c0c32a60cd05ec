"""Rates of the data path, against what its libraries do bare. Each command prints one row of a Markdown table.

    python recipes/benchmark_data.py prepare
    python recipes/benchmark_data.py loader

`prepare` writes a synthetic RAVDESS of 1,440 clips and compares `hf-csm prepare` with a loop that only decodes,
resamples and encodes FLAC, over the same files with as many processes; and measures how memory grows with the corpus.
`loader` measures how fast laid-out micro-batches leave the mixture.
"""

from __future__ import annotations

import argparse
import datetime
import io
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import soxr
from sentencepiece import SentencePieceProcessor

from hf_csm.config import DatasetConfig, Source
from hf_csm.data.archive import Member, list_members
from hf_csm.data.conversation import Composition
from hf_csm.data.encode import plan_shards, window_table
from hf_csm.data.layout import NO_TOKEN, Layout
from hf_csm.data.mixture import MixtureLoader, WindowTable
from hf_csm.data.prepare import prepare
from hf_csm.data.schema import SPLITS, WINDOW_FEATURES
from hf_csm.data.table import ShardWriter, split_files, write_card
from hf_csm.data.workers import usable_cores
from hf_csm.testing.ravdess import write_ravdess
from hf_csm.testing.tiny_moshi import write_tiny_tokenizer
from hf_csm.units import FRAME_RATE, SAMPLE_RATE, samples_to_frames


def machine() -> str:
    """Return the processor and the number of cores in use."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {usable_cores()} cores"


def bare(member: Member) -> int:
    """Decode, resample and encode one clip, nothing else; returns the size."""
    samples, sample_rate = soundfile.read(io.BytesIO(member.read()), dtype="float32")
    mono = samples if samples.ndim == 1 else samples[:, 0]
    buffer = io.BytesIO()
    soundfile.write(
        buffer, soxr.resample(mono, sample_rate, SAMPLE_RATE), SAMPLE_RATE, format="FLAC", subtype="PCM_16"
    )
    return len(buffer.getvalue())


def bare_loop(raw: Path, num_workers: int) -> int:
    """Run `bare` over all clips of a raw corpus; returns their number."""
    members = list_members([raw])
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("fork")) as pool:
        return sum(1 for _ in pool.map(bare, members, chunksize=16))


def timed(function: Callable[[], object]) -> float:
    """Return the seconds a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def peak_mib(raw: Path, out: Path, num_workers: int) -> tuple[float, float]:
    """Prepare in a fresh process; returns the peak memory in MiB of it and of its largest worker."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_prepare_and_weigh, raw, out, num_workers).result()


def _prepare_and_weigh(raw: Path, out: Path, num_workers: int) -> tuple[float, float]:
    prepare("ravdess", raw, out, num_workers=num_workers, progress=False)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def benchmark_prepare(num_runs: int = 3) -> str:
    """Return a table row: rates of prepare and of the bare loop, their ratio, memory for two corpus sizes."""
    num_workers = usable_cores()
    with tempfile.TemporaryDirectory() as scratch:
        large = write_ravdess(Path(scratch, "large"), layout="actors")
        small = write_ravdess(Path(scratch, "small"), layout="actors", actors=(1, 2, 17, 22))
        bare_s, prepare_s = [], []
        num_clips = bare_loop(large, num_workers)
        for run in range(num_runs):
            out = Path(scratch, f"out{run}")
            bare_s.append(timed(lambda: bare_loop(large, num_workers)))
            prepare_s.append(
                timed(lambda out=out: prepare("ravdess", large, out, num_workers=num_workers, progress=False))  # type: ignore[misc]
            )
        ratio = statistics.median(bare_s) / statistics.median(prepare_s)
        small_mib = peak_mib(small, Path(scratch, "small_out"), num_workers)
        large_mib = peak_mib(large, Path(scratch, "large_out"), num_workers)
    cells = [
        f"prepare, {num_clips} clips",
        f"{num_clips / statistics.median(prepare_s):.0f} clips/s",
        f"{num_clips / statistics.median(bare_s):.0f} clips/s",
        f"{ratio:.2f}",
        f"parent {small_mib[0]:.0f} -> {large_mib[0]:.0f}, worker {small_mib[1]:.0f} -> {large_mib[1]:.0f} MiB",
        f"{machine()}, {num_workers} processes",
        datetime.date.today().isoformat(),
    ]
    return f"| {' | '.join(cells)} |"


def benchmark_loader(num_batches: int = 200) -> str:
    """Return a table row: how fast laid-out micro-batches leave the loader of one process, and their padding.

    The conversations are those planned for the 1,440 clips of the speech corpus at 80 s; the codes are random, all 32
    codebooks of the real Mimi.
    """
    layout = Layout((0, 0, *[1] * 7, 0, *[1] * 7), 8, 8, 3, 0, text_card=32_000, card=2048)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer.model")
        write_tiny_tokenizer(tokenizer)
        tokenize = SentencePieceProcessor(str(tokenizer)).encode
        raw = write_ravdess(Path(scratch, "raw"), layout="actors")
        prepare("ravdess", raw, Path(scratch, "prepared"), progress=False)
        codes = Path(scratch, "codes")
        _encode_at_random(Path(scratch, "prepared"), codes)
        table = WindowTable([Source(str(codes))], "train", codec_sha256="0")
        loader = MixtureLoader(table, layout, tokenize, DatasetConfig(), seed=0)
        batches = loader.batches()
        next(batches)
        num_frames = num_padded = 0
        begin = time.perf_counter()
        for batch in islice(batches, num_batches):
            padded = int((batch.codes[:, 1] == NO_TOKEN).sum())
            num_padded += padded
            num_frames += batch.codes[:, 1].numel() - padded
        duration_s = time.perf_counter() - begin
        begin = time.perf_counter()
        next(loader.batches(start=3_000))
        skip_s = time.perf_counter() - begin
    cells = [
        f"loader, {len(table)} windows of up to 80 s, {num_batches} micro-batches of 8 x 80 s",
        f"{num_frames / FRAME_RATE / duration_s:,.0f} s of audio per second and core",
        f"{num_padded / (num_frames + num_padded):.1%}",
        f"{skip_s:.1f} s",
        machine(),
        datetime.date.today().isoformat(),
    ]
    return f"| {' | '.join(cells)} |"


def _encode_at_random(prepared: Path, out: Path) -> None:
    """Write the table that `encode` would, with random codes instead of Mimi's."""
    rng = np.random.default_rng(0)
    files = [file for split in SPLITS for file in split_files(prepared, split)]
    shards, _ = plan_shards(files, Composition(), variants=1)
    for shard in shards:
        with ShardWriter(out / "data" / shard.split / shard.name, WINDOW_FEATURES, compression="zstd") as writer:
            for conversation in shard.conversations:
                num_frames = samples_to_frames(conversation.num_samples)
                codes = rng.integers(0, 2048, (2, 32, num_frames), dtype=np.int16)
                writer.write(window_table(conversation, codes, "ravdess", shard.split))
    metadata = {"stage": "codes", "codec_sha256": "0"}
    write_card(out, features=WINDOW_FEATURES, title="random", license="other", splits={}, metadata=metadata, body="")


BENCHMARKS: dict[str, tuple[str, Callable[[], str]]] = {
    "prepare": (
        "what | prepare | bare loop | ratio | peak memory, 240 -> 1,440 clips | machine | date",
        benchmark_prepare,
    ),
    "loader": ("what | rate | padding | to skip 3,000 micro-batches | machine | date", benchmark_loader),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the named benchmarks, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)}; everything by default")
    names = parser.parse_args(arguments).names
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    for name in names or list(BENCHMARKS):
        header, run = BENCHMARKS[name]
        print(f"| {header} |\n|{'---|' * (header.count('|') + 1)}\n{run()}")


if __name__ == "__main__":
    main()
