"""Measure what serving costs over a bare loop of `LMGen.step` and Mimi, with random weights.

    OMP_NUM_THREADS=1 NO_TORCH_COMPILE=1 python recipes/benchmarks/serving.py     # a tiny model on CPU, and the server
    python recipes/benchmarks/serving.py --model 7b --device cuda                 # the engine alone, at Moshi's size

Each measurement stands beside one of the bare loop in the same run, pair after pair; the ratio is the pairs' median.
Then it shows how many conversations hold real time. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired_timing import Measure, in_pairs, machine
from safetensors.torch import save_file

from hf_csm.models.family import RuntimeAdapter
from hf_csm.models.moshi.checkpoint import find_checkpoint, load_mimi
from hf_csm.models.moshi.engine import Engine
from hf_csm.models.moshi.lora import linear_paths
from hf_csm.models.moshi.runtime_lora import add_adapters
from hf_csm.models.moshi.tiny import write_tiny_moshi
from hf_csm.units import FRAME_RATE, SAMPLES_PER_FRAME
from tests.doubles.server import ServerProcess, converse
from tests.doubles.stock_moshi import bare_loop, random_mimi, random_moshi, with_lora


NUM_WARM_UP = 10
RANK, SCALING = 64, 2.0
OVERHEAD_BAR = 1.05

Load = Callable[[str], tuple[Any, Any]]
"""Returns language model and Mimi on a device."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "7b"), default="tiny", help="default: tiny")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--frames", type=int, default=100, help="frames of a measurement (default: 100)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of measurements (default: 7)")
    options = parser.parse_args()
    frames = speech(options.frames)
    with tempfile.TemporaryDirectory() as folder:
        load = tiny(Path(folder) / "base") if options.model == "tiny" else moshi_7b
        print(f"{machine()}, {options.device}, model {options.model}, {datetime.date.today().isoformat()};")
        print(f"{options.pairs} pairs of {options.frames} frames.\n")
        print("| what | ms a frame | bare loop | ratio | bar 1.05 |\n|---|---|---|---|---|")
        lm, mimi = load(options.device)
        bare = bare_loop(*load(options.device), frames, NUM_WARM_UP)
        show("engine, one slot", in_pairs(engine_loop(Engine(lm, mimi), frames), bare, options.pairs))
        weights = Path(folder) / "lora.safetensors"
        write_adapter(lm, weights)
        del lm, mimi
        lm, mimi = load(options.device)
        strengths = add_adapters(lm, [RuntimeAdapter("random", weights, RANK, SCALING)], num_slots=1)
        strengths.set(0, 0, 1.0)
        steered = engine_loop(Engine(lm, mimi, strengths=strengths), frames)
        lm, mimi = load(options.device)
        unfused = bare_loop(with_lora(lm, weights, RANK, SCALING), mimi, frames, NUM_WARM_UP)
        show(
            f"adapter of rank {RANK}; bare loop with moshi's LoRA, not fused",
            in_pairs(steered, unfused, options.pairs),
        )
        show("the same; bare loop of the base, as with LoRA fused", in_pairs(steered, bare, options.pairs))
        del unfused, steered
        if options.model == "tiny":
            serve(Path(folder), bare, frames, options.pairs)
        del lm, mimi, bare
        slots(load, options.device, frames)
        if options.model == "tiny":
            conversations(Path(folder))


def tiny(folder: Path) -> Load:
    """Write a tiny Moshi and return its `Load`."""
    base = find_checkpoint(str(write_tiny_moshi(folder)))
    return lambda device: (base.get_moshi(device=device, dtype=torch.float32), load_mimi(base, device))


def moshi_7b(device: str) -> tuple[Any, Any]:
    """Return a model of Moshi's size with random weights."""
    return random_moshi(device), random_mimi(device)


