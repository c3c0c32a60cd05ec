"""Parts of a prepared table: the rows of one corpus shard, checked against each other before they are merged.

Each record batch of a part holds one emotion. The facts for planning are read back from the part itself.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from hf_csm.data.labels import EMOTIONS, UNLABELLED, emotion_name
from hf_csm.data.schema import ALIGNMENT_SOURCES, SPLITS, UTTERANCE_FEATURES
from hf_csm.data.staged_table import Piece, part_writer
from hf_csm.data.table import ROWS_PER_GROUP
from hf_csm.errors import UserError
from hf_csm.prepare.builder import CorpusBuilder
from hf_csm.prepare.pool import stop_if_asked
from hf_csm.prepare.utterance import Shard, Tally


PART_KEY = "hf_csm"
"""Metadata of the last batch of a part, which has no rows: split and tally, as JSON."""
FACTS = ["id", "emotion", "speaker_id", "sha256", "duration_s", "alignment_source"]


@dataclass(frozen=True)
class Batch:
    """Facts of one record batch of a part."""

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
    batches: list[Batch]
    tally: list[list[Any]]


@dataclass
class GroupCounts:
    """Counts of one (split, emotion) of the table."""

    num_clips: int = 0
    duration_s: float = 0.0
    speaker_ids: set[str] = field(default_factory=set)
    alignments: Counter[str] = field(default_factory=Counter)


def make_part(builder: CorpusBuilder, shard: Shard, path: Path) -> Part:
    """Write the rows of a corpus shard; at most one batch per emotion is in memory, whatever the shard's size."""
    schema = UTTERANCE_FEATURES.arrow_schema
    tally = Tally()
    pending: dict[str, list[dict[str, Any]]] = {}
    with part_writer(path, UTTERANCE_FEATURES) as writer:
        for row in builder.rows(shard, tally):
            stop_if_asked()
            emotion = emotion_name(row["emotion"])
            pending.setdefault(emotion, []).append(row)
            if len(pending[emotion]) == ROWS_PER_GROUP:
                writer.write_batch(pa.RecordBatch.from_pylist(pending.pop(emotion), schema=schema))
        for emotion in sorted(pending):
            writer.write_batch(pa.RecordBatch.from_pylist(pending[emotion], schema=schema))
        facts = json.dumps({"split": shard.split, "tally": tally.rows()})
        writer.write_batch(pa.RecordBatch.from_pylist([], schema=schema), custom_metadata={PART_KEY: facts})
    return read_part(path)


def read_part(path: Path) -> Part:
    """Read the facts of a part; the audio stays on disk."""
    batches = []
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        for index in range(file.num_record_batches - 1):
            batch = file.get_batch(index)
            rows = batch.select(FACTS).to_pydict()
            batches.append(
                Batch(
                    emotion=emotion_name(rows["emotion"][0]),
                    num_bytes=batch.nbytes,
                    ids=rows["id"],
                    speaker_ids=rows["speaker_id"],
                    sha256s=rows["sha256"],
                    durations_s=rows["duration_s"],
                    alignment_sources=[_source_name(source) for source in rows["alignment_source"]],
                )
            )
        metadata = file.get_batch_with_custom_metadata(file.num_record_batches - 1).custom_metadata
    facts = json.loads(metadata[PART_KEY.encode()])
    return Part(path, facts["split"], batches, facts["tally"])


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
        for rows in part.batches:
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
        for index, rows in enumerate(part.batches):
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
