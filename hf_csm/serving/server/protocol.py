"""What crosses the WebSocket, as `moshi.server` has it: a first byte for the kind, then audio or a piece of text.

Audio is Ogg Opus through one reader and one writer per conversation, or 16-bit PCM. What a client sends is not
trusted: it is decoded a little at a time, only as fast as frames are taken, and what no microphone gives is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import sphn

from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


HANDSHAKE, AUDIO, TEXT = 0, 1, 2
"""The kinds that `moshi.server` knows."""
SLICE_BYTES = 4096
"""Given to the Opus reader at once. An Ogg page of 64 KB can hold 10 s of audio and no more."""
MAX_UNDECODED_BYTES = 128 * 1024
"""Two Ogg pages. The reader keeps what it cannot decode yet, without bound."""
LOUDEST = 8.0
"""Beyond full scale; honest encoders overshoot by a half. Not-a-number would end every conversation in the batch."""


class BadAudio(ValueError):
    """What came as audio is not what was agreed on; its decoder cannot go on."""


class OpusAudio:
    """Ogg Opus, both ways, at any sample rate; moshi's own."""

    def __init__(self) -> None:
        self._reader, self._writer = sphn.OpusStreamReader(SAMPLE_RATE), sphn.OpusStreamWriter(SAMPLE_RATE)
        self._undecoded = 0

    def decode(self, payload: bytes) -> Iterator[np.ndarray]:
        """Yield samples, `[S]`, as far as whole pages have come.

        Raises:
            BadAudio: it is not Ogg Opus.
        """
        for start in range(0, len(payload), SLICE_BYTES):
            part = payload[start : start + SLICE_BYTES]
            try:
                samples = self._reader.append_bytes(part)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic of the extension is no Exception
                raise BadAudio(f"the audio is not Ogg Opus: {error}") from error
            self._undecoded = 0 if samples.size else self._undecoded + len(part)
            if self._undecoded > MAX_UNDECODED_BYTES:
                raise BadAudio(f"the audio is not Ogg Opus: {MAX_UNDECODED_BYTES} bytes hold no sound")
            yield samples

    def encode(self, audio: np.ndarray) -> bytes:
        """Return what is to be sent for a frame, `[1920]`."""
        return self._writer.append_pcm(audio)


class PcmAudio:
    """Little-endian 16-bit samples at 24 kHz, mono, in messages of any length."""

    def __init__(self) -> None:
        self._odd = b""

    def decode(self, payload: bytes) -> Iterator[np.ndarray]:
        """Yield samples, `[S]`; half a sample waits for its other half."""
        payload = self._odd + payload
        whole = len(payload) - len(payload) % 2
        self._odd = payload[whole:]
        yield np.frombuffer(payload[:whole], dtype="<i2").astype(np.float32) / 32768

    def encode(self, audio: np.ndarray) -> bytes:
        """Return what is to be sent for a frame, `[1920]`."""
        return (np.clip(audio, -1, 1) * 32767).round().astype("<i2").tobytes()


AUDIO_FORMATS: dict[str, type[OpusAudio] | type[PcmAudio]] = {"opus": OpusAudio, "pcm": PcmAudio}


class Framer:
    """Cuts what is decoded into frames.

    Attributes:
        num_samples: decoded so far.
    """

    def __init__(self, audio: OpusAudio | PcmAudio):
        self._audio = audio
        self._rest = np.zeros(0, dtype=np.float32)
        self.num_samples = 0

    def frames(self, payload: bytes) -> Iterator[np.ndarray]:
        """Decode lazily, and yield each frame, `[1920]`, as it is full.

        Raises:
            BadAudio: the decoder refuses it, or it is louder than sound can be.
        """
        for samples in self._audio.decode(payload):
            if not (np.abs(samples) <= LOUDEST).all():  # false for not-a-number, too
                raise BadAudio("the audio is far beyond full scale")
            self.num_samples += len(samples)
            waiting = np.concatenate((self._rest, samples))
            whole = len(waiting) - len(waiting) % SAMPLES_PER_FRAME
            self._rest = waiting[whole:].copy()
            yield from waiting[:whole].reshape(-1, SAMPLES_PER_FRAME)


def text_message(piece: str) -> bytes:
    """Return the message for a piece of the tokenizer, worded as `moshi.server` does."""
    return bytes([TEXT]) + piece.replace("▁", " ").encode()
