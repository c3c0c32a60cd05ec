"""The weighted loss and its sums by stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_csm.models.family import TokenNLL


def token_weights(masks: torch.Tensor, stream_weights: Sequence[float]) -> torch.Tensor:
    """Return the weight `[B, K, T]` of each token in the loss, float32; 0 for tokens that are no target.

    Args:
        masks: bool `[G, B, K, T]`, the targets of each stream that is logged separately.
        stream_weights: weight of a target of each, `G` numbers.
    """
    return torch.einsum("g,gbkt->bkt", torch.tensor(stream_weights, device=masks.device), masks.float())


def weighted_sum(output: TokenNLL, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of the negative log-likelihoods, a scalar, to be divided by the sum of all weights.

    Divide by the weights of the whole optimizer step, over its micro-batches and processes: dividing each micro-batch
    by its own would give a short, mostly padded window the same weight as a full one.
    """
    assert output.nll.shape == weights.shape, (output.nll.shape, weights.shape)
    assert not (weights.bool() & ~output.mask).any(), "a token has a weight but the model does not predict it"
    return (output.nll * weights).sum()


def stream_sums(output: TokenNLL, masks: torch.Tensor) -> torch.Tensor:
    """Return `[2, G]`: the sum of negative log-likelihoods and the number of targets of each stream in `masks`."""
    nll = output.nll.detach()
    sums = torch.stack([(nll * mask).sum() for mask in masks])
    return torch.stack([sums, masks.sum(dim=(1, 2, 3)).to(sums)])


def stream_means(names: Sequence[str], totals: torch.Tensor, prefix: str = "") -> dict[str, float]:
    """Return the mean of each named stream that has targets, in nats.

    Args:
        totals: flattened `stream_sums`, `[2 * G]`.
    """
    sums, counts = totals.view(2, -1)
    return {
        f"{prefix}{name}": float(total / count)
        for name, total, count in zip(names, sums, counts, strict=True)
        if count > 0
    }
