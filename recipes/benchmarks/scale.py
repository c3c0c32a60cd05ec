"""A large corpus, killed ten times: does memory stay flat, are the rows the same, how big are the files?

    python recipes/benchmarks/scale.py --folder /tmp/scale --clips 20000

Writes a synthetic MSP-Podcast, prepares and encodes it in one go, then again with `kill -9` of all its processes at
ten random moments, and compares every file. In place of Mimi, encoding has a stand-in that takes no time and gives 32
codebooks, a function of the samples; all else is as it is. Memory is the largest resident set of the main
process and of a worker, watched four times a second, beside that of a tenth of the clips. Prints rows of Markdown
tables. The folder keeps the corpus (about 160 KB a clip), so that a second run starts at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from paired_timing import print_header, print_row

from hf_csm.units import SAMPLES_PER_FRAME
from tests.doubles.msp_podcast import write_msp_podcast


@dataclass
class Run:
    """Result of a command.

    Attributes:
        duration_s: wall time.
        main_mib: largest resident set of the first process.
        worker_mib: largest resident set of any other.
        is_done: it ended by itself, without error.
    """

    duration_s: float
    main_mib: float
    worker_mib: float
    is_done: bool


def run(command: list[str], kill_after_s: float = float("inf")) -> Run:
    """Run a command, watch its memory, and kill it with all its processes after some seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    main_mib = worker_mib = 0.0
    while process.poll() is None:
        if time.perf_counter() - begin > kill_after_s:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
        try:
            first = psutil.Process(process.pid)
            main_mib = max(main_mib, first.memory_info().rss / 2**20)
            for child in first.children(recursive=True):
                worker_mib = max(worker_mib, child.memory_info().rss / 2**20)
        except psutil.NoSuchProcess:
            pass
        time.sleep(min(0.25, max(0.0, kill_after_s - (time.perf_counter() - begin))))
    assert process.stderr is not None
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()[-2_000:]}")
    return Run(time.perf_counter() - begin, main_mib, worker_mib, process.returncode == 0)


def killed_runs(command: list[str], straight_s: float, num_kills: int, seed: int) -> int:
    """Kill a command at random moments until it has been killed often enough, then let it end; return the kills."""
    rng = random.Random(seed)
    for kill in range(num_kills):
        if run(command, kill_after_s=rng.uniform(0.06, 0.14) * straight_s).is_done:
            return kill
    run(command)
    return num_kills


def encode_without_mimi(prepared: Path, out: Path) -> None:
    """Encode a prepared corpus with the stand-in."""
    import torch

    from hf_csm.encode.run import encode

    class StandIn:
        num_codebooks = 32
        device = torch.device("cpu")

        def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
            factors = 2_654_435_761 * np.arange(1, 2 * self.num_codebooks, 2)
            found = []
            for waveform in waveforms:
                level = np.abs(waveform.reshape(2, -1, SAMPLES_PER_FRAME)).sum(axis=2)
                number = (level * 1e4).astype(np.int64)[:, None, :]
                found.append(((number * factors[None, :, None] >> 7) % 2048).astype(np.int16))
            return found

    encode(prepared, out, StandIn(), "stand-in", progress=False)


def hashes(table: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a table."""
    found = {}
    for path in sorted(table.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            found[path.relative_to(table).as_posix()] = digest.hexdigest()
    return found


def file_sizes(table: Path) -> str:
    """Return how many files the cells that are cut have, and the range of their sizes."""
    sizes: dict[str, list[int]] = {}
    for path in table.glob("data/*/*.parquet"):
        sizes.setdefault(f"{path.parent.name}/{path.name.rsplit('-', 3)[0]}", []).append(path.stat().st_size)
    cut = [size for files in sizes.values() if len(files) > 1 for size in files]
    whole = [size for files in sizes.values() if len(files) == 1 for size in files]
    text = f"{len(whole)} cells in one file of up to {max(whole, default=0) / 1e6:.0f} MB"
    return f"{len(cut)} files of {min(cut) / 1e6:.0f}-{max(cut) / 1e6:.0f} MB, {text}" if cut else text


def main(arguments: list[str] | None = None) -> None:
    """Write the corpora, run every stage straight, small and killed, print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encode", nargs=2, type=Path, metavar=("PREPARED", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("scale"), help="scratch folder; raw corpora in it stay")
    parser.add_argument("--clips", type=int, default=20_000, help="default: 20000")
    parser.add_argument("--kills", type=int, default=10, help="default: 10")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--stages", nargs="+", choices=("prepare", "encode"), default=["prepare", "encode"])
    options = parser.parse_args(arguments)
    if options.encode:
        encode_without_mimi(*options.encode)
        return
    folder = options.folder
    sizes = {"small": options.clips // 10, "large": options.clips}
    for name, num_clips in sizes.items():
        if not (folder / f"raw_{name}").exists():
            beside = folder / f".raw_{name}"
            shutil.rmtree(beside, ignore_errors=True)
            write_msp_podcast(beside, num_clips=num_clips, num_speakers=max(10, num_clips // 80), defects=False)
            beside.rename(folder / f"raw_{name}")
    program = str(Path(sys.executable).parent / "hf-csm")

    columns = "stage | clips | straight | memory, main | memory, worker | killed | files equal | files"
    print_header(*columns.split(" | "))
    for stage in options.stages:

        def command(name: str, out: str, stage: str = stage) -> list[str]:
            if stage == "prepare":
                raw = str(folder / f"raw_{name}")
                return [program, "prepare", "msp_podcast", "--raw", raw, "--out", str(folder / out)]
            return [sys.executable, __file__, "--encode", str(folder / f"prepare_{name}"), str(folder / out)]

        for out in (*folder.glob(f"{stage}_*"), *folder.glob(f".{stage}_*")):
            shutil.rmtree(out)
        runs = {name: run(command(name, f"{stage}_{name}")) for name in sizes}
        seconds = runs["large"].duration_s
        num_kills = killed_runs(command("large", f"{stage}_killed"), seconds, options.kills, options.seed)
        is_equal = hashes(folder / f"{stage}_killed") == hashes(folder / f"{stage}_large")
        print_row(
            stage,
            f"{sizes['small']:,} -> {sizes['large']:,}",
            f"{seconds:.0f} s",
            " -> ".join(f"{run.main_mib:.0f}" for run in runs.values()) + " MiB",
            " -> ".join(f"{run.worker_mib:.0f}" for run in runs.values()) + " MiB",
            f"{num_kills} times",
            "yes" if is_equal else "NO",
            file_sizes(folder / f"{stage}_large"),
        )
        shutil.rmtree(folder / f"{stage}_killed")


if __name__ == "__main__":
    main()
