"""Moshi with an adapter of random weights, in the place of a trained one."""

import torch

from hf_csm.models.moshi.lora import adapter_parameters, add_lora
from hf_csm.models.moshi.model import load_moshi


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomize(model, *, std=0.1, seed=0):
    """Give the adapter random weights; return the model."""
    for number, weight in enumerate(adapter_parameters(model)):
        torch.nn.init.normal_(weight, std=std, generator=torch.Generator().manual_seed(seed + number))
    return model


def random_adapter(
    base, *, names="all-linear", rank=4, alpha=6, std=0.1, seed=0, dtype=torch.float32, gradient_checkpointing=False
):
    """Load a base with an adapter of random weights, in eval mode."""
    model = load_moshi(base, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    add_lora(model, rank=rank, alpha=alpha, target_modules=names, seed=seed)
    return randomize(model, std=std, seed=seed).eval()
