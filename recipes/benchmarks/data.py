"""Rates of the data path, against what its libraries do bare. Each command prints a Markdown table.

    python recipes/benchmarks/data.py prepare
    python recipes/benchmarks/data.py loader

`prepare` writes 1,440 to 4,100 synthetic clips of each corpus and compares `hf-csm prepare` with a loop that only
decodes, resamples and encodes FLAC, over the same files with as many processes. Memory is in `scale.py`.
`loader` measures how fast laid-out micro-batches leave a balanced mixture of four corpora.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
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
from paired_timing import in_pairs, print_header, print_row, timed
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
from hf_csm.testing.ravdess import write_ravdess
from hf_csm.units import FRAME_RATE, SAMPLE_RATE
from tests.doubles.codes import RandomWindow, write_random_codes
from tests.doubles.crema_d import write_crema_d
from tests.doubles.esd import write_esd
from tests.doubles.msp_podcast import write_msp_podcast


ESD_TRAINING_SPEAKERS = (*range(1, 7), 11, 12, 13, 15, 16, 19)


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


def benchmark_prepare(tiny: bool) -> None:
    """Print a row per corpus: rates of prepare and of the bare loop, and their ratio."""
    num_workers = usable_cores()
    actors, speakers, num_clips = (2, 1, 40) if tiny else (50, 12, 4_000)
    writers: dict[str, Callable[[Path], object]] = {
        "ravdess": lambda raw: write_ravdess(raw, actors=range(1, min(24, actors) + 1), layout="actors"),
        "crema_d": lambda raw: write_crema_d(raw, actors=range(1001, 1001 + actors), layout="flat", defects=False),
        "esd": lambda raw: write_esd(
            raw, speakers=ESD_TRAINING_SPEAKERS[:speakers], numbers=range(51, 351), defects=False
        ),
        "msp_podcast": lambda raw: write_msp_podcast(raw, num_clips=num_clips, num_speakers=50, defects=False),
    }
    print_header("corpus", "prepare", "bare loop", "ratio")
    for corpus, write in writers.items():
        with tempfile.TemporaryDirectory() as scratch:
            raw = Path(scratch, "raw")
            write(raw)
            wavs = [member for member in list_members([raw]) if member.file_name.endswith(".wav")]
            num_rows = 0

            def prepare_once() -> float:
                nonlocal num_rows
                out = Path(tempfile.mkdtemp(dir=scratch), "out")  # noqa: B023
                begin = time.perf_counter()
                num_rows = prepare(corpus, raw, out, num_workers=num_workers, progress=False).num_clips  # noqa: B023
                return (time.perf_counter() - begin) / num_rows

            def bare_once() -> float:
                return timed(lambda: bare_loop(wavs, num_workers)) / len(wavs)  # noqa: B023

            bare_once()
            prepare_s, bare_s, ratio = in_pairs(prepare_once, bare_once, 1 if tiny else 3)
        print_row(
            f"{corpus}, {len(wavs):,} files, {num_rows:,} rows",
            f"{1 / prepare_s:.0f} clips/s",
            f"{1 / bare_s:.0f} clips/s",
            f"{1 / ratio:.2f}",
        )


def benchmark_loader(tiny: bool) -> None:
    """Print a row: how fast laid-out micro-batches leave the loader of one process, and their padding.

    Four corpora of very different size, ten emotions each, balanced; conversations of 10 to 80 s of random codes, all
    32 codebooks of the real Mimi, with words and turns: 210 MB, more than the loader keeps in memory.
    """
    layout = Layout((0, 0, *[1] * 7, 0, *[1] * 7), 8, 8, 3, 0, text_card=32_000, card=2048)
    rng = np.random.default_rng(0)
    num_batches, num_skipped, divisor = (10, 100, 10) if tiny else (200, 3_000, 1)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer.model")
        write_tiny_tokenizer(tokenizer)
        tokenize = SentencePieceProcessor(str(tokenizer)).encode
        sources = []
        for corpus, size in {"ravdess": 10, "crema_d": 30, "esd": 60, "msp_podcast": 200}.items():
            windows = [
                RandomWindow(emotion, int(rng.integers(125, 1000)))
                for emotion in EMOTIONS
                for _ in range(size // divisor)
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
        skip_s = timed(lambda: next(loader.batches(start=num_skipped)))
    print_header("what", "rate", "padding", f"to skip {num_skipped:,} micro-batches")
    print_row(
        f"loader, {len(table)} windows, {len(loader.groups)} groups of 4 corpora, {num_batches} batches of 8 x 80 s",
        f"{num_frames / FRAME_RATE / duration_s:,.0f} s of audio per second and core",
        f"{num_padded / (num_frames + num_padded):.1%}",
        f"{skip_s:.1f} s",
    )


BENCHMARKS = {"prepare": benchmark_prepare, "loader": benchmark_loader}


def main() -> None:
    """Run the named benchmarks, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)}; everything by default")
    parser.add_argument("--tiny", action="store_true", help="in seconds, to see that it works")
    options = parser.parse_args()
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    for name in options.names or BENCHMARKS:
        BENCHMARKS[name](options.tiny)


if __name__ == "__main__":
    main()
