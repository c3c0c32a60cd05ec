"""Moshi without a server: a text spoken, or a recording answered, from the same engine, repeatable by seed."""

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
from hf_csm.data.text import normalise_text, split_words
from hf_csm.errors import UserError
from hf_csm.models.family import Frame
from hf_csm.models.moshi.forced_text import WORD_START, Script, words_in
from hf_csm.serving.loaded import Speaker, Voice, check_strength, explain_failure
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
"""Silence after the last word that ends a text."""
MAX_FADING_S = 4.0
"""Longest time after the last word, silent or not."""
LEAD_IN_S = 1.0
"""Quiet before a question, in which the prefix is told: the shortest that training has before a first turn."""
SUFFIXES = (".wav", ".flac", ".ogg")


@dataclass(frozen=True)
class Speech:
    """What Moshi said, and to what.

    Attributes:
        audio: `[S]`, float32, 24 kHz: Moshi's side, whole frames.
        user: `[S]`, what it heard meanwhile.
        text: what it said.
        words: `word` and `start_s`, in seconds from the first sample; the frame in which its text begins.
        text_tokens: `[T]`, prefix included.
        voice: who spoke.
        emotion: that the voice was asked for; None for none.
        lead_in_s: quiet at the beginning, before the user's question; 0 for a text.
        question_s: length of what the user said then; 0 for a text.
    """

    audio: np.ndarray
    user: np.ndarray
    text: str
    words: list[dict[str, Any]]
    text_tokens: list[int]
    voice: str
    emotion: str | None
    strength: float
    seed: int
    lead_in_s: float = 0.0
    question_s: float = 0.0

    @property
    def question_end_s(self) -> float:
        """When the user has asked, from the first sample."""
        return self.lead_in_s + self.question_s

    @property
    def duration_s(self) -> float:
        return len(self.audio) / SAMPLE_RATE

    @property
    def is_silent(self) -> bool:
        """Say whether nothing can be heard."""
        return all(level_db(frame) < SILENCE_DB for frame in np.split(self.audio, len(self.text_tokens)))

    def describe(self) -> dict[str, Any]:
        """Return all but the samples and tokens, as JSON takes it."""
        names = ["text", "words", "voice", "emotion", "strength", "seed"]
        names += ["lead_in_s", "question_s", "duration_s", "is_silent"]
        return {name: getattr(self, name) for name in names}


def say(
    speaker: Speaker,
    text: str,
    *,
    emotion: str | None = None,
    voice: str | None = None,
    strength: float = 1.0,
    seed: int = 0,
) -> Speech:
    """Let Moshi say `text`, to a user who says nothing.

    It ends when the last word has faded. The same arguments give the same speech.

    Args:
        speaker: with one slot.
        strength: of the adapter; 0 is the base, 1 as trained.

    Raises:
        UserError: the text is empty, no voice knows the emotion, the strength is none, or the engine failed.
    """
    chosen = _choose(speaker, emotion, voice, strength)
    words = split_words(check_text(text))
    engine, tokenizer = speaker.engine, speaker.tokenizer
    script = Script(
        [tokens for tokens in map(tokenizer.encode, words) if tokens],
        num_given=len(speaker.prefix(chosen, emotion)),
        word_starts=[i for i in range(tokenizer.vocab_size()) if tokenizer.id_to_piece(i).startswith(WORD_START)],
        padding_id=engine.lm.text_padding_token_id,
        end_of_padding_id=engine.lm.end_of_text_padding_id,
    )
    num_faded, most_fading = seconds_to_frames(FADED_S), seconds_to_frames(MAX_FADING_S)
    frames: list[Frame] = []
    heard = _Heard(None, seed)
    engine.text_policy = script
    try:
        for frame in _converse(speaker, heard, chosen, emotion, strength, seed):
            frames.append(frame)
            after = [] if script.last_frame is None else frames[script.last_frame + 1 :]
            is_faded = len(after) >= num_faded and all(_is_silent(frame) for frame in after[-num_faded:])
            if is_faded or len(after) >= most_fading:
                break
    finally:
        engine.text_policy = None
    return _speech(speaker, frames, heard, chosen, emotion, strength, seed)


def reply(
    speaker: Speaker,
    question: np.ndarray,
    *,
    emotion: str | None = None,
    voice: str | None = None,
    strength: float = 1.0,
    seed: int = 0,
    tail_s: float = 3.0,
    max_s: float = 30.0,
) -> Speech:
    """Let Moshi hear `question` and answer.

    The speech begins with a second of quiet, in which Moshi is told the emotion, as in training; voices that are told
    none get it, too, so that answers can be compared. The question follows; Moshi may speak during both.
    It ends when Moshi has been quiet for `tail_s` after the question, or `max_s` after it.

    Args:
        speaker: with one slot.
        question: `[S]`, float32, 24 kHz; see `read_question`.

    Raises:
        UserError: no voice knows the emotion, the strength is none, one of the times is not above 0, or the engine
            failed.
    """
    chosen = _choose(speaker, emotion, voice, strength)
    check_times(tail_s, max_s)
    # A prefix that is longer than usual is told before the question, too.
    lead_in = max(seconds_to_frames(LEAD_IN_S), len(speaker.prefix(chosen, emotion)) + 1)
    num_asked = lead_in + samples_to_frames(len(question))
    tail, most = seconds_to_frames(tail_s), seconds_to_frames(max_s)
    frames: list[Frame] = []
    num_quiet = 0
    heard = _Heard(question, seed, lead_in)
    for frame in _converse(speaker, heard, chosen, emotion, strength, seed):
        frames.append(frame)
        if len(frames) <= num_asked:
            continue
        is_quiet = frame.text_token in speaker.engine.padding_ids and _is_silent(frame)
        num_quiet = num_quiet + 1 if is_quiet else 0
        if num_quiet >= tail or len(frames) - num_asked >= most:
            break
    speech = _speech(speaker, frames, heard, chosen, emotion, strength, seed)
    return replace(speech, lead_in_s=frames_to_seconds(lead_in), question_s=len(question) / SAMPLE_RATE)


