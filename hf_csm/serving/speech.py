"""Offline speech: say a text or answer a recording with the engine of the server, reproducible by seed."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from hf_csm.data.audio import ROOM_TONE_DB, read_audio, resample, room_tone
from hf_csm.data.text import normalize_text, split_words
from hf_csm.errors import UserError
from hf_csm.models.family import Frame
from hf_csm.serving.loaded import LoadedModel, check_strength, engine_error
from hf_csm.serving.resolve import AdapterChoice
from hf_csm.units import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    Frames,
    frames_to_seconds,
    samples_to_frames,
    seconds_to_frames,
)


SILENCE_DB = -45.0
"""Frames below this level (RMS, relative to full scale) are silent."""
FADED_S = 0.8
"""Silence after the last word that ends the speech."""
MAX_FADING_S = 4.0
"""Maximum time after the last word."""
LEAD_IN_S = 1.0
"""Silence before a question, during which the prefix is forced; the minimum before a first turn in training."""
SUFFIXES = (".wav", ".flac", ".ogg")


@dataclass(frozen=True)
class Speech:
    """Generated speech and the audio of the user.

    Attributes:
        audio: `[S]`, float32, 24 kHz: the model's channel, whole frames.
        user: `[S]`, the user's channel.
        text: transcript.
        words: `word` and `start_s`: seconds from the first sample to the frame in which its text begins.
        text_tokens: `[T]`, including the prefix.
        adapter: name of the adapter, or `base`.
        emotion: requested emotion, if the adapter supports it.
        lead_in_s: silence before the question; 0 without a question.
        question_s: length of the question; 0 without a question.
    """

    audio: np.ndarray
    user: np.ndarray
    text: str
    words: list[dict[str, Any]]
    text_tokens: list[int]
    adapter: str
    emotion: str | None
    strength: float
    seed: int
    lead_in_s: float = 0.0
    question_s: float = 0.0

    @property
    def question_end_s(self) -> float:
        """End of the question, from the first sample."""
        return self.lead_in_s + self.question_s

    @property
    def duration_s(self) -> float:
        return len(self.audio) / SAMPLE_RATE

    @property
    def is_silent(self) -> bool:
        """Whether all frames are silent."""
        return all(level_db(frame) < SILENCE_DB for frame in np.split(self.audio, len(self.text_tokens)))

    def describe(self) -> dict[str, Any]:
        """Return everything but samples and tokens, for JSON."""
        names = ["emotion", "strength", "seed", "lead_in_s", "question_s", "duration_s", "is_silent"]
        record = {"text": self.text, "words": self.words, "voice": self.adapter}
        return record | {name: getattr(self, name) for name in names}


def say(
    model: LoadedModel,
    text: str,
    *,
    emotion: str | None = None,
    adapter: str | None = None,
    strength: float = 1.0,
    seed: int = 0,
) -> Speech:
    """Speak `text` to a silent user. The same arguments give the same speech.

    Args:
        model: with one slot.
        strength: of the adapter; 0 is the base model, 1 the trained adapter.

    Raises:
        UserError: the text is empty, emotion or strength are invalid, or the engine failed.
    """
    choice = _choose(model, emotion, adapter, strength)
    words = split_words(check_text(text))
    num_faded, most_fading = seconds_to_frames(FADED_S), seconds_to_frames(MAX_FADING_S)
    frames: list[Frame] = []
    user = _UserAudio(None, seed)
    for frame in _converse(model, user, choice, emotion, strength, seed, words):
        frames.append(frame)
        last = model.engine.last_word_frame(0)
        after = [] if last is None else frames[last + 1 :]
        is_faded = len(after) >= num_faded and all(_is_silent(frame) for frame in after[-num_faded:])
        if is_faded or len(after) >= most_fading:
            break
    return _speech(model, frames, user, choice, emotion, strength, seed)


def reply(
    model: LoadedModel,
    question: np.ndarray,
    *,
    emotion: str | None = None,
    adapter: str | None = None,
    strength: float = 1.0,
    seed: int = 0,
    tail_s: float = 3.0,
    max_s: float = 30.0,
) -> Speech:
    """Answer a recorded question.

    The speech starts with one second of silence, during which the prefix is forced, as in training; adapters without
    a prefix get it as well, so that answers can be compared. The question follows. The model may speak during both.
    The speech ends after `tail_s` of silence following the question, or `max_s` after the question.

    Args:
        model: with one slot.
        question: `[S]`, float32, 24 kHz; see `read_question`.

    Raises:
        UserError: emotion, strength or times are invalid, or the engine failed.
    """
    choice = _choose(model, emotion, adapter, strength)
    check_times(tail_s, max_s)
    # A long prefix must also end before the question.
    lead_in = max(seconds_to_frames(LEAD_IN_S), len(model.prefix(choice, emotion)) + 1)
    num_asked = lead_in + samples_to_frames(len(question))
    tail, most = seconds_to_frames(tail_s), seconds_to_frames(max_s)
    frames: list[Frame] = []
    num_quiet = 0
    user = _UserAudio(question, seed, lead_in)
    for frame in _converse(model, user, choice, emotion, strength, seed):
        frames.append(frame)
        if len(frames) <= num_asked:
            continue
        is_quiet = frame.text_token in model.engine.padding_ids and _is_silent(frame)
        num_quiet = num_quiet + 1 if is_quiet else 0
        if num_quiet >= tail or len(frames) - num_asked >= most:
            break
    speech = _speech(model, frames, user, choice, emotion, strength, seed)
    return replace(speech, lead_in_s=frames_to_seconds(lead_in), question_s=len(question) / SAMPLE_RATE)


def check_text(text: str) -> str:
    """Normalize the text to speak.

    Raises:
        UserError: it contains no words.
    """
    try:
        text.encode()
        return normalize_text(text, "the text")
    except UnicodeEncodeError as error:
        raise UserError(f"The text {text!r} is not UTF-8.", "Set the terminal to UTF-8.") from error
    except UserError:
        raise UserError(f"The text {text!r} is empty.", "Give at least one word.") from None


def check_times(tail_s: float, max_s: float) -> None:
    """Check the time limits of a reply.

    Raises:
        UserError: one is not above 0.
    """
    for name, value in (("--tail-s", tail_s), ("--seconds", max_s)):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value:g}.", "Give more than 0 seconds.")


def read_question(path: str | Path) -> np.ndarray:
    """Read a recording of any rate and number of channels as float32 `[S]` at 24 kHz.

    Raises:
        UserError: it cannot be read or is empty.
    """
    try:
        samples, sample_rate, _ = read_audio(Path(path))
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise UserError(error.problem, "Record the question again, or use another audio file.") from error
    return resample(samples.astype(np.float32, copy=False), sample_rate)


def check_out(path: Path) -> None:
    """Check the name of the output file.

    Raises:
        UserError: the format is not supported, or it is a folder.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {path}: unsupported audio format.", f"Use {', '.join(SUFFIXES)}.")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder.", "Give the name of a file.")


