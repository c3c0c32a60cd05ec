"""What every model family promises the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from hf_csm.data.layout import Layout


@dataclass(frozen=True)
class TokenNLL:
    """Negative log likelihood of each token.

    Attributes:
        nll: `[B, K, T]`, nats, float32; 0 where `mask` is false.
        mask: `[B, K, T]`, true where the model predicts a token that is there.
    """

    nll: torch.Tensor
    mask: torch.Tensor


class SpeechLM(Protocol):
    """A conversational speech model over K token streams, text first."""

    layout: Layout

    def __call__(self, codes: torch.Tensor) -> TokenNLL:
        """Score `codes [B, K, T]` (int64, `-1` for no token), teacher forced."""
        ...
