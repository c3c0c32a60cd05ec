"""Seconds, samples and frames: the only conversions of the project."""

from __future__ import annotations

import math


Seconds = float
Frames = int
Samples = int

SAMPLE_RATE = 24_000
"""Samples a second of every waveform after `prepare`: Mimi's rate."""
FRAME_RATE = 12.5
"""Frames a second of every code stream: Mimi's rate."""
SAMPLES_PER_FRAME = 1_920
"""Samples under one frame of codes, 80 ms."""


def seconds_to_samples(duration_s: Seconds) -> Samples:
    """Round a time to the nearest sample."""
    return round(duration_s * SAMPLE_RATE)


def samples_to_seconds(num_samples: Samples) -> Seconds:
    """Return the duration of `num_samples` samples."""
    return num_samples / SAMPLE_RATE


def frames_to_seconds(num_frames: Frames) -> Seconds:
    """Return the duration of `num_frames` frames."""
    return num_frames / FRAME_RATE


def seconds_to_frames(duration_s: Seconds) -> Frames:
    """Return the number of frames that hold `duration_s` whole, the last one perhaps in part."""
    return math.ceil(round(duration_s * FRAME_RATE, 6))


def frame_at(time_s: Seconds) -> Frames:
    """Return the index of the frame that is sounding at `time_s`."""
    return math.floor(round(time_s * FRAME_RATE, 6))


def samples_to_frames(num_samples: Samples) -> Frames:
    """Return the number of frames that hold `num_samples` samples, the last one perhaps in part."""
    return -(-num_samples // SAMPLES_PER_FRAME)
