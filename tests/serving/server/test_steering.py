import json
from dataclasses import replace

import numpy as np
import pytest

from hf_csm.errors import UserError
from hf_csm.models.family import Frame
from hf_csm.serving.server.steering import (
    HANDSHAKE_NOW,
    PAUSE_FRAMES,
    Opening,
    Steering,
    Talk,
    Wish,
    read_control,
    read_query,
)


def frame(token):
    return Frame(token, np.zeros(1920, dtype=np.float32), np.zeros(8))


PADDING, WORD = frame(3), frame(17)


@pytest.fixture
def speaker(fake_speaker):
    return fake_speaker(num_slots=2)


def query(speaker, default_emotion=None, takes_seeds=True, **values):
    return read_query(values, speaker, default_emotion=default_emotion, takes_seeds=takes_seeds)


def test_an_empty_query_is_moshis_own_protocol(speaker):
    assert query(speaker) == Opening(Steering("moody", None, 1.0), None, "opus", False)


def test_what_moshis_web_ui_sends_is_left_alone(speaker):
    assert query(speaker, text_seed="7", audio_seed="7", email="x", text_temperature="?") == query(speaker)


def test_a_query_chooses(speaker):
    opening = query(speaker, emotion="calm", strength="0.5", seed="7", audio="pcm", events="1")
    assert opening == Opening(Steering("calm", "calm", 0.5), 7, "pcm", True)
    assert query(speaker, voice="base").steering == Steering("base", None, 1.0)


def test_the_default_emotion_is_for_those_who_name_neither_emotion_nor_voice(speaker):
    assert query(speaker, "sad").steering == Steering("moody", "sad", 1.0)
    assert query(speaker, "sad", emotion="").steering == Steering("moody", None, 1.0)
    assert query(speaker, "sad", voice="calm").steering == Steering("calm", None, 1.0)


