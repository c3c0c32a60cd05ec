"""Measure a training step of Moshi 7B with LoRA on the GPU at hand, with random weights: nothing is downloaded.

    python recipes/benchmarks/training.py            # Moshi 7B: 100 s x 16 and 80 s x 1
    python recipes/benchmarks/training.py --tiny     # the same on CPU with a tiny model, in seconds

Prints one row of a Markdown table per setting. A step is forward, backward and AdamW on the adapter, with gradient
checkpointing. A frame is 9 predicted tokens: text and 8 codebooks.

The share of the ceiling is model FLOPs a second over those of the largest bf16 matrix product measured in the same
run. Model FLOPs of a step, for F frames in windows of T:

    4 F P        the frozen linear weights P: forward, and gradients of their inputs
    6 F A        the adapter's A weights: forward, gradients of inputs and of weights
    6 F T d L    causal attention of the L temporal layers of width d: half of 12 F T d L

What gradient checkpointing computes twice counts once; norms, embeddings and attention over 8 codebooks do not count.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import resource
from dataclasses import dataclass

import torch
from paired_timing import bare_step, timed

from hf_csm.models.moshi.lora import adapter_parameters, add_lora
from hf_csm.models.moshi.model import MoshiLM
from hf_csm.models.moshi.tiny import lm_arguments, tiny_config
from hf_csm.units import seconds_to_frames
from tests.doubles.stock_moshi import random_moshi


TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS_PER_FRAME = 9
HEADER = (
    "| device | torch | date | model | seconds x batch | tokens/s | s/step | TFLOP/s | ceiling TFLOP/s | share "
    "| peak GiB |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    duration_s: float
    batch_size: int


@dataclass(frozen=True)
class Measurement:
    """Of one setting."""

    step_s: float
    flops: float
    peak_bytes: int


SETTINGS = (Setting(100, 16), Setting(80, 1))
TINY_SETTINGS = (Setting(10, 4), Setting(8, 1))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPU instead of Moshi 7B on a GPU")
    parser.add_argument("--rank", type=int, default=128, help="of the adapter")
    parser.add_argument("--steps", type=int, default=3, help="steps measured, after one that is not")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.exit(1, "There is no CUDA device.\nUse --tiny for a tiny model on CPU.\n")
    device = torch.device("cpu" if options.tiny else "cuda")
    ceiling = matmul_flops_per_s(device)
    print(HEADER)
    for setting in TINY_SETTINGS if options.tiny else SETTINGS:
        print(row(setting, device, options.rank, options.steps, ceiling, tiny=options.tiny), flush=True)


def row(setting: Setting, device: torch.device, rank: int, num_steps: int, ceiling: float, *, tiny: bool) -> str:
    """Measure `setting` and return its row; running out of memory is a result like any other."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    model_name = "tiny" if tiny else "Moshi 7B"
    start = (
        f"| {name} | {torch.__version__} | {datetime.date.today()} | {model_name}, rank {rank} "
        f"| {setting.duration_s:g} x {setting.batch_size} "
    )
    try:
        measured = measure(setting, device, rank, num_steps, tiny=tiny)
    except torch.OutOfMemoryError:
        return start + f"| out of memory | | | {ceiling / 1e12:.3g} | | over {device_gib(device):.1f} |"
    finally:
        release(device)
    tokens = seconds_to_frames(setting.duration_s) * setting.batch_size * TOKENS_PER_FRAME
    reached = measured.flops / measured.step_s
    return start + (
        f"| {tokens / measured.step_s:,.0f} | {measured.step_s:.3f} | {reached / 1e12:.3g} | {ceiling / 1e12:.3g} "
        f"| {100 * reached / ceiling:.1f} % | {measured.peak_bytes / 2**30:.1f} |"
    )


def measure(setting: Setting, device: torch.device, rank: int, num_steps: int, *, tiny: bool) -> Measurement:
    """Build the model and time its training step, the fastest of `num_steps`."""
    model = build_model(device, rank, tiny=tiny)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=4e-6)
    num_frames = seconds_to_frames(setting.duration_s)
    codes = random_codes(model, setting.batch_size, num_frames).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bare_step(model, optimizer, codes)
    step_s = min(timed(lambda: bare_step(model, optimizer, codes), device) for _ in range(num_steps))
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measurement(step_s, step_flops(model, setting.batch_size, num_frames), peak_bytes)


def build_model(device: torch.device, rank: int, *, tiny: bool) -> MoshiLM:
    """Return Moshi with random weights, built on `device`, in an adapter, ready to train."""
    arguments = None
    if tiny:
        sizes = {"dim": 64, "num_layers": 2, "num_heads": 4, "depformer_dim": 32, "depformer_num_layers": 2}
        arguments = lm_arguments(tiny_config(**sizes, card=128, text_card=512, context=3000))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    lm = random_moshi(device, dtype, arguments, gradient_checkpointing=True)
    model = add_lora(MoshiLM(lm), rank=rank, alpha=2 * rank, target_modules=TARGET_MODULES)
    return model.train()


def random_codes(model: MoshiLM, batch_size: int, num_frames: int) -> torch.Tensor:
    """Return codes `[B, K, T]` without padding but for the delay at the end."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, model.layout.num_streams, num_frames)
    codes = torch.randint(model.layout.card, shape, generator=generator)
    codes[..., -model.layout.max_delay :] = -1
    return codes


def step_flops(model: MoshiLM, batch_size: int, num_frames: int) -> float:
    """Return the model FLOPs of one step; see the top of this file for the formula."""
    adapter = sum(weight.numel() for weight in adapter_parameters(model))
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    )
    transformer = model.lm.get_base_model().transformer
    attention = num_frames * transformer.layers[0].self_attn.embed_dim * len(transformer.layers)
    return batch_size * num_frames * (4.0 * linear + 6.0 * adapter + 6.0 * attention)


def matmul_flops_per_s(device: torch.device) -> float:
    """Return the FLOPs a second of a large square matrix product: bf16 on a GPU, float32 on CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / min(timed(lambda: left @ right, device) for _ in range(10))


def device_gib(device: torch.device) -> float:
    """Return the size of the device's memory."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0


def release(device: torch.device) -> None:
    """Give the memory of the last setting back, also after it ran out."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
