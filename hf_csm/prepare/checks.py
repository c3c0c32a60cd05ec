"""Checks of a builder's listing (labels, faults, leaks between splits), its division into shards, and its hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from hf_csm.data.labels import map_label
from hf_csm.data.schema import SPLITS
from hf_csm.errors import UserError
from hf_csm.prepare.archive import Member
from hf_csm.prepare.utterance import Shard, Skipped, Tally, Utterance


SHARD_CLIPS = 128
"""Maximum clips of a shard; a killed run loses at most this much work per process."""
MOST_FAULTS = 0.01
"""Maximum share of clips without audio or without an entry."""


def list_clips(
    found: Iterable[Utterance | Skipped], labels: Mapping[str, str | None], title: str
) -> tuple[list[Shard], Tally]:
    """Check what a builder found and divide it into shards, by split, speaker and id.

    Args:
        found: from the builder; of several clips with one id, the first is used.
        labels: the builder's `LABELS`.
        title: of the corpus, for messages.

    Returns:
        the shards, none if there are no clips, and the tally of dropped files.

    Raises:
        UserError: an unknown label, too many faults, or a speaker or sentence in two splits.
    """
    tally = Tally()
    by_id: dict[str, Utterance] = {}
    faults: dict[str, list[str]] = {}
    for item in found:
        if isinstance(item, Skipped):
            tally.add(item.action, item.reason, item.name)
            if item.is_fault:
                faults.setdefault(item.reason, []).append(item.name)
        elif item.id in by_id:
            tally.add("dropped", "second copy of a file", str(item.member))
        else:
            for raw in (item.emotion_raw, item.emotion_perceived_raw):
                if raw is not None:
                    map_label(raw, labels, str(item.member))
            by_id[item.id] = item
    _refuse_many(faults, len(by_id), title)
    refuse_leaks(by_id.values())
    return _divide(by_id.values()), tally


def refuse_leaks(utterances: Iterable[Utterance]) -> None:
    """Check that no speaker and no sentence is in two splits.

    Raises:
        UserError: one is; names both clips.
    """
    first_of: dict[tuple[str, str], Utterance] = {}
    for utterance in utterances:
        for kind, key in (("Speaker", utterance.speaker_id), ("Sentence", utterance.sentence_id)):
            if key is None:
                continue
            first = first_of.setdefault((kind, key), utterance)
            if first.split != utterance.split:
                raise UserError(
                    f"{kind} {key} is in two splits: {first.split} ({first.id}) and {utterance.split} "
                    f"({utterance.id}).",
                    f"Keep all clips of a {kind.lower()} in one split.",
                )


def looks_like(members: Sequence[Member], patterns: Mapping[str, re.Pattern[str]]) -> tuple[str, int] | None:
    """Return the corpus whose file names most of `members` have, and how many; `None` if none has any."""
    counts = {
        title: sum(pattern.fullmatch(member.file_name) is not None for member in members)
        for title, pattern in patterns.items()
    }
    title = max(counts, key=lambda title: counts[title], default=None)
    return None if title is None or not counts[title] else (title, counts[title])


def hash_listing(shards: Iterable[Shard]) -> str:
    """Return a hash of name, size and description of every clip, independent of location and dates.

    A file that was replaced by another of the same size does not change it, but changes `hash_shard`.
    """
    names = [facts.name for facts in dataclasses.fields(Utterance) if facts.name not in ("member", "sidecars")]
    digest = hashlib.sha256()
    for shard in shards:
        for utterance in shard.utterances:
            facts = [getattr(utterance, name) for name in names]
            sizes = [member.num_bytes for member in (utterance.member, *utterance.sidecars)]
            digest.update(repr([*facts, *sizes]).encode())
    return digest.hexdigest()[:16]


def hash_shard(shard: Shard) -> str:
    """Return a hash of a shard's listing and of the modification times of its files or their zips."""
    members = [member for clip in shard.utterances for member in (clip.member, *clip.sidecars)]
    facts = [hash_listing([shard]), *map(_changed_at_ns, members)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _changed_at_ns(member: Member) -> int | None:
    path = member.source if member.is_zipped else os.path.join(member.source, member.name)
    try:
        return os.stat(path).st_mtime_ns
    except OSError:  # reported when it is read
        return None


def _refuse_many(faults: Mapping[str, Sequence[str]], num_clips: int, title: str) -> None:
    for reason, names in faults.items():
        if len(names) > MOST_FAULTS * (num_clips + len(names)):
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            raise UserError(
                f"{title}: {len(names):,} of {num_clips + len(names):,} clips: {reason}: "
                f"{', '.join(names[:5])}{more}.",
                f"Up to {MOST_FAULTS:.0%} is dropped and reported; more means that files are missing or that "
                "audio and labels are of two releases. Complete the corpus, or remove what has no counterpart.",
            )


def _divide(utterances: Iterable[Utterance]) -> list[Shard]:
    """Make one shard per speaker, several for one with many clips; speakers with a single clip share shards."""
    by_speaker: dict[tuple[int, str], list[Utterance]] = {}
    for utterance in sorted(utterances, key=lambda utterance: utterance.id):
        by_speaker.setdefault((SPLITS.index(utterance.split), utterance.speaker_id), []).append(utterance)
    groups: list[list[Utterance]] = []
    for _, clips in sorted(by_speaker.items()):
        is_shared = bool(groups) and len(clips) == 1 and groups[-1][0].speaker_id != groups[-1][-1].speaker_id
        follows_one = bool(groups) and len(clips) == 1 and len(groups[-1]) == 1
        if (is_shared or follows_one) and groups[-1][0].split == clips[0].split:
            groups[-1] += clips
        else:
            groups.append(clips)
    return [
        Shard(clips[0].split, tuple(clips[first : first + SHARD_CLIPS]))
        for clips in groups
        for first in range(0, len(clips), SHARD_CLIPS)
    ]