@pytest.mark.parametrize(
    "values",
    [
        {"emotion": "angry"},
        {"voice": "nobody"},
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
def test_a_value_that_cannot_be_is_refused(speaker, values):
    with pytest.raises(UserError):
        query(speaker, **values)


def test_a_seed_is_refused_where_conversations_share_the_random_state(speaker):
    with pytest.raises(UserError, match="several conversations"):
        query(speaker, takes_seeds=False, seed="1")


def test_a_control_message_may_name_any_subset():
    assert read_control('{"type": "steer", "emotion": null}') == Wish(names_emotion=True)
    assert read_control('{"type": "steer", "strength": 0.7}') == Wish(strength=0.7)
    everything = {"type": "steer", "emotion": "sad", "voice": "base", "strength": 2, "now": True}
    assert read_control(json.dumps(everything)) == Wish("base", "sad", True, 2.0, True)


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
def test_what_is_no_control_message_is_said(text):
    with pytest.raises(UserError):
        read_control(text)


@pytest.fixture
def talk(speaker):
    talk = Talk(speaker, 1, Opening(Steering("moody", "happy", 1.0), None, "opus", False))
    assert talk.begin()[0] is HANDSHAKE_NOW
    assert speaker.engine.calls == [("reset", 1, None), ("steer", 1, "moody", "happy", 1.0)]
    speaker.engine.calls.clear()
    return talk


def steering(voice, emotion, strength, pending=None):
    return {"type": "steering", "voice": voice, "emotion": emotion, "strength": strength, "pending": pending}


def tokens_of(things):
    return [thing.text_token for thing in things if isinstance(thing, Frame)]


def test_what_moshi_is_told_is_nothing_it_says(talk):
    told = replace(WORD, is_forced=True)
    assert [tokens_of(talk.hear(said)) for said in (told, WORD, told)] == [[0], [17], [0]]


def test_being_told_is_no_speaking(talk):
    """A second wish does not wait for a pause while the first one is still told."""
    talk.hear(replace(WORD, is_forced=True))
    assert talk.wish(Wish(emotion="sad", names_emotion=True)) == [steering("moody", "sad", 1.0)]


def test_before_moshi_has_spoken_a_wish_takes_effect_at_once(talk, speaker):
    talk.hear(PADDING)
    assert talk.wish(Wish(emotion="sad", names_emotion=True)) == [steering("moody", "sad", 1.0)]
    assert speaker.engine.calls == [("steer", 1, "moody", "sad", 1.0)]


def test_later_it_waits_for_a_pause(talk, speaker):
    talk.hear(WORD)
    wanted = {"voice": "moody", "emotion": "sad", "strength": 1.0}
    assert talk.wish(Wish(emotion="sad", names_emotion=True)) == [steering("moody", "happy", 1.0, wanted)]
    for said in [PADDING] * (PAUSE_FRAMES - 1) + [WORD] + [PADDING] * (PAUSE_FRAMES - 1):
        assert talk.hear(said) == [said]
    assert speaker.engine.calls == []
    assert talk.hear(PADDING) == [PADDING, steering("moody", "sad", 1.0)]
    assert speaker.engine.calls == [("steer", 1, "moody", "sad", 1.0)]
    assert talk.hear(PADDING) == [PADDING]


def test_in_a_pause_it_takes_effect_at_once(talk, speaker):
    for said in [WORD] + [PADDING] * PAUSE_FRAMES:
        talk.hear(said)
    assert talk.wish(Wish(voice="base")) == [steering("base", "happy", 1.0)]


def test_now_does_not_wait_and_repeats(talk, speaker):
    talk.hear(WORD)
    assert talk.wish(Wish(emotion="sad", names_emotion=True, now=True)) == [steering("moody", "sad", 1.0)]
    talk.wish(Wish(now=True))
    assert speaker.engine.calls == [("steer", 1, "moody", "sad", 1.0)] * 2


def test_strength_does_not_wait_and_says_no_prefix_again(talk, speaker):
    talk.hear(WORD)
    assert talk.wish(Wish(strength=0.5)) == [steering("moody", "happy", 0.5)]
    assert speaker.engine.calls == [("weigh", 1, "moody", 0.5)]


def test_strength_stays_with_what_is_pending(talk, speaker):
    talk.hear(WORD)
    talk.wish(Wish(emotion="sad", names_emotion=True))
    wanted = {"voice": "moody", "emotion": "sad", "strength": 0.5}
    assert talk.wish(Wish(strength=0.5)) == [steering("moody", "happy", 0.5, wanted)]
    for _ in range(PAUSE_FRAMES):
        talk.hear(PADDING)
    assert speaker.engine.calls[-1] == ("steer", 1, "moody", "sad", 0.5)


def test_a_later_wish_replaces_what_is_pending_or_takes_it_back(talk, speaker):
    talk.hear(WORD)
    talk.wish(Wish(emotion="sad", names_emotion=True))
    assert talk.wish(Wish(emotion="happy", names_emotion=True)) == [steering("moody", "happy", 1.0)]
    for _ in range(2 * PAUSE_FRAMES):
        talk.hear(PADDING)
    assert speaker.engine.calls == []


def test_an_emotion_brings_a_voice_that_knows_it(talk):
    assert talk.wish(Wish(emotion="calm", names_emotion=True)) == [steering("calm", "calm", 1.0)]
    assert talk.wish(Wish(emotion="sad", names_emotion=True)) == [steering("moody", "sad", 1.0)]


def test_a_voice_keeps_the_emotion_only_if_it_knows_it(talk):
    assert talk.wish(Wish(voice="base")) == [steering("base", "happy", 1.0)]  # to compare with
    assert talk.wish(Wish(voice="moody")) == [steering("moody", "happy", 1.0)]
    assert talk.wish(Wish(voice="calm")) == [steering("calm", None, 1.0)]


@pytest.mark.parametrize("wish", [Wish(voice="nobody"), Wish(emotion="angry", names_emotion=True)])
def test_what_cannot_be_followed_is_said_and_changes_nothing(talk, speaker, wish):
    (answer,) = talk.wish(wish)
    assert answer["type"] == "error"
    assert speaker.engine.calls == []
    assert talk.wish(Wish()) == [steering("moody", "happy", 1.0)]


PAUSE = (PADDING,) * PAUSE_FRAMES
STATES = {
    "before the first frame": (),
    "quiet, nothing said yet": PAUSE,
    "forced text": (replace(WORD, is_forced=True),),
    "speaking": (WORD,),
    "short gap": (WORD, PADDING),
    "pause after speech": (WORD, *PAUSE),
    "speaking, change pending": (WORD, Wish(emotion="sad", names_emotion=True)),
    "pause after a pending change": (WORD, Wish(emotion="sad", names_emotion=True), *PAUSE),
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
def test_every_steering_message_is_answered_in_every_state(talk, speaker, events, message, now):
    for event in events:
        talk.wish(event) if isinstance(event, Wish) else talk.hear(event)
    (answer,) = talk.wish(read_control(json.dumps({"type": "steer", "now": now, **message})))
    assert answer["type"] == "steering"
    wanted = answer["pending"] or answer
    for key, value in message.items():
        assert wanted[key] == value
    if "strength" in message:
        assert answer["strength"] == message["strength"]
    if now or not any(event is WORD for event in events):
        assert answer["pending"] is None
    for _ in PAUSE:  # a pause later the change is in effect, and the engine was told so
        talk.hear(PADDING)
    settled = steering(wanted["voice"], wanted["emotion"], wanted["strength"])
    assert talk.wish(Wish()) == [settled]
    last = {"voice": "moody", "emotion": "happy", "strength": 1.0}
    for kind, _, voice, *values in speaker.engine.calls:
        last = {**last, "voice": voice, "strength": values[-1], **({"emotion": values[0]} if kind == "steer" else {})}
    assert steering(**last) == settled
