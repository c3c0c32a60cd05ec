import json
from dataclasses import replace

import numpy as np
import pytest

from hf_csm.errors import UserError
from hf_csm.models.family import Frame
from hf_csm.serving.server.protocol import Event, Handshake
from hf_csm.serving.server.steering import (
    PAUSE_FRAMES,
    SessionOptions,
    Steering,
    SteeringRequest,
    SteeringState,
    read_control,
    read_query,
)


def frame(token):
    return Frame(token, np.zeros(1920, dtype=np.float32), np.zeros(8))


PADDING, WORD = frame(3), frame(17)


@pytest.fixture
def model(fake_model):
    return fake_model(num_slots=2)


def query(model, default_emotion=None, takes_seeds=True, **values):
    return read_query(values, model, default_emotion=default_emotion, takes_seeds=takes_seeds)


def test_empty_query_is_moshi_protocol(model):
    assert query(model) == SessionOptions(Steering("moody", None, 1.0), None, "opus", False)


def test_parameters_of_moshi_web_ui_are_ignored(model):
    assert query(model, text_seed="7", audio_seed="7", email="x", text_temperature="?") == query(model)


def test_query_options(model):
    options = query(model, emotion="calm", strength="0.5", seed="7", audio="pcm", events="1")
    assert options == SessionOptions(Steering("calm", "calm", 0.5), 7, "pcm", True)
    assert query(model, voice="base").steering == Steering("base", None, 1.0)


def test_default_emotion_applies_without_emotion_and_adapter(model):
    assert query(model, "sad").steering == Steering("moody", "sad", 1.0)
    assert query(model, "sad", emotion="").steering == Steering("moody", None, 1.0)
    assert query(model, "sad", voice="calm").steering == Steering("calm", None, 1.0)


@pytest.mark.parametrize(
    "values",
    [
        {"emotion": "angry"},
        {"voice": "unknown"},
        {"voice": "calm", "emotion": "sad"},
        {"strength": "2.01"},
        {"strength": "-1"},
        {"strength": "nan"},
        {"strength": "much"},
        {"seed": "-1"},
        {"seed": "1.5"},
        {"seed": "٣"},
        {"seed": "9" * 5000},
        {"seed": str(2**63)},
        {"audio": "mp3"},
        {"events": "perhaps"},
    ],
)
def test_invalid_query_values_are_refused(model, values):
    with pytest.raises(UserError):
        query(model, **values)


def test_seed_is_refused_with_several_slots(model):
    with pytest.raises(UserError, match="several slots"):
        query(model, takes_seeds=False, seed="1")


def test_control_message_may_have_any_subset_of_keys():
    assert read_control('{"type": "steer", "emotion": null}') == SteeringRequest(sets_emotion=True)
    assert read_control('{"type": "steer", "strength": 0.7}') == SteeringRequest(strength=0.7)
    everything = {"type": "steer", "emotion": "sad", "voice": "base", "strength": 2, "now": True}
    assert read_control(json.dumps(everything)) == SteeringRequest("base", "sad", True, 2.0, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "[]",
        "null",
        '{"type": "sing"}',
        '{"type": "steer", "mood": "sad"}',
        '{"type": "steer", "emotion": 3}',
        '{"type": "steer", "voice": ["base"]}',
        '{"type": "steer", "strength": NaN}',
        '{"type": "steer", "strength": 1e400}',
        '{"type": "steer", "strength": true}',
        '{"type": "steer", "strength": "1"}',
        '{"type": "steer", "strength": -0.1}',
        '{"type": "steer", "strength": ' + "9" * 5000 + "}",
        '{"type": "steer", "now": 1}',
        "[" * 100_000,
        '{"a":' * 50_000,
    ],
)
def test_invalid_control_messages_are_refused(text):
    with pytest.raises(UserError):
        read_control(text)


