import dataclasses
import math

import numpy as np
import pytest

from hf_csm.data.table import ROWS_PER_GROUP
from hf_csm.encode.compose import (
    MODEL,
    USER,
    Clip,
    Composition,
    compose,
    plan_conversations,
    room_tone,
    spoken_part,
    turns_of,
    words_of,
)
from hf_csm.errors import UserError
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME, seconds_to_samples


WORDS = [{"word": "hello", "start_s": 0.5, "end_s": 0.9}, {"word": "there", "start_s": 1.0, "end_s": 1.4}]


def make_clip(number, speaker=0, emotion="happy", *, duration_s=2.0, margin_s=9.0, language="en", row=None):
    place = (0, number if row is None else row)
    part = spoken_part(duration_s + 0.1 * number, 0.5, 1.4, margin_s)
    return Clip(place, f"s{speaker}-{number}", f"s{speaker}", language, emotion, *part)


def make_clips(num_speakers=3, clips_each=6, emotions=("happy", "sad"), **options):
    return [
        make_clip(number, speaker, emotions[number % len(emotions)], row=speaker * clips_each + number, **options)
        for speaker in range(num_speakers)
        for number in range(clips_each)
    ]


def samples_of(clip):
    """A tone whose pitch tells the rows apart."""
    times = np.arange(10 * SAMPLE_RATE) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * (200 + 20 * clip.place[1]) * times)).astype(np.float32)


COMPOSITION = Composition(duration_s=20.0)


def test_a_conversation_has_one_speaker_and_emotion_on_moshis_channel():
    for conversation in plan_conversations(make_clips(), COMPOSITION):
        moshi = [turn.clip for turn in conversation.turns if turn.channel == MODEL]
        assert {clip.speaker_id for clip in moshi} == {conversation.speaker_id}
        assert {clip.emotion for clip in moshi} == {conversation.emotion}


def test_the_user_is_always_another_speaker():
    turns = [
        (conversation.speaker_id, turn.clip.speaker_id)
        for conversation in plan_conversations(make_clips(), COMPOSITION)
        for turn in conversation.turns
        if turn.channel == USER
    ]
    assert turns
    assert all(moshi != user for moshi, user in turns)


def test_every_clip_is_used_for_moshi_exactly_once_in_a_variant():
    clips = make_clips()
    conversations = plan_conversations(clips, COMPOSITION)
    spoken = [t.clip.id for conversation in conversations for t in conversation.turns if t.channel == MODEL]
    assert sorted(spoken) == sorted(clip.id for clip in clips)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("duration_s", [4.0, 9.7, 20.0, 80.0])
def test_turns_never_overlap_and_stay_inside(seed, duration_s):
    composition = Composition(duration_s=duration_s, seed=seed)
    for conversation in plan_conversations(make_clips(clips_each=10), composition):
        ends = [0, *(turn.end for turn in conversation.turns)]
        assert all(turn.start >= end for turn, end in zip(conversation.turns, ends, strict=False))
        assert conversation.turns[0].start >= seconds_to_samples(composition.lead_in_s[0])
        assert ends[-1] <= conversation.num_samples <= seconds_to_samples(duration_s)
        assert conversation.num_samples % SAMPLES_PER_FRAME == 0


def test_there_are_conversations_of_one_turn_and_of_many():
    conversations = plan_conversations(make_clips(clips_each=30), Composition(duration_s=60.0))
    counts = {sum(turn.channel == MODEL for turn in conversation.turns) for conversation in conversations}
    assert max(counts) >= 6
    assert len(counts) >= 4


def test_a_clip_that_fits_no_conversation_is_left_out():
    clips = make_clips(duration_s=2.0)
    conversations = plan_conversations(clips, Composition(duration_s=4.0))
    spoken = {turn.clip.id for conversation in conversations for turn in conversation.turns}
    assert spoken < {clip.id for clip in clips}


def test_unlabelled_clips_are_used_for_the_user_only():
    clips = [*make_clips(2), make_clip(0, speaker=9, emotion=None)]
    turns = [t for c in plan_conversations(clips, COMPOSITION) for t in c.turns]
    assert all(turn.clip.emotion is not None for turn in turns if turn.channel == MODEL)
    assert any(turn.clip.id == "s9-0" for turn in turns)


def test_a_conversation_has_one_language():
    clips = [make_clip(n, speaker, language="en" if speaker < 2 else "zh") for speaker in range(4) for n in range(6)]
    clips += [make_clip(10 + number, speaker=0, language="zh") for number in range(6)]  # one who speaks both
    conversations = plan_conversations(clips, COMPOSITION)
    assert {conversation.language for conversation in conversations} == {"en", "zh"}
    assert all({turn.clip.language for turn in c.turns} == {c.language} for c in conversations)
    assert any(turn.channel == USER for c in conversations for turn in c.turns)
    assert len({conversation.id for conversation in conversations}) == len(conversations)


@pytest.fixture
def many_clips(monkeypatch):
    """300 clips of 60 speakers in a table of 300 row groups; blocks of 10 conversations with users from 4 of them."""
    import hf_csm.encode.compose as module

    monkeypatch.setattr(module, "BLOCK_CONVERSATIONS", 10)
    monkeypatch.setattr(module, "BLOCK_USER_GROUPS", 4)
    return [
        make_clip(number, speaker, row=(5 * speaker + number) * ROWS_PER_GROUP)
        for speaker in range(60)
        for number in range(5)
    ]


