"""The rows of one shard on their way into a prepared table: written once, read once, merged by split and emotion.

A part is an Arrow file whose batches hold one emotion each, and a JSON file that describes it. The JSON is written
last: a part without it does not exist.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hf_csm.data.labels import EMOTIONS, UNLABELLED, emotion_name
from hf_csm.data.schema import ALIGNMENT_SOURCES, SPLITS, UTTERANCE_FEATURES
from hf_csm.data.table import ROWS_PER_GROUP, ShardWriter, equal_files
from hf_csm.errors import UserError
from hf_csm.prepare.builder import CorpusBuilder
from hf_csm.prepare.pool import stop_if_asked
from hf_csm.prepare.utterance import Shard, Tally


@dataclass(frozen=True)
class Batch:
    """One batch of a part: rows of one emotion."""

    emotion: str
    num_bytes: int
    ids: list[str]
    speaker_ids: list[str]
    sha256s: list[str]
    durations_s: list[float]
    alignment_sources: list[str]


@dataclass(frozen=True)
class Part:
    """A finished part: where it is and what it holds."""

    path: str
    split: str
    batches: list[Batch]
    tally: list[list[Any]]


@dataclass(frozen=True)
class Piece:
    """A batch of a part as it goes into the table; `dropped` are rows of the batch that do not."""

    path: str
    batch_index: int
    speaker_ids: frozenset[str]
    num_rows: int
    num_bytes: int
    duration_s: float
    alignments: dict[str, int]
    dropped: tuple[int, ...]


def make_part(builder: CorpusBuilder, shard: Shard, path: Path) -> Part:
    """Write the rows of a shard; memory is bounded by one batch of rows per emotion, whatever the shard's size."""
    schema = UTTERANCE_FEATURES.arrow_schema
    tally = Tally()
    pending: dict[str, list[dict[str, Any]]] = {}
    batches: list[Batch] = []
    unfinished = path.with_suffix(".arrow.tmp")
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def flush(emotion: str) -> None:
            rows = pending.pop(emotion)
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            batches.append(
                Batch(
                    emotion=emotion,
                    num_bytes=sum(len(row["audio"]["bytes"]) for row in rows),
                    ids=[row["id"] for row in rows],
                    speaker_ids=[row["speaker_id"] for row in rows],
                    sha256s=[row["sha256"] for row in rows],
                    durations_s=[row["duration_s"] for row in rows],
                    alignment_sources=[_source_name(row["alignment_source"]) for row in rows],
                )
            )

        for row in builder.rows(shard, tally):
            stop_if_asked()
            emotion = emotion_name(row["emotion"])
            pending.setdefault(emotion, []).append(row)
            if len(pending[emotion]) == ROWS_PER_GROUP:
                flush(emotion)
        for emotion in sorted(pending):
            flush(emotion)
    os.replace(unfinished, path)
    part = Part(str(path), shard.split, batches, tally.rows())
    facts = dataclasses.asdict(part)
    del facts["path"]
    mark = path.with_suffix(".json")
    mark.with_suffix(".tmp").write_text(json.dumps(facts))
    os.replace(mark.with_suffix(".tmp"), mark)
    return part


def read_part(path: Path) -> Part | None:
    """Return the part at `path`, `None` if it was not finished."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
    except FileNotFoundError:
        return None
    batches = [Batch(**batch) for batch in facts.pop("batches")]
    return Part(path=str(path), batches=batches, **facts)


def plan_pieces(parts: list[Part]) -> tuple[dict[tuple[str, str], list[list[Piece]]], list[tuple[str, str]]]:
    """Check the rows against each other and lay out the files of the table.

    Returns:
        for each split and emotion the pieces of each of its files, and the clips that are dropped, as (reason, id):
        those whose samples came before in the same split with the same label, and all that share their samples under
        different labels, because none of these can be trusted.

    Raises:
        UserError: a speaker or a recording is in two splits.
    """
    split_of_speaker: dict[str, str] = {}
    first_of_sha: dict[str, tuple[str, str, str]] = {}
    conflicting: set[str] = set()
    for part in parts:
        for batch in part.batches:
            for id_, speaker_id, sha256 in zip(batch.ids, batch.speaker_ids, batch.sha256s, strict=True):
                split = split_of_speaker.setdefault(speaker_id, part.split)
                if split != part.split:
                    raise UserError(
                        f"Speaker {speaker_id} is in two splits: {split} and {part.split}.",
                        "Keep all clips of a speaker in one split.",
                    )
                other_id, other_split, emotion = first_of_sha.setdefault(sha256, (id_, split, batch.emotion))
                if other_split != split:
                    raise UserError(
                        f"The same recording is in two splits: {other_id} ({other_split}) and {id_} ({split}).",
                        "Remove one of the two files from the raw corpus.",
                    )
                if emotion != batch.emotion:
                    conflicting.add(sha256)
    dropped: list[tuple[str, str]] = []
    by_cell: dict[tuple[str, str], list[Piece]] = {}
    for part in parts:
        for batch_index, batch in enumerate(part.batches):
            rows = []
            for row_index, (id_, sha256) in enumerate(zip(batch.ids, batch.sha256s, strict=True)):
                if sha256 in conflicting:
                    dropped.append(("one recording under two labels", id_))
                elif first_of_sha[sha256][0] != id_:
                    dropped.append(("same samples as another clip of the split", id_))
                else:
                    continue
                rows.append(row_index)
            piece = _piece(part, batch_index, batch, tuple(rows))
            if piece.num_rows:
                by_cell.setdefault((part.split, batch.emotion), []).append(piece)
    order = (*EMOTIONS, UNLABELLED)
    cells = sorted(by_cell, key=lambda cell: (SPLITS.index(cell[0]), order.index(cell[1])))
    return {cell: _files(by_cell[cell]) for cell in cells}, dropped


def merge_pieces(pieces: list[Piece], path: Path) -> None:
    """Write one file of the table from pieces of parts, a few batches in memory at a time."""
    with ShardWriter(path, UTTERANCE_FEATURES) as writer:
        for piece in pieces:
            stop_if_asked()
            with pa.memory_map(piece.path) as source:
                batch = pa.ipc.open_file(source).get_batch(piece.batch_index)
            table = pa.Table.from_batches([batch])
            if piece.dropped:
                table = table.take([row for row in range(len(table)) if row not in set(piece.dropped)])
            writer.write(table)


def _piece(part: Part, batch_index: int, batch: Batch, dropped: tuple[int, ...]) -> Piece:
    kept = [row for row in range(len(batch.ids)) if row not in dropped]
    alignments: dict[str, int] = {}
    for row in kept:
        source = batch.alignment_sources[row]
        alignments[source] = alignments.get(source, 0) + 1
    return Piece(
        path=part.path,
        batch_index=batch_index,
        speaker_ids=frozenset(batch.speaker_ids[row] for row in kept),
        num_rows=len(kept),
        num_bytes=batch.num_bytes * len(kept) // len(batch.ids),
        duration_s=sum(batch.durations_s[row] for row in kept),
        alignments=alignments,
        dropped=dropped,
    )


def _files(pieces: list[Piece]) -> list[list[Piece]]:
    """Deal the pieces of a cell to files of equal size, in order."""
    ends = equal_files([piece.num_bytes for piece in pieces])
    return [pieces[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _source_name(alignment_source: int | None) -> str:
    return "no transcript" if alignment_source is None else ALIGNMENT_SOURCES[alignment_source]
