"""Prosody of a clip in five numbers: pitch, pitch range, loudness range, speaking rate, share of voiced frames."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import soxr

from hf_csm.prepare.align_energy import voiced_spans


_PITCH_RATE = 16_000
# Range of speech including screams; the model itself covers 47 to 2,094 Hz.
_LOWEST_HZ, _HIGHEST_HZ = 50.0, 800.0
_CONTEXT_S = 0.2  # receptive field of a frame to either side; silence beyond it is not computed
_VOICED_CONFIDENCE = 0.5  # the threshold of its authors
_LEAST_VOICED_FRAMES = 5
"""80 ms, a short vowel. Fewer are unreliable."""

_WINDOW_S, _HOP_S = 0.4, 0.1
_ABSOLUTE_GATE_DB, _RELATIVE_GATE_DB = -70.0, -20.0


def measure_prosody(samples: np.ndarray, sample_rate: int, words: list[dict[str, Any]]) -> dict[str, float | None]:
    """Measure a clip between the start of its first word and the end of its last; `PROSODY_COLUMNS` names the result.

    Without words the span is from the first to the last sound. Pitch is that of swift-f0, a frame every 16 ms, 50 to
    800 Hz, voiced from a confidence of 0.5. Loudness range is that of EBU Tech 3342 on a shorter scale: windows of
    400 ms every 100 ms (the momentary loudness of EBU R 128; its 3 s would be a whole clip), mean square in dB without
    K-weighting, gated at -70 dB and at 20 dB below their mean power.

    Args:
        samples: float32 `[S]`.
        sample_rate: of the samples.
        words: `word`, `start_s` and `end_s` each, ascending; may be empty.

    Returns:
        `f0_median_hz`: median pitch of the voiced frames.
        `f0_range_st`: from their 5th to their 95th percentile, `12 log2(p95 / p5)` semitones.
        `loudness_range_db`: from the 10th to the 95th percentile of the windows' levels.
        `words_per_s`: words by the length of the span, pauses included; each Chinese character is a word.
        `voiced_share`: voiced frames by frames.
        Each is `None` if undefined: no voiced frames, no words, less than two loudness windows.
    """
    span_s = _spoken_span(samples, sample_rate, words)
    confidence, pitch_hz = _pitch(samples, sample_rate, span_s)
    voiced_hz = pitch_hz[confidence >= _VOICED_CONFIDENCE]
    median_hz = range_st = None
    if len(voiced_hz) >= _LEAST_VOICED_FRAMES:
        low_hz, median_hz, high_hz = np.percentile(voiced_hz, [5, 50, 95]).tolist()
        range_st = float(12 * np.log2(high_hz / low_hz))
    return {
        "f0_median_hz": median_hz,
        "f0_range_st": range_st,
        "loudness_range_db": _loudness_range_db(samples, sample_rate, span_s),
        "words_per_s": len(words) / (span_s[1] - span_s[0]) if words and span_s[1] > span_s[0] else None,
        "voiced_share": len(voiced_hz) / len(pitch_hz) if len(pitch_hz) else None,
    }


def _spoken_span(samples: np.ndarray, sample_rate: int, words: list[dict[str, Any]]) -> tuple[float, float]:
    """Return where speech starts and ends, in seconds; both equal if there is no sound."""
    if words:
        return words[0]["start_s"], words[-1]["end_s"]
    spans_s = voiced_spans(samples, sample_rate)
    return (float(spans_s[0, 0]), float(spans_s[-1, 1])) if len(spans_s) else (0.0, 0.0)


def _pitch(samples: np.ndarray, sample_rate: int, span_s: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return confidence and pitch in Hz of the frames whose center is in the span."""
    first = max(0, round((span_s[0] - _CONTEXT_S) * sample_rate))
    signal = soxr.resample(samples[first : round((span_s[1] + _CONTEXT_S) * sample_rate)], sample_rate, _PITCH_RATE)
    if not len(signal):
        return np.zeros(0), np.zeros(0)
    found = _detector(os.getpid()).detect(signal, _PITCH_RATE, _LOWEST_HZ, _HIGHEST_HZ)
    times_s = found.timestamps + first / sample_rate
    is_within = (times_s >= span_s[0]) & (times_s < span_s[1])
    return found.confidence[is_within], found.pitch_hz[is_within]


@functools.lru_cache(maxsize=1)
def _detector(process_id: int) -> Any:
    """Load the pitch detector once per process: onnxruntime sessions do not survive a fork."""
    from swift_f0 import SwiftF0

    return SwiftF0(threads=1)


def _loudness_range_db(samples: np.ndarray, sample_rate: int, span_s: tuple[float, float]) -> float | None:
    window, hop = round(_WINDOW_S * sample_rate), round(_HOP_S * sample_rate)
    start, end = (round(time_s * sample_rate) for time_s in span_s)
    energy = np.concatenate([[0.0], np.cumsum(np.square(samples[max(start, 0) : end], dtype=np.float64))])
    if len(energy) <= 2 * window:
        return None
    first = np.arange(0, len(energy) - window, hop)
    power = (energy[first + window] - energy[first]) / window
    power = power[power > 10 ** (_ABSOLUTE_GATE_DB / 10)]
    if not len(power):
        return None
    power = power[power > power.mean() * 10 ** (_RELATIVE_GATE_DB / 10)]
    low_db, high_db = np.percentile(10 * np.log10(power), [10, 95])
    return float(high_db - low_db)
