"""What a client may ask for beyond moshi's protocol, by query and by control messages, and when it takes effect."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from hf_csm.errors import UserError
from hf_csm.models.family import Frame
from hf_csm.serving.loaded import MAX_STRENGTH
from hf_csm.serving.resolve import Voice
from hf_csm.serving.server.protocol import AUDIO_FORMATS


PAUSE_FRAMES = 6
"""Frames without text in a row, 0.48 s, that are taken for a pause."""
HANDSHAKE_NOW = object()
"""Among what `Talk` gives: the slot is ready."""
TRUE, FALSE = ("1", "true"), ("0", "false", "")
KEYS = {"type", "emotion", "voice", "strength", "now"}


class SpeakerLike(Protocol):
    """The part of `voices.Speaker` that steering uses."""

    engine: Any

    def choose(self, emotion: str | None, voice: str | None = None) -> Voice: ...

    def steer(self, slot: int, voice: Voice, emotion: str | None, strength: float = 1.0) -> None: ...

    def weigh(self, slot: int, voice: Voice, strength: float) -> None: ...


@dataclass(frozen=True)
class Steering:
    """How Moshi speaks, or is to speak."""

    voice: str
    emotion: str | None
    strength: float


@dataclass(frozen=True)
class Wish:
    """What a control message asks to change.

    Attributes:
        emotion: None is a wish, too, where `names_emotion`: that none be asked for any more. What was told before
            stays in Moshi's context and goes on colouring what it says.
        now: do not wait for a pause.
    """

    voice: str | None = None
    emotion: str | None = None
    names_emotion: bool = False
    strength: float | None = None
    now: bool = False


@dataclass(frozen=True)
class Opening:
    """What the query of a connection asks for."""

    steering: Steering
    seed: int | None
    audio: str
    events: bool


def read_query(
    query: Mapping[str, str], speaker: SpeakerLike, *, default_emotion: str | None, takes_seeds: bool
) -> Opening:
    """Return what a conversation begins with; other parameters are left alone, as moshi's web UI sends many.

    Raises:
        UserError: a value that cannot be.
    """
    voice = query.get("voice") or None
    emotion = query.get("emotion", default_emotion if voice is None else None) or None
    chosen = speaker.choose(emotion, voice)
    seed = query.get("seed")
    if seed is not None:
        if not (seed.isascii() and seed.isdecimal() and len(seed) <= 19 and int(seed) < 2**63):
            raise UserError(f"seed is {seed[:20]!r}.", "Give a whole number from 0 to 2^63 - 1.")
        if not takes_seeds:
            raise UserError("This server takes no seed: it holds several conversations.", "Leave it out.")
    audio = query.get("audio", "opus")
    if audio not in AUDIO_FORMATS:
        raise UserError(f"audio is {audio[:20]!r}.", f"Give {' or '.join(AUDIO_FORMATS)}.")
    events = query.get("events", "0").lower()
    if events not in (*TRUE, *FALSE):
        raise UserError(f"events is {events[:20]!r}.", "Give 1 or 0.")
    strength = query.get("strength")
    try:
        number = 1.0 if strength is None else float(strength)
    except ValueError:
        number = math.nan
    if not 0 <= number <= MAX_STRENGTH:
        raise UserError(f"strength is {str(strength)[:20]!r}.", f"Give a number from 0 to {MAX_STRENGTH:g}.")
    return Opening(Steering(chosen.name, emotion, number), None if seed is None else int(seed), audio, events in TRUE)


def read_control(text: str) -> Wish:
    """Return what a control message asks for.

    Raises:
        UserError: it is not one.
    """
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or message.get("type") != "steer":
        raise UserError("Not a control message.", 'Send {"type": "steer", "emotion": "happy"}.')
    if unknown := sorted(set(message) - KEYS):
        raise UserError(f"Unknown in a control message: {unknown[0][:20]!r}.", f"Known are {', '.join(sorted(KEYS))}.")
    emotion, voice, strength, now = (message.get(key) for key in ("emotion", "voice", "strength", "now"))
    if not isinstance(emotion, str | None) or not isinstance(voice, str | None):
        raise UserError("emotion or voice is no text.", "Give a name of /api/info; null for no emotion.")
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if strength is not None and not (is_number and 0 <= strength <= MAX_STRENGTH):
        raise UserError("strength is no number within bounds.", f"Give one from 0 to {MAX_STRENGTH:g}.")
    if not isinstance(now, bool | None):
        raise UserError("now is neither true nor false.", "Give one of them, or leave it out.")
    return Wish(voice, emotion, "emotion" in message, None if strength is None else float(strength), bool(now))


class Talk:
    """Steering of the conversation in a slot. Only the engine's thread calls it, in the order of the audio.

    Each method returns what is to be delivered: `HANDSHAKE_NOW`, frames, and messages as dictionaries.
    """

    def __init__(self, speaker: SpeakerLike, slot: int, opening: Opening):
        self._speaker, self._slot, self._seed = speaker, slot, opening.seed
        self._steering = opening.steering
        self._pending: Steering | None = None
        self._num_padding = 0
        self._has_spoken = False

    def begin(self) -> list[object]:
        """Start anew in the slot, whatever was in it before."""
        self._speaker.engine.reset(self._slot, seed=self._seed)
        self._apply(self._steering)
        return [HANDSHAKE_NOW, self._message()]

    def wish(self, wish: Wish) -> list[object]:
        """Follow a wish, at once or at the next pause; what cannot be followed is answered and changes nothing."""
        try:
            wanted = self._resolve(wish)
        except UserError as error:
            return [error_message(error)]
        if wanted.strength != self._steering.strength:
            self._steering = replace(self._steering, strength=wanted.strength)
            voice = self._speaker.choose(None, self._steering.voice)
            self._speaker.weigh(self._slot, voice, wanted.strength)
        if wish.now or not self._has_spoken:
            if wish.now or wanted != self._steering:
                self._apply(wanted)
        else:
            self._pending = wanted if wanted != self._steering else None
            self._apply_pending_in_pause()
        return [self._message()]

    def hear(self, frame: Frame) -> list[object]:
        """Take note of what Moshi said."""
        padding_ids = self._speaker.engine.padding_ids
        if frame.is_forced:
            frame = replace(frame, text_token=min(padding_ids))
        if frame.text_token in padding_ids:
            self._num_padding += 1
        else:
            self._num_padding, self._has_spoken = 0, True
        return [frame, self._message()] if self._apply_pending_in_pause() else [frame]

    @property
    def _is_pause(self) -> bool:
        return self._num_padding >= PAUSE_FRAMES

    def _resolve(self, wish: Wish) -> Steering:
        """A wish adds to what is already wanted; a voice is kept where it can do what is asked."""
        wanted = self._pending or self._steering
        emotion = wish.emotion if wish.names_emotion else wanted.emotion
        if wish.voice is not None:
            voice = self._speaker.choose(None, wish.voice)
            if wish.names_emotion:
                voice = self._speaker.choose(emotion, wish.voice)
            elif emotion not in voice.emotions and voice.adapter is not None:
                emotion = None
        else:
            voice = self._speaker.choose(None, wanted.voice)
            if wish.names_emotion and emotion is not None and emotion not in voice.emotions:
                voice = self._speaker.choose(emotion)
        return Steering(voice.name, emotion, wanted.strength if wish.strength is None else wish.strength)

    def _apply_pending_in_pause(self) -> bool:
        if self._pending is None or not self._is_pause:
            return False
        self._apply(self._pending)
        return True

    def _apply(self, steering: Steering) -> None:
        self._steering, self._pending = steering, None
        voice = self._speaker.choose(None, steering.voice)
        self._speaker.steer(self._slot, voice, steering.emotion, steering.strength)

    def _message(self) -> dict[str, object]:
        pending = None if self._pending is None else asdict(self._pending)
        return {"type": "steering", **asdict(self._steering), "pending": pending}


def error_message(error: UserError) -> dict[str, object]:
    """Return the message that tells a client what is wrong with its own."""
    return {"type": "error", "message": f"{error.problem} {error.remedy}"}
