"""Compose clips into conversations: the schedule of turns, and the two-channel waveform.

A conversation has one model voice (channel 0), which speaks with one emotion. Between its turns another speaker talks
(channel 1), or there is a pause. Both channels carry room tone throughout: digital silence and copies of the other
channel have taught earlier fine-tunes to fall silent or to echo.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from hf_csm.data.audio import room_tone
from hf_csm.data.table import ROWS_PER_GROUP
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


MODEL = 0
USER = 1
FADE_S = 0.005
BLOCK_CONVERSATIONS = 256
"""Conversations that are encoded together and share their users' clips: at most about 5 hours of audio."""
BLOCK_USER_GROUPS = 64
"""Row groups that the users' clips of a block come from; bounds how often a large table is read."""


@dataclass(frozen=True, slots=True)
class Clip:
    """The spoken part of an utterance row; words and samples stay on disk.

    Attributes:
        place: file and row index.
        emotion: target emotion, or None if the clip can only be used for the user.
        offset: first sample of the row's audio that is used.
        num_samples: number of samples that are used.
    """

    place: tuple[int, int]
    id: str
    speaker_id: str
    language: str | None
    emotion: str | None
    offset: Samples
    num_samples: Samples


def spoken_part(
    duration_s: Seconds, start_s: Seconds | None, end_s: Seconds | None, margin_s: Seconds
) -> tuple[Samples, Samples]:
    """Return offset and number of samples of a clip without the silence before its first and after its last word.

    Corpora of read sentences have about a second of it on either side. If it were kept, the model would learn it as
    the pause before an answer, whatever gap is drawn.

    Args:
        duration_s: of the whole clip.
        start_s: of its first word; `None` if it has no words: then all of it is kept.
        end_s: of its last word.
        margin_s: kept around the words, because word times are not exact.
    """
    if start_s is None or end_s is None:
        return 0, seconds_to_samples(duration_s)
    offset = seconds_to_samples(max(start_s - margin_s, 0.0))
    return offset, seconds_to_samples(min(end_s + margin_s, duration_s)) - offset


@dataclass(frozen=True, slots=True)
class Turn:
    """A clip on a channel, starting at a sample."""

    clip: Clip
    channel: int
    start: Samples

    @property
    def end(self) -> Samples:
        """One past the turn's last sample."""
        return self.start + self.clip.num_samples


@dataclass(frozen=True, slots=True)
class Conversation:
    """A schedule of turns, by time and without overlap, and the seed of its room tone.

    `language` and `emotion` are those of Moshi's channel, `None` if unknown.
    """

    id: str
    speaker_id: str
    language: str | None
    emotion: str | None
    variant: int
    turns: tuple[Turn, ...]
    num_samples: Samples
    seed: int


@dataclass(frozen=True)
class Composition:
    """How conversations are drawn. Ranges are uniform, in seconds or in dB relative to full scale."""

    duration_s: Seconds = 80.0
    """Longest conversation."""
    lead_in_s: tuple[Seconds, Seconds] = (1.0, 2.0)
    """Quiet before the first turn, where the emotion prefix goes."""
    gap_s: tuple[Seconds, Seconds] = (0.2, 0.8)
    """Quiet between turns and after the last."""
    user_turn_share: float = 0.75
    """Share of the gaps before and between Moshi's turns in which the user speaks."""
    room_tone_db: tuple[float, float] = (-70.0, -55.0)
    """Level of the room tone, drawn for each channel."""
    margin_s: Seconds = 0.2
    """Kept of a clip before its first word and after its last."""
    seed: int = 0
    """Random seed."""

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
        for field in dataclasses.fields(self):
            if not np.isfinite(getattr(self, field.name)).all():
                raise UserError(
                    f"The {field.name} of a composition is {getattr(self, field.name)}.", "Give finite numbers."
                )
        if self.seed < 0:
            raise UserError(f"The seed is {self.seed}.", "Give a whole number of at least 0.")


