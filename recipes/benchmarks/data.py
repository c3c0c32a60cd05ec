"""Rates of the data path, against what its libraries do bare. Each command prints a Markdown table.

    python recipes/benchmarks/data.py prepare
    python recipes/benchmarks/data.py loader

`prepare` writes 1,440 to 4,100 synthetic clips of each corpus and compares `hf-csm prepare` with a loop that only
decodes, resamples and encodes FLAC, over the same files with as many processes. Memory is in `benchmark_scale.py`.
`loader` measures how fast laid-out micro-batches leave a balanced mixture of four corpora.
"""

from __future__ import annotations

import argparse
import datetime
import io
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import soxr
from sentencepiece import SentencePieceProcessor

from hf_csm.config import DatasetConfig, Source
from hf_csm.data.labels import EMOTIONS
from hf_csm.mixture.loader import MixtureLoader
from hf_csm.mixture.windows import training_table
from hf_csm.models.family import NO_TOKEN, Layout
from hf_csm.models.moshi.layout import lay_out
from hf_csm.models.moshi.tiny import write_tiny_tokenizer
from hf_csm.prepare.archive import Member, list_members
from hf_csm.prepare.pool import usable_cores
from hf_csm.prepare.run import prepare
from hf_csm.testing.codes import RandomWindow, write_random_codes
from hf_csm.testing.ravdess import write_ravdess
from hf_csm.units import FRAME_RATE, SAMPLE_RATE
from tests.doubles.crema_d import write_crema_d
from tests.doubles.esd import write_esd
from tests.doubles.msp_podcast import write_msp_podcast


ESD_TRAINING_SPEAKERS = (*range(1, 7), 11, 12, 13, 15, 16, 19)


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


def bare_loop(members: list[Member], num_workers: int) -> int:
    """Run `bare` over sound files; returns their number."""
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("fork")) as pool:
        return sum(1 for _ in pool.map(bare, members, chunksize=16))


def timed(function: Callable[[], object]) -> float:
    """Return the seconds a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def benchmark_prepare(num_runs: int = 3) -> str:
    """Return a table row per corpus: rates of prepare and of the bare loop, and their ratio."""
    num_workers = usable_cores()
    writers: dict[str, Callable[[Path], object]] = {
        "ravdess": lambda raw: write_ravdess(raw, layout="actors"),
        "crema_d": lambda raw: write_crema_d(raw, actors=range(1001, 1051), layout="flat", defects=False),
        "esd": lambda raw: write_esd(raw, speakers=ESD_TRAINING_SPEAKERS, numbers=range(51, 351), defects=False),
        "msp_podcast": lambda raw: write_msp_podcast(raw, num_clips=4_000, num_speakers=50, defects=False),
    }
    rows = []
    for corpus, write in writers.items():
        bare_s, prepare_s = [], []
        with tempfile.TemporaryDirectory() as scratch:
            raw = Path(scratch, "raw")
            write(raw)
            wavs = [member for member in list_members([raw]) if member.file_name.endswith(".wav")]
            bare_loop(wavs, num_workers)
            for run in range(num_runs):
                out = Path(scratch, f"out{run}")
                bare_s.append(timed(lambda wavs=wavs: bare_loop(wavs, num_workers)))  # type: ignore[misc]
                begin = time.perf_counter()
                num_clips = prepare(corpus, raw, out, num_workers=num_workers, progress=False).num_clips
                prepare_s.append(time.perf_counter() - begin)
        cells = [
            f"{corpus}, {len(wavs):,} files, {num_clips:,} rows",
            f"{num_clips / statistics.median(prepare_s):.0f} clips/s",
            f"{len(wavs) / statistics.median(bare_s):.0f} clips/s",
            f"{statistics.median(bare_s) / len(wavs) / (statistics.median(prepare_s) / num_clips):.2f}",
            f"{machine()}, {num_workers} processes",
            datetime.date.today().isoformat(),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def benchmark_loader(num_batches: int = 200) -> str:
    """Return a table row: how fast laid-out micro-batches leave the loader of one process, and their padding.

    Four corpora of very different size, ten emotions each, balanced; conversations of 10 to 80 s of random codes, all
    32 codebooks of the real Mimi, with words and turns: 210 MB, more than the loader keeps in memory.
    """
    layout = Layout((0, 0, *[1] * 7, 0, *[1] * 7), 8, 8, 3, 0, text_card=32_000, card=2048)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer.model")
        write_tiny_tokenizer(tokenizer)
        tokenize = SentencePieceProcessor(str(tokenizer)).encode
        sources = []
        for corpus, size in {"ravdess": 10, "crema_d": 30, "esd": 60, "msp_podcast": 200}.items():
            windows = [
                RandomWindow(emotion, int(rng.integers(125, 1000))) for emotion in EMOTIONS for _ in range(size)
            ]
            write_random_codes(Path(scratch, corpus), windows, num_codebooks=32)
            sources.append(Source(str(Path(scratch, corpus))))
        config = DatasetConfig(sources=sources)
        table = training_table(config, None)
        loader = MixtureLoader(table, layout, partial(lay_out, layout=layout, tokenize=tokenize), config, seed=0)
        batches = loader.batches()
        next(batches)
        num_frames = num_padded = 0
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for batch in islice(batches, num_batches):
            padded = int((batch.codes[:, 1] == NO_TOKEN).sum())
            num_padded += padded
            num_frames += batch.codes[:, 1].numel() - padded
        duration_s = max(time.perf_counter() - begin, time.process_time() - begin_cpu)
        begin = time.perf_counter()
        next(loader.batches(start=3_000))
        skip_s = time.perf_counter() - begin
    cells = [
        f"loader, {len(table)} windows, {len(loader.groups)} groups of 4 corpora, {num_batches} batches of 8 x 80 s",
        f"{num_frames / FRAME_RATE / duration_s:,.0f} s of audio per second and core",
        f"{num_padded / (num_frames + num_padded):.1%}",
        f"{skip_s:.1f} s",
        machine(),
        datetime.date.today().isoformat(),
    ]
    return f"| {' | '.join(cells)} |"


BENCHMARKS: dict[str, tuple[str, Callable[[], str]]] = {
    "prepare": (
        "corpus | prepare | bare loop | ratio | machine | date",
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
