"""Read audio of any format that libsndfile supports, resample to 24 kHz, write 16-bit mono FLAC; room tone."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from hf_csm.errors import UserError
from hf_csm.units import SAMPLE_RATE, Samples


_GET_AGAIN = "Get this file from the corpus again, or remove it."
_COPY_AGAIN = "Copy or extract this file again."
_LEAST_PLACEHOLDER = 0x7FFFF000
"""RIFF sizes from here on (2 or 4 GiB, or nearly) are placeholders of programs that write to a pipe."""
_HIGHEST_PEAK = 8.0
"""Of float samples, whose full scale is 1. Higher peaks come from int16 values stored as floats without scaling."""
ROOM_TONE_DB = -60.0
"""Level of a silent user's channel at inference, inside the range of training, which has no digital silence."""


def read_audio(source: bytes | str | Path, name: str | None = None) -> tuple[np.ndarray, int, int]:
    """Read an audio file; channels are averaged.

    Args:
        source: the bytes of a file, or its path.
        name: name in messages; the path by default.

    Returns:
        samples float32 `[S]` in -1..1, sample rate, number of channels in the file.

    Raises:
        UserError: not an audio file, without samples, with non-finite or unscaled samples, or truncated (wav, aiff,
            au, ogg and flac only; mp3 has no length).
    """
    name = name or (str(source) if not isinstance(source, bytes) else "audio")
    if not isinstance(source, bytes):
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            raise UserError(
                f"{name}: cannot be read ({error.strerror or error}).", "Check the path and its permissions."
            ) from error
    _refuse_truncated(source, name)
    try:
        plain = _read_plain_wav(source)
        samples, sample_rate = plain or soundfile.read(io.BytesIO(source), dtype="float32")
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = str(error).rsplit(": ", 1)[-1].strip().rstrip(".")
        raise UserError(
            f"{name}: not a sound file that can be read ({len(source):,} bytes; {reason}).", _GET_AGAIN
        ) from error
    if not len(samples):
        raise UserError(f"{name}: has no samples.", _GET_AGAIN)
    if plain is None:
        _refuse_bad_samples(samples, name)
    if samples.ndim == 1:
        return samples, sample_rate, 1
    return samples.mean(axis=1), sample_rate, samples.shape[1]


def resample(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Resample float32 samples `[S]` to 24 kHz (soxr, high quality)."""
    return samples if sample_rate == SAMPLE_RATE else soxr.resample(samples, sample_rate, SAMPLE_RATE)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Round float samples in -1..1 to int16; values outside are clipped."""
    scaled = samples * np.float32(32768)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32768, 32767, out=scaled)
    return scaled.astype(np.int16)


def encode_flac(samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> bytes:
    """Encode int16 samples `[S]` (or float in -1..1) as 16-bit mono FLAC."""
    if samples.dtype != np.int16:
        samples = to_int16(samples.astype(np.float32, copy=False))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def decode_audio(audio: Mapping[str, Any]) -> np.ndarray:
    """Return the samples, float32 `[S]` at 24 kHz, of a row's `audio`: `{"bytes": ..., "path": ...}`."""
    content = audio["bytes"]
    samples, sample_rate, _ = read_audio(audio["path"] if content is None else content, name=audio["path"])
    return resample(samples, sample_rate)


def hash_samples(samples: np.ndarray) -> str:
    """Return the SHA-256 of int16 samples, little-endian: independent of file format and metadata."""
    assert samples.dtype == np.int16, samples.dtype
    return hashlib.sha256(samples.astype("<i2", copy=False).tobytes()).hexdigest()


def room_tone(num_samples: Samples, rng: np.random.Generator, level_db: tuple[float, float]) -> np.ndarray:
    """Return low-pass noise float32 `[S]` at a level drawn uniformly from a range in dB of full scale."""
    smoothing = 8
    noise = rng.standard_normal(num_samples + smoothing - 1, dtype=np.float32)
    noise = np.convolve(noise, np.full(smoothing, smoothing**-0.5, dtype=np.float32), mode="valid")
    return noise * np.float32(10.0 ** (rng.uniform(*level_db) / 20.0))


def _read_plain_wav(content: bytes) -> tuple[np.ndarray, int] | None:
    """Read 16-bit PCM WAV, the format of most corpora, four times faster than libsndfile; `None` for other formats.

    Same samples as libsndfile: float32 `[S]`, or `[S, channels]`.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return None
    position, fmt = 12, None
    while position + 8 <= len(content):
        kind, num_bytes = struct.unpack_from("<4sI", content, position)
        position += 8
        if kind == b"fmt " and num_bytes >= 16:
            fmt = struct.unpack_from("<HHIIHH", content, position)
        elif kind == b"data":
            if fmt is None or fmt[0] != 1 or fmt[5] != 16 or not fmt[1] or not fmt[2]:
                return None
            if position + num_bytes > len(content) or num_bytes % (2 * fmt[1]):
                return None
            pcm = np.frombuffer(content, "<i2", num_bytes // 2, position)
            samples = pcm * np.float32(1 / 32768)
            return samples if fmt[1] == 1 else samples.reshape(-1, fmt[1]), fmt[2]
        position += num_bytes + num_bytes % 2
    return None


def _refuse_bad_samples(samples: np.ndarray, name: str) -> None:
    # Floats may be NaN, infinite, or unscaled int16 values.
    peak = np.maximum(samples.max(), -samples.min())  # NaN if one of them is
    if not np.isfinite(peak):
        raise UserError(f"{name}: has samples that are no finite numbers.", _GET_AGAIN)
    if peak > _HIGHEST_PEAK:
        raise UserError(
            f"{name}: its float samples reach {peak:,.0f}; full scale is 1.", "Scale them to -1..1 and save again."
        )


def _refuse_truncated(content: bytes, name: str) -> None:
    # libsndfile reads truncated files of these formats without an error.
    head, declared = content[:4], 0
    if head == b"RIFF":
        declared = int.from_bytes(content[4:8], "little") + 8
        declared = 0 if declared >= _LEAST_PLACEHOLDER else declared
    elif head == b"FORM":  # AIFF
        declared = int.from_bytes(content[4:8], "big") + 8
    elif head == b".snd":  # AU: where the samples start, and their bytes
        num_bytes = int.from_bytes(content[8:12], "big")
        declared = 0 if num_bytes == 0xFFFFFFFF else int.from_bytes(content[4:8], "big") + num_bytes
    elif head == b"OggS":
        page = content[content.rindex(b"OggS") :]  # flags in byte 5, number of segments in 26, their sizes, segments
        num_bytes = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else 27
        if len(page) < num_bytes or not page[5] & 4:
            raise UserError(f"{name}: truncated: its last page does not end the stream.", _COPY_AGAIN)
    if len(content) < 0.99 * declared:
        raise UserError(f"{name}: truncated: {len(content):,} of {declared:,} bytes.", _COPY_AGAIN)