def test_the_users_of_a_block_come_from_few_row_groups(many_clips):
    conversations = plan_conversations(many_clips, COMPOSITION)
    blocks = [
        {t.clip.place[1] // ROWS_PER_GROUP for c in conversations[start : start + 10] for t in c.turns if t.channel}
        for start in range(0, len(conversations), 10)
    ]
    assert len(blocks) > 5
    assert all(len(groups) <= 4 for groups in blocks)
    assert len(set.union(*blocks)) > 4 * len(blocks) / 2  # other ones in every block


def test_users_come_from_all_of_a_small_table(many_clips):
    conversations = plan_conversations([dataclasses.replace(c, place=(0, 0)) for c in many_clips], COMPOSITION)
    users = {turn.clip.speaker_id for c in conversations[:40] for turn in c.turns if turn.channel == USER}
    assert len(users) > 20


def test_a_single_speaker_gets_room_tone_on_the_other_channel():
    conversations = plan_conversations(make_clips(num_speakers=1), COMPOSITION)
    assert conversations
    assert all(turn.channel == MODEL for conversation in conversations for turn in conversation.turns)


def test_the_plan_is_a_pure_function_of_its_arguments():
    clips = make_clips()
    assert plan_conversations(clips, COMPOSITION) == plan_conversations(clips, COMPOSITION)
    assert plan_conversations(clips, COMPOSITION, variant=1) != plan_conversations(clips, COMPOSITION, variant=0)
    assert plan_conversations(clips, Composition(duration_s=20.0, seed=1)) != plan_conversations(clips, COMPOSITION)


def test_variants_have_ids_of_their_own():
    clips = make_clips()
    ids = [c.id for variant in range(3) for c in plan_conversations(clips, COMPOSITION, variant)]
    assert len(ids) == len(set(ids))


def test_no_channel_is_digitally_silent_or_a_copy():
    for conversation in plan_conversations(make_clips(), COMPOSITION)[:3]:
        waveform = compose(conversation, samples_of, COMPOSITION)
        assert waveform.shape == (2, conversation.num_samples)
        assert waveform.dtype == np.float32
        frames = waveform.reshape(2, -1, SAMPLES_PER_FRAME)
        assert (frames.std(axis=-1) > 1e-5).all()
        assert abs(np.corrcoef(waveform)[0, 1]) < 0.2


@pytest.mark.parametrize("margin_s", [0.0, 0.2, 9.0])
def test_word_times_match_the_waveform(margin_s):
    """The heart of the text stream: a word is heard where its time says, however much of the clip is cut away."""
    quiet = Composition(duration_s=20.0, room_tone_db=(-90.0, -90.0))
    for conversation in plan_conversations(make_clips(margin_s=margin_s), quiet):
        waveform = compose(conversation, samples_of, quiet)
        words = iter(words_of(conversation, lambda clip: WORDS))
        for turn in conversation.turns:
            for own in WORDS:
                word = next(words)
                assert (word["word"], word["channel"]) == (own["word"], turn.channel)
                # A hundredth of a second into the word: its edge may lie in the fade.
                heard = waveform[word["channel"], seconds_to_samples(word["start_s"] + 0.01) :][:4800]
                meant = samples_of(turn.clip)[seconds_to_samples(own["start_s"] + 0.01) :][:4800]
                assert np.abs(heard - meant).max() < 1e-3
        assert next(words, None) is None


@pytest.mark.parametrize(
    ("duration_s", "start_s", "end_s", "margin_s", "kept_s"),
    [
        (3.0, 0.5, 1.4, 0.2, (0.3, 1.6)),
        (2.0, 0.5, 1.4, 9.0, (0.0, 2.0)),
        (2.0, None, None, 0.2, (0.0, 2.0)),
    ],
    ids=["the quiet is cut to the margin", "a margin never reaches beyond the clip", "without words all is kept"],
)
def test_the_spoken_part_of_a_clip(duration_s, start_s, end_s, margin_s, kept_s):
    offset, num_samples = spoken_part(duration_s, start_s, end_s, margin_s)
    assert (offset, offset + num_samples) == tuple(seconds_to_samples(time_s) for time_s in kept_s)


def test_turns_and_words_are_stored_in_seconds():
    conversation = plan_conversations(make_clips(), COMPOSITION)[0]
    for stored, turn in zip(turns_of(conversation), conversation.turns, strict=True):
        assert stored["clip_id"] == turn.clip.id
        assert stored["end_s"] - stored["start_s"] == pytest.approx(turn.clip.num_samples / SAMPLE_RATE)


@pytest.mark.parametrize("level_db", [-70.0, -55.0])
def test_room_tone_has_the_requested_level(level_db):
    tone = room_tone(100_000, np.random.default_rng(0), (level_db, level_db))
    assert 20 * np.log10(tone.std()) == pytest.approx(level_db, abs=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"duration_s": math.inf},
        {"margin_s": math.nan},
        {"lead_in_s": (1.0, math.inf)},
        {"room_tone_db": (-math.inf, 0.0)},
        {"user_turn_share": math.nan},
    ],
    ids=str,
)
def test_every_number_of_a_composition_is_finite(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} of a composition is .*\nGive finite numbers"):
        Composition(**options)
