"""Steering by query parameters and control messages, an extension of moshi's protocol, and when it takes effect."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_csm.errors import UserError
from hf_csm.models.family import Frame
from hf_csm.serving.loaded import MAX_STRENGTH, LoadedModel
from hf_csm.serving.server.protocol import AUDIO_FORMATS, Event, Handshake, Message


PAUSE_FRAMES = 6
"""Consecutive frames without text, 0.48 s, that count as a pause."""
TRUE, FALSE = ("1", "true"), ("0", "false", "")
KEYS = {"type", "emotion", "voice", "strength", "now"}


@dataclass(frozen=True)
class Steering:
    """Adapter, emotion and strength of a conversation."""

    adapter: str
    emotion: str | None
    strength: float

    def to_json(self) -> dict[str, object]:
        """Return the fields under their names in the protocol."""
        return {"voice": self.adapter, "emotion": self.emotion, "strength": self.strength}


@dataclass(frozen=True)
class SteeringRequest:
    """Changes requested by a control message; None leaves a value as it is.

    Attributes:
        emotion: new emotion if `sets_emotion`; None clears it. An earlier prefix stays in the model's context and
            still affects the voice.
        now: do not wait for a pause.
    """

    adapter: str | None = None
    emotion: str | None = None
    sets_emotion: bool = False
    strength: float | None = None
    now: bool = False


@dataclass(frozen=True)
class SessionOptions:
    """Options of a conversation, from the query string."""

    steering: Steering
    seed: int | None
    audio: str
    events: bool


def read_query(
    query: Mapping[str, str], model: LoadedModel, *, default_emotion: str | None, takes_seeds: bool
) -> SessionOptions:
    """Parse the query string. Unknown parameters are ignored: moshi's web UI sends many.

    Raises:
        UserError: a value is invalid.
    """
    voice = query.get("voice") or None
    emotion = query.get("emotion", default_emotion if voice is None else None) or None
    choice = model.choose(emotion, voice)
    seed = query.get("seed")
    if seed is not None:
        if not (seed.isascii() and seed.isdecimal() and len(seed) <= 19 and int(seed) < 2**63):
            raise UserError(f"seed is {seed[:20]!r}.", "Use an integer from 0 to 2^63 - 1.")
        if not takes_seeds:
            raise UserError("seed is not supported by a server with several slots.", "Omit it.")
    audio = query.get("audio", "opus")
    if audio not in AUDIO_FORMATS:
        raise UserError(f"audio is {audio[:20]!r}.", f"Use {' or '.join(AUDIO_FORMATS)}.")
    events = query.get("events", "0").lower()
    if events not in (*TRUE, *FALSE):
        raise UserError(f"events is {events[:20]!r}.", "Use 1 or 0.")
    strength = query.get("strength")
    try:
        number = 1.0 if strength is None else float(strength)
    except ValueError:
        number = math.nan
    if not 0 <= number <= MAX_STRENGTH:
        raise UserError(f"strength is {str(strength)[:20]!r}.", f"Use a number from 0 to {MAX_STRENGTH:g}.")
    steering = Steering(choice.name, emotion, number)
    return SessionOptions(steering, None if seed is None else int(seed), audio, events in TRUE)


def read_control(text: str) -> SteeringRequest:
    """Parse a control message.

    Raises:
        UserError: it is invalid.
    """
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or message.get("type") != "steer":
        raise UserError("Invalid control message.", 'Send {"type": "steer", "emotion": "happy"}.')
    if unknown := sorted(set(message) - KEYS):
        raise UserError(f"Unknown key {unknown[0][:20]!r} in a control message.", f"Use {', '.join(sorted(KEYS))}.")
    emotion, voice, strength, now = (message.get(key) for key in ("emotion", "voice", "strength", "now"))
    if not isinstance(emotion, str | None) or not isinstance(voice, str | None):
        raise UserError("emotion or voice is not a string.", "Use a name from /api/info, or null for no emotion.")
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if strength is not None and not (is_number and 0 <= strength <= MAX_STRENGTH):
        raise UserError("strength is invalid.", f"Use a number from 0 to {MAX_STRENGTH:g}.")
    if not isinstance(now, bool | None):
        raise UserError("now is not a Boolean.", "Use true or false, or omit it.")
    return SteeringRequest(
        voice, emotion, "emotion" in message, None if strength is None else float(strength), bool(now)
    )


class SteeringState:
    """Steering state machine of the conversation in a slot. Called only from the engine's thread, in audio order.

    Changes of the strength apply at once; others wait for a pause once the model has spoken. Each method returns the
    messages to send.
    """

    def __init__(self, model: LoadedModel, slot: int, options: SessionOptions):
        self._model, self._slot, self._seed = model, slot, options.seed
        self._steering = options.steering
        self._pending: Steering | None = None
        self._num_padding = 0
        self._has_spoken = False

    def start(self) -> list[Message]:
        """Reset the slot and apply the initial steering."""
        self._model.engine.reset(self._slot, seed=self._seed)
        self._apply(self._steering)
        return [Handshake(), self._event()]

    def on_request(self, request: SteeringRequest) -> list[Message]:
        """Apply a request at once or at the next pause; an invalid one is answered with an error."""
        try:
            target = self._resolve(request)
        except UserError as error:
            return [error_event(error)]
        if target.strength != self._steering.strength:
            self._steering = replace(self._steering, strength=target.strength)
            choice = self._model.choose(None, self._steering.adapter)
            self._model.set_strength(self._slot, choice, target.strength)
        if request.now or not self._has_spoken:
            if request.now or target != self._steering:
                self._apply(target)
        else:
            self._pending = target if target != self._steering else None
            self._apply_pending_in_pause()
        return [self._event()]

    def on_frame(self, frame: Frame) -> list[Message]:
        """Track pauses in a generated frame; hide forced text from the client."""
        padding_ids = self._model.engine.padding_ids
        if frame.is_forced:
            frame = replace(frame, text_token=min(padding_ids))
        if frame.text_token in padding_ids:
            self._num_padding += 1
        else:
            self._num_padding, self._has_spoken = 0, True
        return [frame, self._event()] if self._apply_pending_in_pause() else [frame]

    def _resolve(self, request: SteeringRequest) -> Steering:
        """Merge a request into the pending or current steering; keep the adapter if it supports the emotion."""
        base = self._pending or self._steering
        emotion = request.emotion if request.sets_emotion else base.emotion
        if request.adapter is not None:
            choice = self._model.choose(None, request.adapter)
            if request.sets_emotion:
                choice = self._model.choose(emotion, request.adapter)
            elif emotion not in choice.emotions and choice.index is not None:
                emotion = None
        else:
            choice = self._model.choose(None, base.adapter)
            if request.sets_emotion and emotion is not None and emotion not in choice.emotions:
                choice = self._model.choose(emotion)
        return Steering(choice.name, emotion, base.strength if request.strength is None else request.strength)

    def _apply_pending_in_pause(self) -> bool:
        if self._pending is None or self._num_padding < PAUSE_FRAMES:
            return False
        self._apply(self._pending)
        return True

    def _apply(self, steering: Steering) -> None:
        self._steering, self._pending = steering, None
        choice = self._model.choose(None, steering.adapter)
        self._model.steer(self._slot, choice, steering.emotion, steering.strength)

    def _event(self) -> Event:
        pending = None if self._pending is None else self._pending.to_json()
        return Event({"type": "steering", **self._steering.to_json(), "pending": pending})


def error_event(error: UserError) -> Event:
    """Return the error message for a client."""
    return Event({"type": "error", "message": f"{error.problem} {error.remedy}"})
