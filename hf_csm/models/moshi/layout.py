"""Moshi's token streams: text from word times, the emotion prefix, the audio codes; and their groups in the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_csm.config import LossConfig
from hf_csm.errors import UserError
from hf_csm.models.family import NO_TOKEN, Layout, Window
from hf_csm.units import Frames, frame_at


Word = Mapping[str, Any]
"""`word`, `start_s`, `end_s`, and in windows `channel`."""
Tokenize = Callable[[str], list[int]]
"""Text to token ids, such as a SentencePiece model's `encode`."""

STREAM_NAMES = ("text_words", "text_padding", "codebook_0", "codebooks_rest")
"""Groups of targets in the loss."""


def text_stream(words: Sequence[Word], num_frames: Frames, tokenize: Tokenize, layout: Layout) -> np.ndarray:
    """Return Moshi's inner monologue `[T]`: each word's tokens from the frame it begins in, padding elsewhere.

    The frame before a word has the end-of-padding token. A word begins after the last token of its predecessor, so no
    token is lost; `[4, 3, 0, 7, 8]` is one token at 0 s, two at 0.24 s.

    Args:
        words: words with `start_s` in seconds from the first frame, in order of time.
    """
    stream = np.full(num_frames, layout.text_padding_id, dtype=np.int64)
    next_free = 0
    for word in words:
        first = max(frame_at(word["start_s"]), next_free)
        tokens = tokenize(word["word"])[: max(num_frames - first, 0)]
        if not tokens:
            continue
        stream[first : first + len(tokens)] = tokens
        if first > 0 and stream[first - 1] == layout.text_padding_id:
            stream[first - 1] = layout.end_of_text_padding_id
        next_free = first + len(tokens)
    return stream


def lay_out(
    row: dict,
    layout: Layout,
    tokenize: Tokenize,
    *,
    prefix: str | None = None,
    max_frames: Frames | None = None,
) -> Window:
    """Turn a row of a codes table into token streams `[K, T]`: text, Moshi's codebooks, the user's codebooks.

    Args:
        row: a window row; `codes` is `[2, Q, T]`.
        prefix: text given in the first frames of the text stream, while both channels are quiet.
        max_frames: truncate the window to this length.

    Raises:
        UserError: the codes have too few codebooks, or the prefix does not fit before the first turn.
    """
    codes = np.asarray(row["codes"])[:, :, :max_frames]
    num_needed = max(layout.num_predicted_codebooks, layout.num_user_codebooks)
    if codes.ndim != 3 or codes.shape[0] != 2 or codes.shape[1] < num_needed:
        raise UserError(
            f"Window {row['id']} has codes {list(codes.shape)}; the model needs [2, {num_needed} or more, T].",
            "Encode the corpus again with this base model.",
        )
    streams = np.empty((layout.num_streams, codes.shape[2]), dtype=np.int64)
    words = sorted((word for word in row["words"] if word["channel"] == 0), key=lambda word: word["start_s"])
    streams[0] = text_stream(words, codes.shape[2], tokenize, layout)
    streams[1 : layout.num_predicted_streams] = codes[0, : layout.num_predicted_codebooks]
    streams[layout.num_predicted_streams :] = codes[1, : layout.num_user_codebooks]

    num_given = 0
    if prefix is not None:
        tokens = tokenize(prefix)
        num_given = len(tokens)
        quiet_frames = min((frame_at(turn["start_s"]) for turn in row["turns"]), default=codes.shape[2])
        if num_given >= quiet_frames:
            raise UserError(
                f"The prefix {prefix!r} takes {num_given} frames; window {row['id']} is quiet for {quiet_frames}.",
                "Encode with a longer --lead-in-s, or shorten dataset.prefix_template.",
            )
        streams[0, :num_given] = tokens
    return Window(row["id"], streams, num_given)


def stream_masks(codes: torch.Tensor, num_given: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return bool `[4, B, K, T]`: the targets of each group in `STREAM_NAMES`; no target is in two.

    A target is a token of a predicted stream, neither the user's nor of the given prefix.

    Args:
        codes: `[B, K, T]`.
        num_given: `[B]`, frames of the prefix.
    """
    is_target = codes != NO_TOKEN
    is_target[:, layout.num_predicted_streams :] = False
    frames = torch.arange(codes.shape[2], device=codes.device)
    is_target[:, 0] &= frames >= num_given[:, None]

    text = codes[:, 0]
    is_padding = (text == layout.text_padding_id) | (text == layout.end_of_text_padding_id)
    masks = torch.zeros(len(STREAM_NAMES), *codes.shape, dtype=torch.bool, device=codes.device)
    masks[0, :, 0] = is_target[:, 0] & ~is_padding
    masks[1, :, 0] = is_target[:, 0] & is_padding
    masks[2, :, 1] = is_target[:, 1]
    masks[3, :, 2:] = is_target[:, 2:]
    return masks


def stream_weights(config: LossConfig) -> tuple[float, float, float, float]:
    """Return the weight of a target of each group in `STREAM_NAMES`."""
    return (
        config.text_weight,
        config.text_weight * config.text_padding_weight,
        config.first_codebook_weight,
        config.other_codebooks_weight,
    )