def write_audio(path: Path, speech: Speech, *, stereo: bool = False) -> None:
    """Write the speech atomically as 16-bit mono, or with `stereo` the user on the left and the model on the right.

    Raises:
        UserError: the file cannot be written.
    """
    check_out(path)
    samples = np.stack([speech.user, speech.audio], axis=1) if stereo else speech.audio
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.", "Choose another folder.") from error
    os.close(handle)
    try:
        soundfile.write(beside, np.clip(samples, -1.0, 1.0), SAMPLE_RATE)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)
        os.replace(beside, path)
    except soundfile.LibsndfileError as error:
        raise UserError(
            f"{path} cannot be written: {error.error_string}", "Free some disk space, or choose another folder."
        ) from error
    finally:
        Path(beside).unlink(missing_ok=True)


def level_db(samples: np.ndarray) -> float:
    """Return the RMS level in dB relative to full scale."""
    return float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-12))


class _UserAudio:
    """Endless user audio by frame: room tone, with the question after a lead-in.

    Attributes:
        frames: frames consumed so far, `[1920]` each.
    """

    def __init__(self, question: np.ndarray | None, seed: int, lead_in: Frames = 0):
        self.frames: list[np.ndarray] = []
        self._question = np.zeros(0, dtype=np.float32) if question is None else question
        self._lead_in = lead_in
        self._rng = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self._quiet_frame()  # only initializes the model
        while True:
            frame = self._quiet_frame()
            first = (len(self.frames) - self._lead_in) * SAMPLES_PER_FRAME
            if first >= 0:
                spoken = self._question[first : first + SAMPLES_PER_FRAME]
                frame[: len(spoken)] = spoken
            self.frames.append(frame)
            yield frame

    def _quiet_frame(self) -> np.ndarray:
        return room_tone(SAMPLES_PER_FRAME, self._rng, (ROOM_TONE_DB, ROOM_TONE_DB))


def _choose(model: LoadedModel, emotion: str | None, adapter: str | None, strength: float) -> AdapterChoice:
    assert model.engine.num_slots == 1, f"{model.engine.num_slots} slots"
    choice = model.choose(emotion, adapter)
    check_strength(strength)
    if choice.index is None and strength != 1.0:
        raise UserError(
            f"The strength is {strength:g}, but {choice.name!r} has no adapter to scale.",
            "Omit the strength, or name an adapter that is not merged.",
        )
    return choice


def _converse(
    model: LoadedModel,
    user: _UserAudio,
    choice: AdapterChoice,
    emotion: str | None,
    strength: float,
    seed: int,
    words: Sequence[str] = (),
) -> Iterator[Frame]:
    """Start a conversation, with forced words if there are any, and yield the generated frames."""
    model.engine.reset(0, seed=seed)
    model.steer(0, choice, emotion, strength)
    if words:
        model.engine.force_words(0, words)
    for frame in user:
        try:
            generated = model.engine.step({0: frame})
        except RuntimeError as error:
            raise engine_error(error, model.base_name, 1) from error
        if 0 in generated:
            yield generated[0]


def _is_silent(frame: Frame) -> bool:
    return level_db(frame.audio) < SILENCE_DB


def _speech(
    model: LoadedModel,
    frames: Sequence[Frame],
    user: _UserAudio,
    choice: AdapterChoice,
    emotion: str | None,
    strength: float,
    seed: int,
) -> Speech:
    padding_id = min(model.engine.padding_ids)
    words = model.engine.words_in([padding_id if frame.is_forced else frame.text_token for frame in frames])
    return Speech(
        audio=np.concatenate([frame.audio for frame in frames]),
        user=np.concatenate(user.frames[: len(frames)]),
        text=" ".join(word["word"] for word in words),
        words=words,
        text_tokens=[frame.text_token for frame in frames],
        adapter=choice.name,
        emotion=emotion if emotion in choice.emotions else None,
        strength=strength,
        seed=seed,
    )
