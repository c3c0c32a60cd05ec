"""Windows to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_csm.models.family import NO_TOKEN, Layout, Window


@dataclass(frozen=True)
class Batch:
    """Padded windows.

    Attributes:
        ids: the rows they come from, `B` of them.
        codes: int64 `[B, K, T]`; `NO_TOKEN` beyond a window's end.
        num_given: int64 `[B]`, frames at the start of the text stream that have no loss.
    """

    ids: tuple[str, ...]
    codes: torch.Tensor
    num_given: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(self.ids, self.codes.to(device, non_blocking=True), self.num_given.to(device, non_blocking=True))


def collate(windows: Sequence[Window], layout: Layout) -> Batch:
    """Pad windows to the longest plus the largest delay, so that no stream loses its last targets to its delay."""
    num_frames = max(window.codes.shape[1] for window in windows) + layout.max_delay
    codes = np.full((len(windows), layout.num_streams, num_frames), NO_TOKEN, dtype=np.int64)
    for row, window in zip(codes, windows, strict=True):
        row[:, : window.codes.shape[1]] = window.codes
    return Batch(
        ids=tuple(window.id for window in windows),
        codes=torch.from_numpy(codes),
        num_given=torch.tensor([window.num_given for window in windows]),
    )
