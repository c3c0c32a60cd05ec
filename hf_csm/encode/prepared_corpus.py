"""The conversations of a prepared corpus: planned from ids and times alone; audio and words are read later."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_csm.data.audio import decode_audio
from hf_csm.data.labels import EMOTIONS, UNLABELLED
from hf_csm.data.schema import SPLITS, UTTERANCE_FEATURES
from hf_csm.data.table import ParquetRows, read_columns, split_files
from hf_csm.encode.compose import (
    MODEL,
    Clip,
    Composition,
    Conversation,
    Unit,
    compose,
    cut_units,
    plan_conversations,
    spoken_part,
    words_of,
)
from hf_csm.errors import UserError
from hf_csm.hub import check_table


LABELS = {
    "acted": "without an emotion label",
    "perceived": "without a perceived emotion",
    "agreed": "without a perceived emotion that is the acted one",
}
"""The emotion label of a clip: acted, perceived by raters, or only where both agree. The value is the reason in the
report for clips without that label, which can still be used for the user."""


class PreparedCorpus:
    """A prepared corpus to compose conversations from.

    Args:
        folder: written by `prepare`.

    Attributes:
        card: metadata of its card.

    Raises:
        UserError: the folder is not a prepared corpus, is incomplete, or was written by another version.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.card = check_table(self.folder, "prepared", UTTERANCE_FEATURES)
        self.files = [path for split in SPLITS for path in split_files(folder, split)]
        self._rows = ParquetRows(self.files, columns=["audio", "words"], cache_bytes=0)

    def plan(
        self, composition: Composition, variants: int, label: str
    ) -> tuple[list[Unit[Conversation]], dict[str, int]]:
        """Call `plan_units` on the files of this corpus.

        Raises:
            UserError: the plan has no conversation.
        """
        units, dropped = plan_units(self.files, composition, variants, label)
        if not units:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it has no clips"
            raise UserError(
                f"No clip of {self.folder} fits a conversation of {composition.duration_s:g} seconds: {reasons}.",
                "Give a longer --duration-sec or a shorter --lead-in-s, or prepare with transcripts and labels.",
            )
        return units, dropped

    def facts(self, composition: Composition, variants: int, label: str) -> dict[str, Any]:
        """Return what conversations depend on, for the fingerprint and the card of a table of them."""
        return {
            **{key: self.card[key] for key in ("corpus", "builder", "title", "license", "notice")},
            "composition": dataclasses.asdict(composition),
            "variants": variants,
            "label": label,
            "prepared_fingerprint": self.card["fingerprint"],
        }

    def read(self, conversations: Sequence[Conversation], composition: Composition) -> Clips:
        """Read the clips of some conversations, each row group once."""
        places = sorted({turn.clip.place for conversation in conversations for turn in conversation.turns})
        return Clips({place: self._rows.row(*place) for place in places}, composition)


@dataclass(frozen=True)
class Clips:
    """The rows of some clips by place, audio still compressed."""

    rows: dict[tuple[int, int], dict]
    composition: Composition

    def waveform(self, conversation: Conversation) -> np.ndarray:
        """Compose a conversation: float32 `[2, S]`."""
        return compose(conversation, lambda clip: decode_audio(self.rows[clip.place]["audio"]), self.composition)

    def words(self, conversation: Conversation) -> list[dict]:
        """Return the words of a conversation in the format of `WINDOW_FEATURES`."""
        return words_of(conversation, lambda clip: self.rows[clip.place]["words"])


def plan_units(
    files: Sequence[Path], composition: Composition, variants: int, label: str = "acted"
) -> tuple[list[Unit[Conversation]], dict[str, int]]:
    """Plan all conversations of all splits, in units of one emotion each; also count the clips left out, by reason.

    Args:
        files: of the prepared corpus; a clip's `place` is an index into this list and a row.
        label: a key of `LABELS`.

    Raises:
        UserError: perceived emotions are asked for and the corpus has none.
    """
    if label not in LABELS:
        raise UserError(f"There is no label {label!r}.", f"Choose from {', '.join(LABELS)}.")
    clips: dict[str, list[Clip]] = defaultdict(list)
    dropped: Counter[str] = Counter()
    has_perceived = False
    for split, clip, reason, is_perceived in _clips(files, composition.margin_s, label):
        clips[split].append(clip)
        has_perceived |= is_perceived
        if reason is not None:
            dropped[reason] += 1
    if clips and label != "acted" and not has_perceived:
        raise UserError(
            f"--label {label} needs emotions as perceived by raters; this corpus has none.", "Give --label acted."
        )
    units: list[Unit[Conversation]] = []
    for split in SPLITS:
        groups = defaultdict(list)
        spoken: set[str] = set()
        for variant in range(variants):
            for conversation in plan_conversations(clips[split], composition, variant):
                groups[conversation.emotion or UNLABELLED].append(conversation)
                spoken.update(turn.clip.id for turn in conversation.turns if turn.channel == MODEL)
        for emotion, conversations in sorted(groups.items()):
            units += cut_units(split, emotion, conversations)
        labelled = sum(clip.emotion is not None for clip in clips[split])
        dropped["longer than a conversation may be"] += labelled - len(spoken)
    return units, {reason: count for reason, count in dropped.items() if count}


def _clips(files: Sequence[Path], margin_s: float, label: str) -> Iterator[tuple[str, Clip, str | None, bool]]:
    """Yield split, clip, the reason why it has no emotion (or `None`), and whether it has a perceived emotion."""
    times = ["words.list.element.start_s", "words.list.element.end_s"]  # the words themselves stay on disk
    columns = ["id", "speaker_id", "language", "split", "emotion", "emotion_perceived", "duration_s"]
    for file_index, file in enumerate(files):
        table = read_columns([file], [*columns, *times]).combine_chunks()
        words = table.column("words").combine_chunks()
        bounds = words.offsets.to_numpy()
        starts_s, ends_s = (words.values.field(name).to_numpy() for name in ("start_s", "end_s"))
        rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
        for row_index, (id_, speaker_id, language, split, acted, perceived, duration_s) in enumerate(rows):
            first, end = bounds[row_index], bounds[row_index + 1]
            has_words = first < end
            start_s, end_s = (float(starts_s[first]), float(ends_s[end - 1])) if has_words else (None, None)
            number = {"acted": acted, "perceived": perceived, "agreed": acted if acted == perceived else None}[label]
            reason = LABELS[label] if number is None else None if has_words else "without a transcript"
            clip = Clip(
                (file_index, row_index),
                id_,
                sys.intern(speaker_id),
                sys.intern(language),
                EMOTIONS[number] if number is not None and has_words else None,
                *spoken_part(duration_s, start_s, end_s, margin_s),
            )
            yield split, clip, reason, perceived is not None