class _UserClips:
    """Clips for the user's turns in a block of conversations: of one language, from some row groups of the table.

    All row groups are used if the table has at most `BLOCK_USER_GROUPS`.
    """

    def __init__(self, clips: Sequence[Clip], seeds: tuple[int, int]):
        self._seeds = seeds
        self._groups: dict[str | None, dict[tuple[int, int], list[Clip]]] = {}
        self._speakers: dict[str, int] = {}
        for clip in clips:
            group = (clip.place[0], clip.place[1] // ROWS_PER_GROUP)
            self._groups.setdefault(clip.language, {}).setdefault(group, []).append(clip)
            self._speakers.setdefault(clip.speaker_id, len(self._speakers))
        self._block: tuple[str, int] | None = None
        self._pools: dict[str | None, tuple[list[Clip], np.ndarray]] = {}

    def of_others(
        self, speaker_id: str, language: str | None, emotion: str, block: int
    ) -> tuple[list[Clip], np.ndarray]:
        """Return the clips of the block, and the indices of those by another speaker."""
        if self._block != (emotion, block):
            self._block, self._pools = (emotion, block), {}
        if language not in self._pools:
            groups = [clips for _, clips in sorted(self._groups[language].items())]
            if len(groups) > BLOCK_USER_GROUPS:
                rng = np.random.default_rng([*self._seeds, zlib.crc32(f"{emotion}/{language}".encode()), block])
                groups = [groups[i] for i in rng.choice(len(groups), BLOCK_USER_GROUPS, replace=False)]
            pool = sorted((clip for clips in groups for clip in clips), key=lambda clip: clip.id)
            self._pools[language] = pool, np.array([self._speakers[clip.speaker_id] for clip in pool])
        pool, speakers = self._pools[language]
        return pool, np.flatnonzero(speakers != self._speakers[speaker_id])


def plan_conversations(clips: Sequence[Clip], composition: Composition, variant: int = 0) -> list[Conversation]:
    """Put each clip with an emotion into exactly one conversation, as one of Moshi's turns.

    All clips must be of one split. A clip too long for `duration_s` is left out; compare ids to count such clips.
    The plan is a pure function of the arguments. Time and memory are linear in the number of clips.

    Returns:
        conversations sorted by emotion, then by the first of the speaker's clips, so that neighbors in the table are
        read together.
    """
    clips_of: dict[tuple[str, str, str | None], list[Clip]] = defaultdict(list)
    for clip in clips:
        if clip.emotion is not None:
            clips_of[clip.emotion, clip.speaker_id, clip.language].append(clip)
    users = _UserClips(clips, (composition.seed, variant))
    conversations: list[Conversation] = []
    num_of_emotion: Counter[str] = Counter()
    num_of_speaker: Counter[tuple[str, str]] = Counter()
    for (emotion, speaker_id, language), own_clips in sorted(clips_of.items(), key=lambda item: item[0][0]):
        name = f"{emotion}/{speaker_id}/{language}"
        rng = np.random.default_rng([composition.seed, variant, zlib.crc32(name.encode())])
        queue = [own_clips[i] for i in rng.permutation(len(own_clips))]
        queue.reverse()
        while queue:
            block = num_of_emotion[emotion] // BLOCK_CONVERSATIONS
            pool, others = users.of_others(speaker_id, language, emotion, block)
            turns, num_samples = _draw_turns(queue, pool, others, composition, rng)
            if not turns:
                continue
            conversations.append(
                Conversation(
                    id=f"{speaker_id}-{emotion}-v{variant}-{num_of_speaker[emotion, speaker_id]:04d}",
                    speaker_id=speaker_id,
                    language=language,
                    emotion=emotion,
                    variant=variant,
                    turns=tuple(turns),
                    num_samples=num_samples,
                    seed=int(rng.integers(2**31)),
                )
            )
            num_of_emotion[emotion] += 1
            num_of_speaker[emotion, speaker_id] += 1
    return conversations


def _draw_turns(
    queue: list[Clip], clips: Sequence[Clip], others: np.ndarray, composition: Composition, rng: np.random.Generator
) -> tuple[list[Turn], Samples]:
    """Take clips off the end of `queue` for one conversation; none if the next clip is too long on its own."""

    def quiet(range_s: tuple[Seconds, Seconds]) -> Samples:
        return seconds_to_samples(rng.uniform(*range_s))

    longest = seconds_to_samples(composition.duration_s) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
    # Conversations of many lengths: a model trained on full windows only does not learn to be brief.
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
        planned.append(Turn(queue.pop(), MODEL, start))
        turns += planned
        now = turns[-1].end + quiet(composition.gap_s)
    if not turns:
        return [], 0
    return turns, samples_to_frames(turns[-1].end + tail) * SAMPLES_PER_FRAME


def compose(
    conversation: Conversation, samples_of: Callable[[Clip], np.ndarray], composition: Composition
) -> np.ndarray:
    """Return the waveform float32 `[2, S]` at 24 kHz: the turns over room tone.

    Args:
        samples_of: returns all samples of a clip's row, float32 `[S]` at 24 kHz.
    """
    rng = np.random.default_rng(conversation.seed)
    waveform = np.stack([room_tone(conversation.num_samples, rng, composition.room_tone_db) for _ in (MODEL, USER)])
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


def words_of(conversation: Conversation, words_in: Callable[[Clip], Sequence[dict]]) -> list[dict]:
    """Return every word with its channel, by time, in seconds from the conversation's first sample.

    Args:
        words_in: returns all words of a clip's row: `word, start_s, end_s` in seconds from the row's first sample.
    """
    words = []
    for turn in conversation.turns:
        shift_s = samples_to_seconds(turn.start - turn.clip.offset)
        for word in words_in(turn.clip):
            words.append(
                {
                    "word": word["word"],
                    "start_s": word["start_s"] + shift_s,
                    "end_s": word["end_s"] + shift_s,
                    "channel": turn.channel,
                }
            )
    return sorted(words, key=lambda word: (word["start_s"], word["end_s"]))


def turns_of(conversation: Conversation) -> list[dict]:
    """Return the turns in the format of `WINDOW_FEATURES`, times in seconds."""
    return [
        {
            "clip_id": turn.clip.id,
            "channel": turn.channel,
            "start_s": turn.start / SAMPLE_RATE,
            "end_s": turn.end / SAMPLE_RATE,
        }
        for turn in conversation.turns
    ]


Item = TypeVar("Item", bound=Conversation)


@dataclass(frozen=True)
class Unit(Generic[Item]):
    """Conversations of one (split, group) of a table that one process encodes together.

    Attributes:
        group: emotion, or `unlabelled`.
        name: unique in the split; sorts in the order of the group's units.
    """

    split: str
    group: str
    name: str
    conversations: list[Item]

    @property
    def duration_s(self) -> Seconds:
        """Total length."""
        return samples_to_seconds(sum(conversation.num_samples for conversation in self.conversations))


def cut_units(split: str, group: str, conversations: Sequence[Item]) -> list[Unit[Item]]:
    """Divide the conversations of a group into units, in order."""
    total = -(-len(conversations) // BLOCK_CONVERSATIONS)
    return [
        Unit(
            split,
            group,
            f"{group}-{index:05d}-of-{total:05d}",
            list(conversations[index * BLOCK_CONVERSATIONS : (index + 1) * BLOCK_CONVERSATIONS]),
        )
        for index in range(total)
    ]
