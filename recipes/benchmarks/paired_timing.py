"""Shared by all benchmarks: timing, pairs of measurements, the rows of a Markdown table.

Importing it puts the root of the repository on the path, for `tests.doubles`.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_csm.prepare.pool import usable_cores  # noqa: E402


Measure = Callable[[], float]
"""Runs something and returns seconds."""


def machine() -> str:
    """Return the processor and the number of usable cores."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {usable_cores()} cores"


def timed(function: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Return the seconds that a call takes, until the device is done."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_pairs(one: Measure, other: Measure, num_pairs: int) -> tuple[float, float, float]:
    """Return the medians of both and of their ratio in each pair; the order alternates from pair to pair."""
    pairs = []
    for number in range(num_pairs):
        if number % 2:
            second, first = other(), one()
        else:
            first, second = one(), other()
        pairs.append((first, second))
    ones, others = zip(*pairs, strict=True)
    return statistics.median(ones), statistics.median(others), statistics.median(a / b for a, b in pairs)


def bare_step(model: Any, optimizer: torch.optim.Optimizer, codes: torch.Tensor) -> None:
    """Do a training step and nothing else: no logging, clipping, schedule or data."""
    # The adapter is float32; autocast multiplies with it in bf16, as `mixed_precision: bf16` does in training.
    autocast: Any = torch.autocast("cuda", torch.bfloat16) if codes.is_cuda else nullcontext()
    with autocast:
        scored = model(codes)
    (scored.nll.sum() / scored.mask.sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def print_header(*names: str) -> None:
    """Print the head of a table; `print_row` fills the last two columns."""
    columns = [*names, "machine", "date"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def print_row(*cells: str) -> None:
    """Print a row, with machine and date."""
    print(f"| {' | '.join([*cells, machine(), datetime.date.today().isoformat()])} |", flush=True)