@pytest.fixture
def state(model):
    state = SteeringState(model, 1, SessionOptions(Steering("moody", "happy", 1.0), None, "opus", False))
    assert state.start()[0] == Handshake()
    assert model.engine.calls == [("reset", 1, None), ("steer", 1, "moody", "happy", 1.0)]
    model.engine.calls.clear()
    return state


def steering(voice, emotion, strength, pending=None):
    return Event({"type": "steering", "voice": voice, "emotion": emotion, "strength": strength, "pending": pending})


def tokens_of(messages):
    return [message.text_token for message in messages if isinstance(message, Frame)]


def test_forced_text_is_hidden(state):
    forced = replace(WORD, is_forced=True)
    assert [tokens_of(state.on_frame(frame_)) for frame_ in (forced, WORD, forced)] == [[0], [17], [0]]


def test_forced_text_is_not_speech(state):
    """A second request does not wait for a pause while the first prefix is being forced."""
    state.on_frame(replace(WORD, is_forced=True))
    assert state.on_request(SteeringRequest(emotion="sad", sets_emotion=True)) == [steering("moody", "sad", 1.0)]


def test_request_applies_at_once_before_the_first_word(state, model):
    state.on_frame(PADDING)
    assert state.on_request(SteeringRequest(emotion="sad", sets_emotion=True)) == [steering("moody", "sad", 1.0)]
    assert model.engine.calls == [("steer", 1, "moody", "sad", 1.0)]


def test_request_waits_for_a_pause_after_the_first_word(state, model):
    state.on_frame(WORD)
    wanted = {"voice": "moody", "emotion": "sad", "strength": 1.0}
    assert state.on_request(SteeringRequest(emotion="sad", sets_emotion=True)) == [
        steering("moody", "happy", 1.0, wanted)
    ]
    for frame_ in [PADDING] * (PAUSE_FRAMES - 1) + [WORD] + [PADDING] * (PAUSE_FRAMES - 1):
        assert state.on_frame(frame_) == [frame_]
    assert model.engine.calls == []
    assert state.on_frame(PADDING) == [PADDING, steering("moody", "sad", 1.0)]
    assert model.engine.calls == [("steer", 1, "moody", "sad", 1.0)]
    assert state.on_frame(PADDING) == [PADDING]


def test_request_applies_at_once_in_a_pause(state, model):
    for frame_ in [WORD] + [PADDING] * PAUSE_FRAMES:
        state.on_frame(frame_)
    assert state.on_request(SteeringRequest(adapter="base")) == [steering("base", "happy", 1.0)]


def test_now_skips_the_wait_and_repeats_the_prefix(state, model):
    state.on_frame(WORD)
    assert state.on_request(SteeringRequest(emotion="sad", sets_emotion=True, now=True)) == [
        steering("moody", "sad", 1.0)
    ]
    state.on_request(SteeringRequest(now=True))
    assert model.engine.calls == [("steer", 1, "moody", "sad", 1.0)] * 2


def test_strength_applies_at_once_without_a_prefix(state, model):
    state.on_frame(WORD)
    assert state.on_request(SteeringRequest(strength=0.5)) == [steering("moody", "happy", 0.5)]
    assert model.engine.calls == [("set_strength", 1, "moody", 0.5)]


def test_strength_is_kept_by_pending_steering(state, model):
    state.on_frame(WORD)
    state.on_request(SteeringRequest(emotion="sad", sets_emotion=True))
    wanted = {"voice": "moody", "emotion": "sad", "strength": 0.5}
    assert state.on_request(SteeringRequest(strength=0.5)) == [steering("moody", "happy", 0.5, wanted)]
    for _ in range(PAUSE_FRAMES):
        state.on_frame(PADDING)
    assert model.engine.calls[-1] == ("steer", 1, "moody", "sad", 0.5)


