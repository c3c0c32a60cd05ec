"""Loss on the validation split, with the adapter and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from hf_csm.config import LossConfig
from hf_csm.mixture.collate import Batch
from hf_csm.models.family import Family, SpeechLM
from hf_csm.training.loss import stream_means, stream_sums, token_weights, weighted_sum


if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate_loss(
    family: Family,
    model: SpeechLM,
    batches: Sequence[list[int]],
    read: Callable[[list[int]], Batch],
    config: LossConfig,
    accelerator: Accelerator,
    prefix: str,
) -> dict[str, float]:
    """Return the weighted loss and the mean negative log-likelihood of each stream, in nats.

    The sums run over all windows of all processes, and are divided once.

    Args:
        batches: rows of every batch; this process takes its share.
        read: returns the batch of some rows.
        prefix: of the names in the result, such as `eval_`.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2 + 2 * len(family.stream_names), dtype=torch.float64, device=accelerator.device)
    for rows in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = read(rows).to(accelerator.device)
        masks = family.stream_masks(batch.codes, batch.num_given, model.layout)
        weights = token_weights(masks, family.stream_weights(config))
        with accelerator.autocast():
            output = model(batch.codes)
        totals[:2] += torch.stack([weighted_sum(output, weights), weights.sum()]).double()
        totals[2:] += stream_sums(output, masks).flatten().double()
    totals = accelerator.reduce(totals, reduction="sum").cpu()
    model.train(was_training)
    return {f"{prefix}loss": float(totals[0] / totals[1])} | stream_means(family.stream_names, totals[2:], prefix)