def speech(num_frames: int) -> list[np.ndarray]:
    """Return frames of noise."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=(num_frames, SAMPLES_PER_FRAME))
    return list(noise.astype(np.float32))


def engine_loop(engine: Engine, frames: Sequence[np.ndarray]) -> Measure:
    """Return a loop that steps all slots of `engine` together."""
    engine.warm_up()

    def run() -> float:
        for slot in range(engine.num_slots):
            engine.reset(slot)
        for number, frame in enumerate((*frames[:NUM_WARM_UP], *frames)):
            if number == NUM_WARM_UP:
                begin = time.perf_counter()
            engine.step(dict.fromkeys(range(engine.num_slots), frame))
        return (time.perf_counter() - begin) / len(frames)

    return run


def show(what: str, measured: tuple[float, float, float]) -> None:
    """Print a row."""
    one, other, ratio = measured
    verdict = "holds" if ratio <= OVERHEAD_BAR else "FAILED"
    print(f"| {what} | {1000 * one:.2f} | {1000 * other:.2f} | {ratio:.3f} | {verdict} |", flush=True)


def write_adapter(lm: Any, path: Path) -> None:
    """Write random weights for every linear layer of `lm`."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name in linear_paths(lm):
        layer = lm.get_submodule(name)
        weights[f"{name}.lora_A.weight"] = 0.01 * torch.randn(RANK, layer.in_features, generator=generator)
        weights[f"{name}.lora_B.weight"] = 0.01 * torch.randn(layer.out_features, RANK, generator=generator)
    save_file(weights, path)


def serve(folder: Path, bare: Measure, frames: Sequence[np.ndarray], num_pairs: int) -> None:
    """Measure the server with one client that sends as fast as it may, and how soon the first audio comes."""
    audio = np.concatenate(frames)
    ours = ["serve", str(folder / "base"), "--device", "cpu", "--dtype", "float32"]
    with ServerProcess("hf_csm.cli", ours, log=folder / "server.log") as server:
        show("server and client, WebSocket, Opus both ways", in_pairs(client_loop(server, audio), bare, num_pairs))
        first = asyncio.run(converse(server.port, audio[: 20 * SAMPLES_PER_FRAME], pace_s=0.3, num_frames=10))
    print(f"\nFirst audio after {first.num_frames_before_audio} frames had been sent; the loop's own is after 2.\n")


def client_loop(server: ServerProcess, audio: np.ndarray) -> Measure:
    """Return a conversation; its first frames, which set up the connection, count like all others."""
    num_frames = len(audio) // SAMPLES_PER_FRAME - 6

    def run() -> float:
        begin = time.perf_counter()
        asyncio.run(converse(server.port, audio, num_frames=num_frames))
        return (time.perf_counter() - begin) / num_frames

    return run


def slots(load: Load, device: str, frames: Sequence[np.ndarray]) -> None:
    """Print what a step takes with several slots that all speak."""
    print("| slots | ms a step | of the 80 ms of a frame |\n|---|---|---|")
    for num_slots in (1, 2, 4, 8):
        engine = Engine(*load(device), num_slots=num_slots)
        step_s = statistics.median(engine_loop(engine, frames)() for _ in range(3))
        print(f"| {num_slots} | {1000 * step_s:.1f} | {100 * step_s * FRAME_RATE:.0f} % |", flush=True)
        engine.close()


def conversations(folder: Path, num_slots: int = 8, num_frames: int = 250) -> None:
    """Print how far behind 8 clients of the server are that speak at the same time, in real time."""
    arguments = ["serve", folder / "base", "--device", "cpu", "--dtype", "float32", "--slots", num_slots]
    audio = np.concatenate(speech(num_frames))

    async def all_at_once(port: int) -> list[list[float]]:
        pace = 1 / FRAME_RATE
        return await asyncio.gather(
            *(converse_in_time(port, audio, start_s=number * pace / num_slots) for number in range(num_slots))
        )

    async def converse_in_time(port: int, audio: np.ndarray, start_s: float) -> list[float]:
        await asyncio.sleep(start_s)
        heard = await converse(port, audio, pace_s=1 / FRAME_RATE)
        return heard.lags_s

    with ServerProcess("hf_csm.cli", [str(argument) for argument in arguments], log=folder / "slots.log") as server:
        lags = sorted(lag for client in asyncio.run(all_at_once(server.port)) for lag in client)
    median, worst = lags[len(lags) // 2], lags[-1]
    p99 = lags[int(0.99 * len(lags))]
    seconds = num_frames / FRAME_RATE
    print(f"\n{num_slots} clients of one server at once, {seconds:.0f} s each in real time: a frame's answer came")
    print(f"{1000 * median:.0f} ms after it (99 %: {1000 * p99:.0f} ms, worst: {1000 * worst:.0f} ms), of which")
    print(f"{1000 / FRAME_RATE:.0f} ms are the delay of the model.")


if __name__ == "__main__":
    main()
