"""WebSocket protocol, as in `moshi.server`: binary messages with a kind byte, then audio or a piece of text.

Audio is Ogg Opus, with one reader and one writer per conversation, or 16-bit PCM. Client input is untrusted: it is
decoded in small slices, only as fast as frames are consumed, and out-of-range samples are rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import sphn

from hf_csm.models.family import Frame
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


HANDSHAKE, AUDIO, TEXT = 0, 1, 2
"""Message kinds of `moshi.server`."""
SLICE_BYTES = 4096
"""Bytes per call of the Opus reader. An Ogg page of 64 KB holds at most 10 s of audio."""
MAX_UNDECODED_BYTES = 128 * 1024
"""Two Ogg pages. The reader itself buffers undecoded input without bound."""
MAX_AMPLITUDE = 8.0
"""Relative to full scale; real encoders overshoot by about 0.5. A NaN would spread to the whole batch."""


class BadAudio(ValueError):
    """The payload is not valid audio of the negotiated format."""


class OpusAudio:
    """Ogg Opus in both directions, at any sample rate, as in `moshi.server`."""

    def __init__(self) -> None:
        self._reader, self._writer = sphn.OpusStreamReader(SAMPLE_RATE), sphn.OpusStreamWriter(SAMPLE_RATE)
        self._undecoded = 0

    def decode(self, payload: bytes) -> Iterator[np.ndarray]:
        """Yield samples, `[S]`, of the pages completed so far.

        Raises:
            BadAudio: the payload is not Ogg Opus.
        """
        for start in range(0, len(payload), SLICE_BYTES):
            part = payload[start : start + SLICE_BYTES]
            try:
                samples = self._reader.append_bytes(part)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic of the Rust extension derives from BaseException
                raise BadAudio(f"the audio is not Ogg Opus: {error}") from error
            self._undecoded = 0 if samples.size else self._undecoded + len(part)
            if self._undecoded > MAX_UNDECODED_BYTES:
                raise BadAudio(f"the audio is not Ogg Opus: {MAX_UNDECODED_BYTES} bytes contain no samples")
            yield samples

    def encode(self, audio: np.ndarray) -> bytes:
        """Return the payload for a frame, `[1920]`."""
        return self._writer.append_pcm(audio)


class PcmAudio:
    """Little-endian 16-bit samples at 24 kHz, mono, in messages of any length."""

    def __init__(self) -> None:
        self._odd = b""

    def decode(self, payload: bytes) -> Iterator[np.ndarray]:
        """Yield samples, `[S]`; an odd byte is kept for the next payload."""
        payload = self._odd + payload
        whole = len(payload) - len(payload) % 2
        self._odd = payload[whole:]
        yield np.frombuffer(payload[:whole], dtype="<i2").astype(np.float32) / 32768

    def encode(self, audio: np.ndarray) -> bytes:
        """Return the payload for a frame, `[1920]`."""
        return (np.clip(audio, -1, 1) * 32767).round().astype("<i2").tobytes()


AUDIO_FORMATS: dict[str, type[OpusAudio] | type[PcmAudio]] = {"opus": OpusAudio, "pcm": PcmAudio}


@dataclass(frozen=True)
class Handshake:
    """The slot is ready."""


@dataclass(frozen=True)
class Event:
    """A JSON message for clients that support them: `steering` or `error`."""

    content: dict[str, object]


@dataclass(frozen=True)
class Pong:
    """Answer to a client's ping."""

    payload: bytes


Message = Handshake | Event | Pong | Frame
"""A message of the server; a `Frame` becomes an audio message and, if it has text, a text message."""


class Framer:
    """Splits decoded audio into frames.

    Attributes:
        num_samples: decoded so far.
    """

    def __init__(self, audio: OpusAudio | PcmAudio):
        self._audio = audio
        self._rest = np.zeros(0, dtype=np.float32)
        self.num_samples = 0

    def frames(self, payload: bytes) -> Iterator[np.ndarray]:
        """Decode lazily and yield complete frames, `[1920]`.

        Raises:
            BadAudio: the payload cannot be decoded, or samples are out of range.
        """
        for samples in self._audio.decode(payload):
            if not (np.abs(samples) <= MAX_AMPLITUDE).all():  # also false for NaN
                raise BadAudio("audio samples are far beyond full scale")
            self.num_samples += len(samples)
            waiting = np.concatenate((self._rest, samples))
            whole = len(waiting) - len(waiting) % SAMPLES_PER_FRAME
            self._rest = waiting[whole:].copy()
            yield from waiting[:whole].reshape(-1, SAMPLES_PER_FRAME)


def text_message(piece: str) -> bytes:
    """Return the message for a SentencePiece piece, as `moshi.server` sends it."""
    return bytes([TEXT]) + piece.replace("▁", " ").encode()