def check_text(text: str) -> str:
    """Return what is to be said, normalised.

    Raises:
        UserError: nothing that can be spoken is in it.
    """
    try:
        return normalise_text(text, "what to say")
    except UserError:
        raise UserError(f"The text to say, {text!r}, is empty.", "Give at least one word.") from None


def check_times(tail_s: float, max_s: float) -> None:
    """Check when a reply is to end.

    Raises:
        UserError: one of the times is not above 0.
    """
    for name, value in (("--tail-s", tail_s), ("--seconds", max_s)):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value:g}.", "Give more than 0 seconds.")


def read_question(path: str | Path) -> np.ndarray:
    """Return a recording of any rate and number of channels as float32 `[S]` at 24 kHz.

    Raises:
        UserError: it cannot be read, or has no sound in it.
    """
    try:
        samples, sample_rate, _ = read_audio(Path(path))
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise UserError(error.problem, "Record the question again, or give another sound file.") from error
    return resample(samples.astype(np.float32, copy=False), sample_rate)


def check_out(path: Path) -> None:
    """Check before any work that a sound file can be written.

    Raises:
        UserError: it cannot.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--out {path} names no kind of sound file that can be written.", f"End it in {', '.join(SUFFIXES)}."
        )
    if path.is_dir():
        raise UserError(f"--out {path} is a folder.", "Name a file in it.")


def write_audio(path: Path, speech: Speech, *, stereo: bool = False) -> None:
    """Write the speech, beside and renamed; 16 bit, mono, or with `stereo` the user on the left and Moshi right.

    Raises:
        UserError: it cannot be written.
    """
    check_out(path)
    samples = np.stack([speech.user, speech.audio], axis=1) if stereo else speech.audio
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.", "Name a file in another folder.") from error
    os.close(handle)
    try:
        soundfile.write(beside, np.clip(samples, -1.0, 1.0), SAMPLE_RATE)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)
        os.replace(beside, path)
    except soundfile.LibsndfileError as error:
        raise UserError(
            f"{path} cannot be written: {error.error_string}", "Free some space, or name a file elsewhere."
        ) from error
    finally:
        Path(beside).unlink(missing_ok=True)


def level_db(samples: np.ndarray) -> float:
    """Return the level of samples, RMS relative to full scale."""
    return float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-12))


class _Heard:
    """What the user says, a frame at a time and without end: room tone, and the question after a lead-in.

    Attributes:
        frames: all that have been heard, `[1920]` each.
    """

    def __init__(self, question: np.ndarray | None, seed: int, lead_in: Frames = 0):
        self.frames: list[np.ndarray] = []
        self._question = np.zeros(0, dtype=np.float32) if question is None else question
        self._lead_in = lead_in
        self._rng = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self._quiet_frame()  # only starts the model, which does not hear it
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


def _choose(speaker: Speaker, emotion: str | None, voice: str | None, strength: float) -> Voice:
    assert speaker.engine.num_slots == 1, f"a speaker with one slot is needed, not {speaker.engine.num_slots}"
    chosen = speaker.choose(emotion, voice)
    check_strength(strength)
    if chosen.adapter is None and strength != 1.0:
        raise UserError(
            f"The strength is {strength:g}, but {chosen.name!r} has no adapter whose strength could be set.",
            "Leave the strength out, or name an adapter that is not merged.",
        )
    return chosen


def _converse(
    speaker: Speaker, heard: _Heard, voice: Voice, emotion: str | None, strength: float, seed: int
) -> Iterator[Frame]:
    """Begin a conversation and yield what Moshi says, frame by frame, as long as it is asked for."""
    speaker.engine.reset(0, seed=seed)
    speaker.steer(0, voice, emotion, strength)
    for frame in heard:
        try:
            said = speaker.engine.step({0: frame})
        except RuntimeError as error:
            raise explain_failure(error, speaker.base_name, 1) from error
        if 0 in said:
            yield said[0]


def _is_silent(frame: Frame) -> bool:
    return level_db(frame.audio) < SILENCE_DB


def _speech(
    speaker: Speaker,
    frames: Sequence[Frame],
    heard: _Heard,
    voice: Voice,
    emotion: str | None,
    strength: float,
    seed: int,
) -> Speech:
    padding_id = speaker.engine.lm.text_padding_token_id
    said = [padding_id if frame.is_forced else frame.text_token for frame in frames]
    words = words_in(said, speaker.tokenizer, speaker.engine.padding_ids)
    return Speech(
        audio=np.concatenate([frame.audio for frame in frames]),
        user=np.concatenate(heard.frames[: len(frames)]),
        text=" ".join(word["word"] for word in words),
        words=words,
        text_tokens=[frame.text_token for frame in frames],
        voice=voice.name,
        emotion=emotion if emotion in voice.emotions else None,
        strength=strength,
        seed=seed,
    )
