"""Parts of a prepared table: the rows of one corpus shard, checked against each other before they are merged.

Each row group of a part holds one emotion. What planning needs of the rows is read back from the part itself.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hf_csm.data.labels import EMOTIONS, UNLABELLED, emotion_name
from hf_csm.data.schema import ALIGNMENT_SOURCES, SPLITS, UTTERANCE_FEATURES
from hf_csm.data.staged_table import Piece
from hf_csm.data.table import ROWS_PER_GROUP, ShardWriter
from hf_csm.errors import UserError
from hf_csm.prepare.builder import CorpusBuilder
from hf_csm.prepare.pool import stop_if_asked
from hf_csm.prepare.utterance import Shard, Tally


PART_KEY = "hf_csm"
"""In the footer of a part: split and tally, as JSON."""


@dataclass(frozen=True)
class RowGroup:
    """What planning needs of one row group of a part."""

    emotion: str
    num_bytes: int
    ids: list[str]
    speaker_ids: list[str]
    sha256s: list[str]
    durations_s: list[float]
    alignment_sources: list[str]


@dataclass(frozen=True)
class Part:
    """A complete part."""

    path: Path
    split: str
    row_groups: list[RowGroup]
    tally: list[list[Any]]


@dataclass
class GroupCounts:
    """What the table holds of one (split, emotion)."""

    num_clips: int = 0
    duration_s: float = 0.0
    speaker_ids: set[str] = field(default_factory=set)
    alignments: Counter[str] = field(default_factory=Counter)


def make_part(builder: CorpusBuilder, shard: Shard, path: Path) -> Part:
    """Write the rows of a corpus shard; at most one row group per emotion is in memory, whatever the shard's size."""
    tally = Tally()
    pending: dict[str, list[dict[str, Any]]] = {}
    with ShardWriter(path, UTTERANCE_FEATURES, statistics=False) as writer:
        for row in builder.rows(shard, tally):
            stop_if_asked()
            emotion = emotion_name(row["emotion"])
            pending.setdefault(emotion, []).append(row)
            if len(pending[emotion]) == ROWS_PER_GROUP:
                writer.write(pending.pop(emotion))
        for emotion in sorted(pending):
            writer.write(pending[emotion])
            writer.end_row_group()
        writer.set_metadata({PART_KEY: json.dumps({"split": shard.split, "tally": tally.rows()})})
    return read_part(path)


def read_part(path: Path) -> Part:
    """Read the facts of a part; the audio stays on disk."""
    columns = ["id", "emotion", "speaker_id", "sha256", "duration_s", "alignment_source"]
    with pq.ParquetFile(path, memory_map=False) as file:
        metadata = file.metadata
        table = file.read(columns=columns, use_threads=False)
    facts = json.loads(metadata.metadata[PART_KEY.encode()])
    row_groups, start = [], 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        rows = table.slice(start, group.num_rows).to_pydict()
        start += group.num_rows
        row_groups.append(
            RowGroup(
                emotion=emotion_name(rows["emotion"][0]),
                num_bytes=group.total_byte_size,
                ids=rows["id"],
                speaker_ids=rows["speaker_id"],
                sha256s=rows["sha256"],
                durations_s=rows["duration_s"],
                alignment_sources=[_source_name(source) for source in rows["alignment_source"]],
            )
        )
    return Part(path, facts["split"], row_groups, facts["tally"])


def plan_pieces(
    parts: list[Part],
) -> tuple[dict[tuple[str, str], list[Piece]], dict[tuple[str, str], GroupCounts], list[tuple[str, str]]]:
    """Check the rows against each other and find what goes into the table.

    Returns:
        the pieces and the counts of each (split, emotion), in the table's order, and the clips that are dropped, as
        (reason, id): copies of a clip of the same split and label, and all clips with the same samples but different
        labels, because none of these labels can be trusted.

    Raises:
        UserError: a recording is in two splits.
    """
    first_of_sha: dict[str, tuple[str, str, str]] = {}
    conflicting: set[str] = set()
    for part in parts:
        for rows in part.row_groups:
            for id_, sha256 in zip(rows.ids, rows.sha256s, strict=True):
                other_id, split, emotion = first_of_sha.setdefault(sha256, (id_, part.split, rows.emotion))
                if split != part.split:
                    raise UserError(
                        f"The same recording is in two splits: {other_id} ({split}) and {id_} ({part.split}).",
                        "Remove one of the two files from the raw corpus.",
                    )
                if emotion != rows.emotion:
                    conflicting.add(sha256)
    dropped: list[tuple[str, str]] = []
    pieces: dict[tuple[str, str], list[Piece]] = {}
    counts: dict[tuple[str, str], GroupCounts] = {}
    for part in parts:
        for index, rows in enumerate(part.row_groups):
            left_out = []
            for row, (id_, sha256) in enumerate(zip(rows.ids, rows.sha256s, strict=True)):
                if sha256 in conflicting:
                    dropped.append(("one recording under two labels", id_))
                elif first_of_sha[sha256][0] != id_:
                    dropped.append(("same samples as another clip of the split", id_))
                else:
                    continue
                left_out.append(row)
            kept = [row for row in range(len(rows.ids)) if row not in left_out]
            if kept:
                group = part.split, rows.emotion
                num_bytes = rows.num_bytes * len(kept) // len(rows.ids)
                pieces.setdefault(group, []).append(Piece(part.path, num_bytes, index, tuple(left_out)))
                count = counts.setdefault(group, GroupCounts())
                count.num_clips += len(kept)
                count.duration_s += sum(rows.durations_s[row] for row in kept)
                count.speaker_ids.update(rows.speaker_ids[row] for row in kept)
                count.alignments.update(rows.alignment_sources[row] for row in kept)
    order = [(split, emotion) for split in SPLITS for emotion in (*EMOTIONS, UNLABELLED)]
    groups = sorted(pieces, key=order.index)
    return {group: pieces[group] for group in groups}, {group: counts[group] for group in groups}, dropped


def _source_name(alignment_source: int | None) -> str:
    return "no transcript" if alignment_source is None else ALIGNMENT_SOURCES[alignment_source]