def test_later_request_replaces_or_cancels_pending_steering(state, model):
    state.on_frame(WORD)
    state.on_request(SteeringRequest(emotion="sad", sets_emotion=True))
    assert state.on_request(SteeringRequest(emotion="happy", sets_emotion=True)) == [steering("moody", "happy", 1.0)]
    for _ in range(2 * PAUSE_FRAMES):
        state.on_frame(PADDING)
    assert model.engine.calls == []


def test_emotion_selects_an_adapter_that_supports_it(state):
    assert state.on_request(SteeringRequest(emotion="calm", sets_emotion=True)) == [steering("calm", "calm", 1.0)]
    assert state.on_request(SteeringRequest(emotion="sad", sets_emotion=True)) == [steering("moody", "sad", 1.0)]


def test_adapter_keeps_the_emotion_only_if_it_supports_it(state):
    assert state.on_request(SteeringRequest(adapter="base")) == [steering("base", "happy", 1.0)]  # for comparison
    assert state.on_request(SteeringRequest(adapter="moody")) == [steering("moody", "happy", 1.0)]
    assert state.on_request(SteeringRequest(adapter="calm")) == [steering("calm", None, 1.0)]


@pytest.mark.parametrize(
    "request_", [SteeringRequest(adapter="unknown"), SteeringRequest(emotion="angry", sets_emotion=True)]
)
def test_invalid_request_is_answered_with_an_error_and_changes_nothing(state, model, request_):
    (answer,) = state.on_request(request_)
    assert answer.content["type"] == "error"
    assert model.engine.calls == []
    assert state.on_request(SteeringRequest()) == [steering("moody", "happy", 1.0)]


PAUSE = (PADDING,) * PAUSE_FRAMES
STATES = {
    "before the first frame": (),
    "quiet, no word yet": PAUSE,
    "forced text": (replace(WORD, is_forced=True),),
    "speaking": (WORD,),
    "short gap": (WORD, PADDING),
    "pause after speech": (WORD, *PAUSE),
    "speaking, change pending": (WORD, SteeringRequest(emotion="sad", sets_emotion=True)),
    "pause after a pending change": (WORD, SteeringRequest(emotion="sad", sets_emotion=True), *PAUSE),
}
MESSAGES = {
    "empty": {},
    "emotion": {"emotion": "sad"},
    "the same emotion": {"emotion": "happy"},
    "no emotion": {"emotion": None},
    "emotion of another voice": {"emotion": "calm"},
    "voice": {"voice": "calm"},
    "the same voice": {"voice": "moody"},
    "base": {"voice": "base"},
    "strength": {"strength": 0.5},
    "the same strength": {"strength": 1.0},
    "emotion and strength": {"emotion": "sad", "strength": 0.0},
    "everything": {"voice": "moody", "emotion": "sad", "strength": 2.0},
}


@pytest.mark.parametrize("now", [False, True])
@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
@pytest.mark.parametrize("events", STATES.values(), ids=STATES)
def test_every_steering_message_is_answered_in_every_state(state, model, events, message, now):
    for event in events:
        state.on_request(event) if isinstance(event, SteeringRequest) else state.on_frame(event)
    (event,) = state.on_request(read_control(json.dumps({"type": "steer", "now": now, **message})))
    answer = event.content
    assert answer["type"] == "steering"
    wanted = answer["pending"] or answer
    for key, value in message.items():
        assert wanted[key] == value
    if "strength" in message:
        assert answer["strength"] == message["strength"]
    if now or not any(event is WORD for event in events):
        assert answer["pending"] is None
    for _ in PAUSE:  # after a pause the change is in effect in the engine
        state.on_frame(PADDING)
    settled = steering(wanted["voice"], wanted["emotion"], wanted["strength"])
    assert state.on_request(SteeringRequest()) == [settled]
    last = {"voice": "moody", "emotion": "happy", "strength": 1.0}
    for kind, _, voice, *values in model.engine.calls:
        last = {**last, "voice": voice, "strength": values[-1], **({"emotion": values[0]} if kind == "steer" else {})}
    assert steering(**last) == settled
