"""Synthetic clips that resemble speech: pitch, rate and loudness follow speaker and emotion; word times are exact.

A harmonic source goes through one wavetable per vowel and voice (formants as a spectral envelope); consonants are
noise, murmurs and closures. The words are not intelligible, but aligners, pitch trackers and codecs find structure as
in speech. Clips begin and end with quiet room noise, never with digital silence.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_csm.data.text import split_words


@dataclass(frozen=True)
class Voice:
    """The voice of a speaker.

    Attributes:
        f0_hz: pitch when neutral.
        formant_scale: 1 for a long vocal tract, more for a shorter one.
        rate: speaking rate, 1 is average.
        breath: share of noise in the source.
    """

    f0_hz: float
    formant_scale: float
    rate: float
    breath: float


@dataclass(frozen=True)
class Style:
    """How an emotion changes a voice at full intensity: factors, and decibels for loudness and tilt."""

    pitch: float
    pitch_range: float
    rate: float
    loudness_db: float
    tilt_db: float


STYLES = {
    "neutral": Style(1.00, 1.0, 1.00, 0.0, 0.0),
    "calm": Style(0.96, 0.7, 0.88, -3.0, -2.0),
    "happy": Style(1.35, 1.9, 1.10, 4.0, 2.0),
    "sad": Style(0.90, 0.6, 0.80, -6.0, -3.0),
    "angry": Style(1.30, 1.5, 1.15, 9.0, 5.0),
    "fearful": Style(1.50, 1.3, 1.20, 2.0, 1.0),
    "disgust": Style(0.92, 1.2, 0.85, 1.0, 0.0),
    "surprised": Style(1.60, 2.3, 1.05, 5.0, 2.0),
}
# First three formants of a long vocal tract, Hz.
_VOWELS = {
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (300, 2250, 2950),
    "o": (500, 900, 2450),
    "u": (320, 870, 2240),
    "y": (350, 2000, 2700),
    "m": (250, 1100, 2200),  # the murmur of nasals, liquids and voiced stops
}
_BANDWIDTH_HZ = (90.0, 130.0, 190.0)
_PHONES = re.compile(r"sh|ch|th|[aeiouy]+|[^\W\d_]", re.IGNORECASE)
_FRICATIVES = frozenset(("s", "f", "h", "z", "x", "sh", "ch", "th"))
_STOPS = frozenset("ptkcq")
_TABLE_SIZE = 1024
_HIGHEST_HZ = 5_000.0
_PEAK = 0.16
_ROOM = 2.5e-4
_RAMP_S = 0.012


def voice(speaker: int) -> Voice:
    """Return the voice of a speaker number: odd numbers are low (male), even ones high (female)."""
    rng = np.random.default_rng([speaker, 7])
    is_low = speaker % 2 == 1
    f0_hz = rng.uniform(95, 135) if is_low else rng.uniform(180, 235)
    scale = rng.uniform(0.97, 1.04) if is_low else rng.uniform(1.12, 1.2)
    return Voice(float(f0_hz), float(scale), float(rng.uniform(0.92, 1.08)), float(rng.uniform(0.01, 0.03)))


def synthesize(
    text: str,
    *,
    speaker: Voice | int,
    emotion: str = "neutral",
    intensity: str = "medium",
    sample_rate: int = 48_000,
    seed: int = 0,
    lead_s: tuple[float, float] = (0.8, 1.2),
    tail_s: tuple[float, float] = (0.7, 1.2),
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Make a clip. The same arguments give the same samples.

    Args:
        text: the words of the clip.
        speaker: a voice, or the number of one.
        emotion: a key of `STYLES`.
        intensity: low, medium or high: how far the emotion changes the voice.
        sample_rate: of the result.
        seed: of the take: another one differs in timing, melody and noise.
        lead_s: range of the quiet before the first word.
        tail_s: range of the quiet after the last word.

    Returns:
        samples float32 `[S]` in -1..1, and `{"word", "start_s", "end_s"}` of each word, exact to a sample.
    """
    rng = np.random.default_rng(seed)
    speaker = voice(speaker) if isinstance(speaker, int) else speaker
    style = _at_intensity(STYLES[emotion], {"low": 0.5, "medium": 0.75, "high": 1.1}[intensity])
    phones, words, num_samples = _timing(split_words(text), speaker, style, sample_rate, rng, lead_s, tail_s)
    samples = rng.standard_normal(num_samples, dtype=np.float32)
    noise = samples * np.float32(1.0)
    samples *= np.float32(_ROOM)
    first, last = phones[0][1], phones[-1][2]
    phase = _phase(last - first, speaker, style, sample_rate, rng)
    loudness = 10 ** (style.loudness_db / 20)
    tables = {name: _wavetable(name, speaker, style.tilt_db) for name in _VOWELS}
    for name, start, end in phones:
        length = end - start
        ramp = min(round(_RAMP_S * sample_rate), length // 3)
        gain = np.full(length, loudness, np.float32)
        if ramp:
            rise = np.linspace(0, 1, ramp, dtype=np.float32)
            gain[:ramp] *= rise
            gain[-ramp:] *= rise[::-1]
        if name in _FRICATIVES:
            samples[start:end] += gain * (0.12 * _PEAK) * noise[start:end]
        elif name in _STOPS:  # a closure, then a burst
            burst = length - length // 3
            samples[start + burst : end] += gain[burst:] * (0.10 * _PEAK) * noise[start + burst : end]
        else:
            position = phase[start - first : end - first]
            level = _PEAK if name in "aeiouy" else 0.4 * _PEAK
            wave = tables[name if name in tables else "m"][position]
            samples[start:end] += gain * (level * (wave + np.float32(speaker.breath) * noise[start:end]))
    np.clip(samples, -0.99, 0.99, out=samples)
    return samples, words


def _at_intensity(style: Style, share: float) -> Style:
    return Style(
        pitch=style.pitch**share,
        pitch_range=style.pitch_range**share,
        rate=style.rate**share,
        loudness_db=style.loudness_db * share,
        tilt_db=style.tilt_db * share,
    )


def _timing(
    words: list[str],
    speaker: Voice,
    style: Style,
    sample_rate: int,
    rng: np.random.Generator,
    lead_s: tuple[float, float],
    tail_s: tuple[float, float],
) -> tuple[list[tuple[str, int, int]], list[dict[str, Any]], int]:
    """Return phones as (name, first sample, one past the last), words with times, and the length of the clip."""
    rate = speaker.rate * style.rate
    position = round(rng.uniform(*lead_s) * sample_rate)
    phones: list[tuple[str, int, int]] = []
    timed = []
    for word in words:
        names = [match.lower() for match in _PHONES.findall(word)] or ["a"]
        start = position
        for name in names:
            is_vowel = name[0] in "aeiouy"
            seconds = (0.125 + 0.03 * (len(name) - 1)) if is_vowel else 0.075
            length = round(seconds * rng.uniform(0.85, 1.15) / rate * sample_rate)
            phones.append((name[0] if is_vowel else name, position, position + length))
            position += length
        timed.append({"word": word, "start_s": start / sample_rate, "end_s": position / sample_rate})
        position += round(rng.uniform(0.0, 0.03) / rate * sample_rate)
    num_samples = phones[-1][2] + round(rng.uniform(*tail_s) * sample_rate)
    return phones, timed, num_samples


def _phase(length: int, speaker: Voice, style: Style, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return the position in the wavetable for each sample, int64 `[length]`: a falling, waving pitch."""
    num_points = 24
    place = np.linspace(0, 1, num_points)
    melody = 0.10 - 0.22 * place + 0.09 * np.sin(2 * np.pi * (2.2 * place + rng.uniform())) + rng.normal(0, 0.02, 24)
    f0_hz = speaker.f0_hz * style.pitch * 2 ** (melody * style.pitch_range)
    contour = np.interp(np.linspace(0, 1, length, dtype=np.float32), place, f0_hz)
    return (np.cumsum(contour * (_TABLE_SIZE / sample_rate)).astype(np.int64)) & (_TABLE_SIZE - 1)


@functools.lru_cache(maxsize=1024)
def _wavetable(name: str, speaker: Voice, tilt_db: float) -> np.ndarray:
    """Return one period of a sound, float32 `[_TABLE_SIZE]`, peak 1: harmonics under a formant envelope."""
    num_harmonics = int(_HIGHEST_HZ / speaker.f0_hz)
    harmonics = np.arange(1, num_harmonics + 1)
    hz = harmonics * speaker.f0_hz
    envelope = np.zeros(num_harmonics)
    for index, (formant, bandwidth) in enumerate(zip(_VOWELS[name], _BANDWIDTH_HZ, strict=True)):
        center = formant * speaker.formant_scale
        envelope += 0.6**index / (1 + ((hz - center) / bandwidth) ** 2)
    source = 10 ** ((-9 + tilt_db) * np.log2(harmonics) / 20)
    amplitude = (envelope + 0.02) * source
    phases = 2 * np.pi * np.outer(np.arange(_TABLE_SIZE) / _TABLE_SIZE, harmonics)
    table = (np.sin(phases + 0.3 * harmonics**2) * amplitude).sum(axis=1)
    return (table / np.abs(table).max()).astype(np.float32)
