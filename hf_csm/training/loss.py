"""Which token counts how much, and how losses are told apart in the logs."""

from __future__ import annotations

import torch

from hf_csm.config import LossConfig
from hf_csm.mixture.collate import Batch
from hf_csm.models.family import NO_TOKEN, Layout, TokenNLL


STREAMS = ("text_words", "text_padding", "codebook_0", "codebooks_rest")
"""Groups of targets whose mean negative log likelihood is logged by itself, in nats."""


def stream_masks(batch: Batch, layout: Layout) -> torch.Tensor:
    """Return bool `[4, B, K, T]`: the targets of each group in `STREAMS`; no target is in two.

    A target is a token that is there and that the model predicts: not the user's, not the given prefix.
    """
    is_target = batch.codes != NO_TOKEN
    is_target[:, layout.num_predicted_streams :] = False
    frames = torch.arange(batch.codes.shape[2], device=batch.codes.device)
    is_target[:, 0] &= frames >= batch.num_given[:, None]

    text = batch.codes[:, 0]
    is_padding = (text == layout.text_padding_id) | (text == layout.end_of_text_padding_id)
    masks = torch.zeros(len(STREAMS), *batch.codes.shape, dtype=torch.bool, device=batch.codes.device)
    masks[0, :, 0] = is_target[:, 0] & ~is_padding
    masks[1, :, 0] = is_target[:, 0] & is_padding
    masks[2, :, 1] = is_target[:, 1]
    masks[3, :, 2:] = is_target[:, 2:]
    return masks


def token_weights(masks: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Return the weight `[B, K, T]` of each token in the loss, float32; 0 where there is no target."""
    weights = torch.tensor(
        [
            config.text_weight,
            config.text_weight * config.text_padding_weight,
            config.first_codebook_weight,
            config.other_codebooks_weight,
        ],
        device=masks.device,
    )
    return torch.einsum("s,sbkt->bkt", weights, masks.float())


def weighted_sum(output: TokenNLL, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of the negative log likelihoods, a scalar, to be divided by the sum of all weights.

    Divide by the weights of the whole optimizer step, over its micro-batches and processes: dividing each micro-batch
    by its own would let a short, mostly padded window count as much as a full one.
    """
    assert output.nll.shape == weights.shape, (output.nll.shape, weights.shape)
    assert not (weights.bool() & ~output.mask).any(), "a token has a weight but the model does not predict it"
    return (output.nll * weights).sum()


def stream_sums(output: TokenNLL, masks: torch.Tensor) -> torch.Tensor:
    """Return `[2, 4]`: the sum of negative log likelihoods and the number of targets of each group in `STREAMS`."""
    nll = output.nll.detach()
    sums = torch.stack([(nll * mask).sum() for mask in masks])
    return torch.stack([sums, masks.sum(dim=(1, 2, 3)).to(sums)])
