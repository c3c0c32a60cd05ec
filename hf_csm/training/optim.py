"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from hf_csm.config import OptimizerConfig, SchedulerConfig


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the adapter's parameters."""
    return torch.optim.AdamW(list(parameters), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def learning_rate(step: int, max_steps: int, peak: float, config: SchedulerConfig) -> float:
    """Return the learning rate of an optimizer step: linear warm-up to `peak`, then half a cosine down.

    A pure function of the step, so that a resumed run needs no scheduler state.

    Args:
        step: optimizer steps taken so far, from 0.
    """
    if step < config.num_warmup_steps:
        return peak * (step + 1) / config.num_warmup_steps
    progress = (step - config.num_warmup_steps) / max(max_steps - config.num_warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
