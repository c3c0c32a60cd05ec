"""Word times from the energy of a clip, for corpora without word times. Independent of model and language."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np


FRAME_S = 0.010
# A frame is voiced if it is at most this far below the loudest one, and at least this far above the noise floor.
_BELOW_PEAK_DB = 38.0
_ABOVE_FLOOR_DB = 10.0
# Pauses shorter than this are stops and weak consonants inside words.
_SHORTEST_PAUSE_S = 0.12
# Pauses of at least this length, without margins, are between words.
_SURE_PAUSE_S = 0.16
_SHORTEST_VOICED_S = 0.03
# Quiet onsets and releases are below the threshold: widen each span.
_MARGIN_S = 0.02

_VOWELS = re.compile("[aeiouyàáâãäåæèéêëìíîïòóôõöøùúûüýÿœ]+", re.IGNORECASE)


def energy_align(samples: np.ndarray, sample_rate: int, words: list[str]) -> list[dict[str, Any]]:
    """Spread words over the voiced part of a clip in proportion to their length; pauses are skipped.

    Pauses are between words: each pause attracts the nearest word border, and the words between two pauses are
    stretched to fit.

    Args:
        samples: float `[S]`.
        sample_rate: of the samples.
        words: as spoken, at least one.

    Returns:
        `{"word", "start_s", "end_s"}` for each word: ascending, not overlapping, inside the clip.
    """
    assert words and len(samples), (len(words), len(samples))
    duration_s = len(samples) / sample_rate
    spans_s = voiced_spans(samples, sample_rate)
    voiced_s = float((spans_s[:, 1] - spans_s[:, 0]).sum())
    if voiced_s < FRAME_S * len(words):
        spans_s, voiced_s = np.array([[0.0, duration_s]]), duration_s
    weights = np.array([word_length(word) for word in words])
    edges = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()]) * voiced_s
    # Voiced time -> clip time. A word that begins where a pause begins, begins after it.
    lengths = spans_s[:, 1] - spans_s[:, 0]
    offsets = np.concatenate([[0.0], np.cumsum(lengths)])
    edges = _snap(edges, offsets[1:-1][spans_s[1:, 0] - spans_s[:-1, 1] >= _SURE_PAUSE_S])
    last = len(lengths) - 1
    starts_in = np.clip(np.searchsorted(offsets, edges[:-1] + 1e-9, side="right") - 1, 0, last)
    ends_in = np.clip(np.searchsorted(offsets, edges[1:] - 1e-9, side="left") - 1, 0, last)
    starts_s = spans_s[starts_in, 0] + edges[:-1] - offsets[starts_in]
    ends_s = np.minimum(spans_s[ends_in, 0] + edges[1:] - offsets[ends_in], duration_s)
    return [
        {"word": word, "start_s": float(start_s), "end_s": float(end_s)}
        for word, start_s, end_s in zip(words, starts_s, ends_s, strict=True)
    ]


def voiced_spans(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return `[N, 2]` start and end in seconds of the voiced parts, float64, ascending; N may be 0."""
    hop = max(1, round(FRAME_S * sample_rate))
    num_frames = len(samples) // hop
    if num_frames < 3:
        return np.zeros((0, 2))
    frames = samples[: num_frames * hop].reshape(num_frames, hop)
    power = np.einsum("tn,tn->t", frames, frames) / hop + 1e-10
    peak_db = 10 * math.log10(power.max())
    floor_db = 10 * math.log10(np.partition(power, num_frames // 20)[num_frames // 20])
    # A clip without quiet parts has no noise floor: the threshold is at least 15 dB below the peak.
    threshold_db = min(max(peak_db - _BELOW_PEAK_DB, floor_db + _ABOVE_FLOOR_DB), peak_db - 15.0)
    is_voiced = np.zeros(num_frames + 2, dtype=bool)
    np.greater(power, 10 ** (threshold_db / 10), out=is_voiced[1:-1])
    edges = np.flatnonzero(is_voiced[1:] != is_voiced[:-1])
    spans_s = edges.reshape(-1, 2) * (hop / sample_rate)
    spans_s = _merge(spans_s, _SHORTEST_PAUSE_S)
    is_long = (spans_s[:, 1] - spans_s[:, 0]) >= _SHORTEST_VOICED_S
    if is_long.any():
        spans_s = spans_s[is_long]
    spans_s = spans_s + np.array([-_MARGIN_S, _MARGIN_S])
    return np.clip(spans_s, 0.0, len(samples) / sample_rate)


def _snap(edges: np.ndarray, pauses: np.ndarray) -> np.ndarray:
    """Move the edge nearest to each pause there, and those between in proportion; the outer edges stay.

    >>> _snap(np.array([0.0, 1.0, 2.0, 4.0]), np.array([1.75]))
    array([0.   , 0.875, 1.75 , 4.   ])
    """
    here, there = [edges[0]], [edges[0]]
    for pause in pauses:
        nearest = int(np.abs(edges - pause).argmin())
        # A pause next to the clip's edge is a breath or a click; of two pauses near one border, one is inside a word.
        if here[-1] < edges[nearest] < edges[-1]:
            here.append(edges[nearest])
            there.append(pause)
    return np.interp(edges, [*here, edges[-1]], [*there, edges[-1]])


@functools.lru_cache(maxsize=4096)
def word_length(word: str) -> float:
    """Estimate how long a word lasts, in arbitrary units: its syllables and its letters."""
    letters = sum(character.isalnum() for character in word)
    return 1.0 + max(1, len(_VOWELS.findall(word))) + 0.6 * letters


def _merge(spans_s: np.ndarray, shortest_gap_s: float) -> np.ndarray:
    if len(spans_s) < 2:
        return spans_s
    is_pause = spans_s[1:, 0] - spans_s[:-1, 1] >= shortest_gap_s
    starts_s = spans_s[np.concatenate([[True], is_pause]), 0]
    ends_s = spans_s[np.concatenate([is_pause, [True]]), 1]
    return np.stack([starts_s, ends_s], axis=1)
