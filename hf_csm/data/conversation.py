"""Clips to conversations: who speaks when, and the two-channel waveform of it.

A conversation has one Moshi voice (channel 0) that speaks with one emotion. Between its turns another speaker talks
(channel 1), or nobody does. Both channels carry room tone from the first sample to the last: digital silence and a
copy of the other channel are what taught earlier fine-tunes to fall silent or to echo.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_csm.errors import UserError
from hf_csm.units import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    Samples,
    Seconds,
    samples_to_frames,
    samples_to_seconds,
    seconds_to_samples,
)


MOSHI = 0
USER = 1
FADE_S = 0.005


@dataclass(frozen=True)
class Clip:
    """The spoken part of an utterance row.

    Attributes:
        place: file and row where its samples are.
        emotion: target emotion, or None if the clip can only be the user's.
        offset: first sample of the row's audio that is used.
        num_samples: that are used.
        words: `word, start_s, end_s`, seconds from the first sample used.
    """

    place: tuple[int, int]
    id: str
    speaker_id: str
    emotion: str | None
    offset: Samples
    num_samples: Samples
    words: tuple[dict, ...]


def trimmed_clip(row: dict, place: tuple[int, int], emotion: str | None, margin_s: Seconds) -> Clip:
    """Return an utterance row without the quiet before its first word and after its last.

    Corpora of read sentences carry a second of it on either side. Kept, it would be the pause that Moshi learns to
    make before it answers, whatever gap is drawn.

    Args:
        row: `id, speaker_id, duration_s, words` of an utterance; without words, all of it is kept.
        margin_s: kept around the words, because word times are not exact.
    """
    words = row["words"]
    start_s = max(words[0]["start_s"] - margin_s, 0.0) if words else 0.0
    end_s = min(words[-1]["end_s"] + margin_s, row["duration_s"]) if words else row["duration_s"]
    offset = seconds_to_samples(start_s)
    shift_s = samples_to_seconds(offset)
    return Clip(
        place=place,
        id=row["id"],
        speaker_id=row["speaker_id"],
        emotion=emotion,
        offset=offset,
        num_samples=seconds_to_samples(end_s) - offset,
        words=tuple(
            {"word": word["word"], "start_s": word["start_s"] - shift_s, "end_s": word["end_s"] - shift_s}
            for word in words
        ),
    )


@dataclass(frozen=True)
class Turn:
    """A clip on a channel from a sample on."""

    clip: Clip
    channel: int
    start: Samples

    @property
    def end(self) -> Samples:
        """One past the turn's last sample."""
        return self.start + self.clip.num_samples


@dataclass(frozen=True)
class Conversation:
    """A plan: turns in order of time, none overlapping, and the seed of its room tone."""

    id: str
    speaker_id: str
    emotion: str
    variant: int
    turns: tuple[Turn, ...]
    num_samples: Samples
    seed: int


@dataclass(frozen=True)
class Composition:
    """How conversations are drawn. Ranges are uniform, in seconds or in decibels relative to full scale."""

    duration_s: Seconds = 80.0
    """Longest conversation."""
    lead_in_s: tuple[Seconds, Seconds] = (1.0, 2.0)
    """Quiet before the first turn; the emotion prefix is given there."""
    gap_s: tuple[Seconds, Seconds] = (0.2, 0.8)
    """Quiet between turns and after the last."""
    user_turn_share: float = 0.75
    """Share of the places between Moshi's turns in which the user speaks."""
    room_tone_db: tuple[float, float] = (-70.0, -55.0)
    """Level of the room tone, drawn for each channel."""
    margin_s: Seconds = 0.2
    """What is kept of a clip before its first word and after its last."""

    def __post_init__(self) -> None:
        for name in ("lead_in_s", "gap_s"):
            low, high = getattr(self, name)
            if not 0.0 <= low <= high:
                raise UserError(
                    f"The range {name} of a composition is {low:g} to {high:g} seconds.",
                    "Give the smaller number first, neither below 0.",
                )
        if not self.duration_s > 0.0:
            raise UserError(
                f"Conversations of {self.duration_s:g} seconds were asked for.", "Give more than 0 seconds."
            )
        if self.seed < 0:
            raise UserError(f"The seed is {self.seed}.", "Give a whole number of at least 0.")

    seed: int = 0
    """Seed of every draw."""


