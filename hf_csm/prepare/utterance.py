"""Metadata of the files of a corpus before any audio is read: utterances and skipped files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_csm.prepare.archive import Member


@dataclass(frozen=True, slots=True)
class Utterance:
    """The metadata of one clip. Fields as in `UTTERANCE_FEATURES`.

    `emotion_raw` and `emotion_perceived_raw` are the corpus's own labels, keys of the builder's `LABELS`, or `None`
    if there is none; `text` is `None` without a transcript (the row then has an empty text); `words` are the corpus's
    own word times, or `None`; clips of one `sentence_id` must all be in one split.
    """

    id: str
    member: Member
    text: str | None
    emotion_raw: str | None
    speaker_id: str
    split: str
    gender: str | None = None
    language: str = "en"
    intensity: str | None = None
    words: tuple[tuple[str, float, float], ...] | None = None
    sidecars: tuple[Member, ...] = ()
    """Files from which the builder's `complete` reads text or word times."""
    emotion_perceived_raw: str | None = None
    emotion_agreement: float | None = None
    arousal: float | None = None
    valence: float | None = None
    dominance: float | None = None
    sentence_id: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or an entry of the corpus that yields no row.

    Attributes:
        where: the file, or the name in a table.
        reason: completes the sentence "dropped: ...".
        is_fault: whether it is a defect: audio without an entry, or an entry without audio. A corpus with more than
            1 % of them is refused.
        action: "dropped", or "noted" for a remark on a clip that does yield a row.
    """

    where: Member | str
    reason: str
    is_fault: bool = False
    action: str = "dropped"

    @property
    def name(self) -> str:
        """Name of the file or entry."""
        return self.where if isinstance(self.where, str) else self.where.file_name


@dataclass(frozen=True, slots=True)
class Shard:
    """Clips of one split that one process prepares: of one speaker, or of several with one clip each."""

    split: str
    utterances: tuple[Utterance, ...]


@dataclass
class Tally:
    """Counts of dropped, repaired or otherwise changed clips: (action, reason) -> count and one example."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, action: str, reason: str, example: str, count: int = 1) -> None:
        """Count a case; the first example of each is kept."""
        key = (action, reason)
        self.counts[key] = self.counts.get(key, 0) + count
        self.examples.setdefault(key, example)

    def rows(self) -> list[list[Any]]:
        """Return `[action, reason, count, example]` of each case, sorted; plain data for JSON."""
        return [[*key, self.counts[key], self.examples[key]] for key in sorted(self.counts)]

    def add_rows(self, rows: Iterable[Iterable[Any]]) -> None:
        """Add the `rows` of another tally."""
        for action, reason, count, example in rows:
            self.add(action, reason, example, count)
