"""What every model family promises the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hf_csm.units import Frames


NO_TOKEN = -1
"""No token here: nothing is fed to the model and nothing is predicted, in every stream."""


@dataclass(frozen=True)
class Layout:
    """What a model family tells the data about its streams. Stream 0 is text, then audio, Moshi's channel first.

    Attributes:
        delays: frames by which the model shifts each stream, one per stream, `[K]`.
        num_predicted_codebooks: codebooks of Moshi's channel that the model predicts: streams 1 to this number.
        num_user_codebooks: codebooks of the user's channel that the model hears: the streams after those.
        text_padding_id: text token of a frame in which no word begins or goes on.
        end_of_text_padding_id: text token of the frame before a word begins.
        text_card: number of text tokens.
        card: number of codes of a codebook.
    """

    delays: tuple[int, ...]
    num_predicted_codebooks: int
    num_user_codebooks: int
    text_padding_id: int
    end_of_text_padding_id: int
    text_card: int
    card: int

    @property
    def num_streams(self) -> int:
        """K: text and the audio streams of both channels."""
        return 1 + self.num_predicted_codebooks + self.num_user_codebooks

    @property
    def num_predicted_streams(self) -> int:
        """Streams with a loss, which are the first ones: text and Moshi's own codebooks."""
        return 1 + self.num_predicted_codebooks

    @property
    def max_delay(self) -> int:
        """Frames of `NO_TOKEN` that a window must end with so that no stream loses a target to its delay."""
        return max(self.delays)


@dataclass(frozen=True)
class Window:
    """One conversation as the model sees it.

    Attributes:
        id: the row it comes from.
        emotion: target emotion.
        codes: int64 `[K, T]`; `NO_TOKEN` where there is none.
        num_given: frames at the start of the text stream that are given, not predicted: the emotion prefix.
    """

    id: str
    emotion: str
    codes: np.ndarray
    num_given: Frames


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