def plan_conversations(clips: Sequence[Clip], composition: Composition, variant: int = 0) -> list[Conversation]:
    """Compose each clip with an emotion into one conversation, as a turn of Moshi's.

    All clips must be of one split. A clip too long for `duration_s` is left out; compare ids to count such clips.
    The plan is a pure function of the arguments.

    Returns:
        Conversations sorted by emotion, then speaker.
    """
    voices: dict[tuple[str, str], list[Clip]] = defaultdict(list)
    for clip in clips:
        if clip.emotion is not None:
            voices[clip.emotion, clip.speaker_id].append(clip)
    ordered = sorted(clips, key=lambda clip: clip.id)
    speakers = np.array([clip.speaker_id for clip in ordered])
    conversations: list[Conversation] = []
    for (emotion, speaker_id), own_clips in sorted(voices.items()):
        rng = np.random.default_rng([composition.seed, variant, zlib.crc32(f"{emotion}/{speaker_id}".encode())])
        others = np.flatnonzero(speakers != speaker_id)
        queue = [own_clips[i] for i in rng.permutation(len(own_clips))]
        queue.reverse()
        number = 0
        while queue:
            turns, num_samples = _draw_turns(queue, ordered, others, composition, rng)
            if not turns:
                continue
            conversations.append(
                Conversation(
                    id=f"{speaker_id}-{emotion}-v{variant}-{number:04d}",
                    speaker_id=speaker_id,
                    emotion=emotion,
                    variant=variant,
                    turns=tuple(turns),
                    num_samples=num_samples,
                    seed=int(rng.integers(2**31)),
                )
            )
            number += 1
    return conversations


def _draw_turns(
    queue: list[Clip], clips: Sequence[Clip], others: np.ndarray, composition: Composition, rng: np.random.Generator
) -> tuple[list[Turn], Samples]:
    """Take clips off the end of `queue` for one conversation; none if the next clip is too long by itself."""

    def quiet(range_s: tuple[Seconds, Seconds]) -> Samples:
        return seconds_to_samples(rng.uniform(*range_s))

    longest = seconds_to_samples(composition.duration_s) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
    # Whole conversations of many lengths: a model that has seen only full windows does not know how to be brief.
    target = rng.uniform(0.5, 1.0) * longest
    tail = quiet(composition.gap_s)
    turns: list[Turn] = []
    now = quiet(composition.lead_in_s)
    while queue:
        start = now
        planned = []
        if len(others) and rng.random() < composition.user_turn_share:
            user_clip = clips[others[rng.integers(len(others))]]
            planned.append(Turn(user_clip, USER, start))
            start += user_clip.num_samples + quiet(composition.gap_s)
        if turns and (start + queue[-1].num_samples + tail > target):
            break
        if start + queue[-1].num_samples + tail > longest:
            if planned:
                planned, start = [], now  # the clip may fit without the user's turn
            if start + queue[-1].num_samples + tail > longest:
                queue.pop()
                break
        planned.append(Turn(queue.pop(), MOSHI, start))
        turns += planned
        now = turns[-1].end + quiet(composition.gap_s)
    if not turns:
        return [], 0
    return turns, samples_to_frames(turns[-1].end + tail) * SAMPLES_PER_FRAME


def compose(
    conversation: Conversation, samples_of: Callable[[Clip], np.ndarray], composition: Composition
) -> np.ndarray:
    """Return the waveform float32 `[2, S]` at 24 kHz: each turn at its place, over room tone.

    Args:
        samples_of: gives all samples of a clip's row, float32 `[S]` at 24 kHz.
    """
    rng = np.random.default_rng(conversation.seed)
    waveform = np.stack([room_tone(conversation.num_samples, rng, composition.room_tone_db) for _ in (MOSHI, USER)])
    fade = np.linspace(0.0, 1.0, seconds_to_samples(FADE_S), dtype=np.float32)
    for turn in conversation.turns:
        clip = turn.clip
        samples = np.array(samples_of(clip)[clip.offset : clip.offset + clip.num_samples], dtype=np.float32)
        assert samples.shape == (clip.num_samples,), (samples.shape, clip.num_samples)
        if len(samples) >= 2 * len(fade):
            samples[: len(fade)] *= fade
            samples[-len(fade) :] *= fade[::-1]
        waveform[turn.channel, turn.start : turn.end] += samples
    return np.clip(waveform, -1.0, 1.0)


def room_tone(num_samples: Samples, rng: np.random.Generator, level_db: tuple[float, float]) -> np.ndarray:
    """Return noise float32 `[S]` that falls off towards high frequencies, at a level drawn in dB of full scale."""
    smoothing = 8
    noise = rng.standard_normal(num_samples + smoothing - 1, dtype=np.float32)
    noise = np.convolve(noise, np.full(smoothing, smoothing**-0.5, dtype=np.float32), mode="valid")
    return noise * np.float32(10.0 ** (rng.uniform(*level_db) / 20.0))


def words_of(conversation: Conversation) -> list[dict]:
    """Return every word with its channel, in seconds from the conversation's first sample, in order of time."""
    words = []
    for turn in conversation.turns:
        offset_s = samples_to_seconds(turn.start)
        for word in turn.clip.words:
            words.append(
                {
                    "word": word["word"],
                    "start_s": offset_s + word["start_s"],
                    "end_s": offset_s + word["end_s"],
                    "channel": turn.channel,
                }
            )
    return sorted(words, key=lambda word: (word["start_s"], word["end_s"]))


def turns_of(conversation: Conversation) -> list[dict]:
    """Return the turns as a codes table stores them, times in seconds."""
    return [
        {
            "clip_id": turn.clip.id,
            "channel": turn.channel,
            "start_s": turn.start / SAMPLE_RATE,
            "end_s": turn.end / SAMPLE_RATE,
        }
        for turn in conversation.turns
    ]
