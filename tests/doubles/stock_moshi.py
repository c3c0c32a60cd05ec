"""Moshi as the library `moshi` builds, adapts and runs it, for comparison with ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.models import loaders
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel


def random_moshi(
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    arguments: dict[str, Any] | None = None,
    **more: Any,
) -> LMModel:
    """Return a language model with random weights.

    Args:
        arguments: of `LMModel`; those of Moshi 7B by default.
        more: overrides of single arguments.
    """
    arguments = dict(loaders._lm_kwargs) if arguments is None else arguments
    return loaders.get_moshi_lm(None, lm_kwargs=arguments, device=device, dtype=dtype, lm_kwargs_overrides=more)


def random_mimi(device: str | torch.device) -> MimiModel:
    """Return a Mimi with random weights."""
    return loaders.get_mimi(None, device=device)


def with_lora(lm: LMModel, weights: Path, rank: int, scaling: float) -> LMModel:
    """Adapt a model as `moshi.server --no_fuse_lora` does."""
    return loaders.get_lora_moshi(lm, weights, rank, scaling, dtype=lm.dtype, device=lm.device, fuse_lora=False).eval()


def bare_loop(lm: LMModel, mimi: MimiModel, frames: Sequence[np.ndarray], num_warm_up: int) -> Callable[[], float]:
    """Return the loop of `moshi.server` without network, text and Opus, which returns its seconds per frame.

    A frame is encoded, stepped and decoded, and its audio copied to the CPU.
    """
    mimi.set_num_codebooks(lm.dep_q)
    generator = LMGen(lm)
    mimi.streaming_forever(1)
    generator.streaming_forever(1)

    @torch.no_grad()
    def run() -> float:
        mimi.reset_streaming()
        generator.reset_streaming()
        for number, frame in enumerate((*frames[:num_warm_up], *frames)):
            if number == num_warm_up:
                begin = time.perf_counter()
            tokens = generator.step(mimi.encode(torch.from_numpy(frame).to(lm.device)[None, None]))
            if tokens is not None:
                mimi.decode(tokens[:, 1:]).cpu().numpy()
                tokens[0, 0, 0].item()
        return (time.perf_counter() - begin) / len(frames)

    return run
