"""Encode: compose the clips of a prepared corpus into conversations and encode them to a table of codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from hf_csm.data.labels import emotion_id
from hf_csm.data.schema import WINDOW_FEATURES
from hf_csm.data.staged_table import (
    InUseError,
    Piece,
    StagedTable,
    fingerprint_of,
    merge_pieces,
    part_writer,
    plan_shards,
)
from hf_csm.data.table import count_splits, write_card
from hf_csm.encode.compose import Composition, Conversation, Item, Unit, turns_of
from hf_csm.encode.prepared_corpus import PreparedCorpus
from hf_csm.encode.report import EncodeReport, count_groups
from hf_csm.models.family import Codec
from hf_csm.units import SAMPLES_PER_FRAME, samples_to_seconds


WINDOWS_VERSION = 2
"""Part of the fingerprint: raise it when the same input gives other windows."""
GPU_BATCH_S = 640.0
CPU_BATCH_S = 80.0
"""Larger batches do not fit the processor's caches."""

Item_contra = TypeVar("Item_contra", bound=Conversation, contravariant=True)


class ConversationSource(Protocol[Item_contra]):
    """Gives the audio and the words of the conversations of a unit."""

    def waveform(self, conversation: Item_contra) -> np.ndarray:
        """Return float32 `[2, S]` at 24 kHz."""

    def words(self, conversation: Item_contra) -> list[dict]:
        """Return the words in the format of `WINDOW_FEATURES`."""


def encode(
    prepared: Path,
    out: Path,
    codec: Codec,
    codec_sha256: str,
    *,
    composition: Composition | None = None,
    variants: int = 1,
    label: str = "acted",
    batch_s: float | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> EncodeReport:
    """Compose the clips of a prepared corpus into conversations and encode them.

    Parts are staged beside `out` and published together; a run that was stopped continues after its last part. Called
    with the same arguments except `rank`, several processes share the work, on any machines that see both folders.

    Args:
        variants: number of sets of conversations to compose from the same clips.
        label: selects the emotion label: `acted`, `perceived`, or `agreed` (only clips where both are equal).
        batch_s: maximum seconds of audio in a batch, including padding and both channels; by default 640 on a GPU and
            80 on a CPU.

    Raises:
        UserError: `prepared` is not a prepared corpus, lacks the labels or yields no conversation, or `out` holds
            something else.
    """
    composition = composition or Composition()
    corpus = PreparedCorpus(prepared)
    units, dropped = corpus.plan(composition, variants, label)
    return encode_units(
        units,
        lambda conversations: corpus.read(conversations, composition),
        out,
        codec,
        {**corpus.facts(composition, variants, label), "codec_sha256": codec_sha256},
        EncodeReport(count_groups(units), dropped),
        batch_s=batch_s,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )


def encode_units(
    units: Sequence[Unit[Item]],
    read: Callable[[Sequence[Item]], ConversationSource[Item]],
    out: Path,
    codec: Codec,
    metadata: Mapping[str, Any],
    report: EncodeReport,
    *,
    batch_s: float | None,
    rank: int,
    world_size: int,
    progress: bool,
) -> EncodeReport:
    """Encode this process's share of the units; publish the table if no other process has work left.

    Args:
        read: returns audio and words of a unit's conversations.
        metadata: what the table depends on, and `corpus, title, license, notice` for the card.
        report: for the card.

    Returns:
        the report, with `is_complete` set if the table is published.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    batch_s = batch_s or (GPU_BATCH_S if codec.device.type == "cuda" else CPU_BATCH_S)
    facts = {"stage": "codes", "version": WINDOWS_VERSION, "num_codebooks": codec.num_codebooks, **metadata}
    facts = json.loads(json.dumps(facts))
    facts["fingerprint"] = fingerprint_of(facts)
    staged = StagedTable(out, facts["fingerprint"])
    if staged.is_published():
        return replace(report, is_new=False)
    parts = [staged.part(f"{facts['fingerprint'][:12]}/{unit.split}/{unit.name}") for unit in units]
    staged.folder.mkdir(parents=True, exist_ok=True)  # fails now rather than after the first unit
    share = list(zip(units, parts, strict=True))[rank::world_size]
    total_s = sum(unit.duration_s for unit, _ in share)
    with tqdm(total=round(total_s), unit="s", desc=f"encode {facts['corpus']}", disable=not progress) as bar:
        for unit, part in share:
            if part.exists():
                bar.update(round(unit.duration_s))
                continue
            try:
                with part_writer(part, WINDOW_FEATURES, compression="zstd") as writer:
                    for table in _encode_unit(unit, read(unit.conversations), facts["corpus"], codec, batch_s, bar):
                        writer.write_table(table)
            except FileNotFoundError:  # another run with the same settings published and removed the staging folder
                if not staged.is_published():
                    raise
                break
    return replace(report, is_complete=_publish(staged, units, parts, facts, report))


def _publish(
    staged: StagedTable, units: Sequence[Unit], parts: Sequence[Path], facts: Mapping[str, Any], report: EncodeReport
) -> bool:
    """Merge the parts and publish the table, unless parts are missing or another process does it.

    Returns:
        whether the table is published now.
    """
    if not all(part.exists() for part in parts) and not staged.is_published():
        return False
    try:
        with staged.lock(timeout_s=0.0):
            if staged.is_published():
                staged.remove()
                return True
            groups: dict[tuple[str, str], list[Piece]] = {}
            for unit, part in zip(units, parts, strict=True):
                groups.setdefault((unit.split, unit.group), []).append(Piece(part, part.stat().st_size))
            table = staged.table(staged.fingerprint[:12])
            for path, pieces in plan_shards(table, groups).items():
                if not path.exists():
                    merge_pieces(pieces, path, WINDOW_FEATURES, compression="zstd")
            write_card(
                table,
                features=WINDOW_FEATURES,
                title=f"{facts['title']}: Mimi codes of conversations",
                license=facts["license"],
                splits=count_splits(table),
                metadata=facts,
                body=_card_body(report, facts),
                languages=sorted({c.language for unit in units for c in unit.conversations if c.language is not None}),
            )
            staged.publish(table)
            return True
    except InUseError:
        return staged.is_published()


def window_table(
    conversation: Conversation, codes: np.ndarray, corpus: str, split: str, words: Sequence[dict] = ()
) -> pa.Table:
    """Return the window row of a conversation, its `codes` (int16 `[2, Q, T]`) and its words as a table."""
    schema = WINDOW_FEATURES.arrow_schema
    row = {
        "id": f"{corpus}-{conversation.id}",
        "corpus": corpus,
        "split": split,
        "emotion": emotion_id(conversation.emotion),
        "speaker_id": conversation.speaker_id,
        "language": conversation.language,
        "codes": None,
        "num_frames": codes.shape[2],
        "words": list(words),
        "turns": turns_of(conversation),
        "variant": conversation.variant,
    }
    table = pa.Table.from_pylist([row], schema=schema)
    nested: pa.Array = pa.array(codes.reshape(-1))  # no Python object for each of a hundred thousand codes
    for size in (codes.shape[2], codes.shape[1], codes.shape[0]):
        nested = pa.ListArray.from_arrays(pa.array(range(0, len(nested) + 1, size), pa.int32()), nested)
    return table.set_column(schema.get_field_index("codes"), schema.field("codes"), nested)


def _encode_unit(
    unit: Unit[Item], source: ConversationSource[Item], corpus: str, codec: Codec, batch_s: float, bar: tqdm
) -> list[pa.Table]:
    """Encode the conversations of a unit, longest first; return their rows in order."""
    tables: dict[str, pa.Table] = {}
    for batch in _batches(unit.conversations, batch_s):
        waveforms = [source.waveform(conversation) for conversation in batch]
        for conversation, codes in zip(batch, codec.encode(waveforms), strict=True):
            words = source.words(conversation)
            tables[conversation.id] = window_table(conversation, codes, corpus, unit.split, words)
        bar.update(round(sum(samples_to_seconds(conversation.num_samples) for conversation in batch)))
    return [tables[conversation.id] for conversation in unit.conversations]


def _batches(conversations: Sequence[Item], batch_s: float) -> list[list[Item]]:
    """Batch conversations of similar length, two channels each, up to `batch_s` seconds including padding."""
    batches: list[list[Item]] = []
    for conversation in sorted(conversations, key=lambda c: (-c.num_samples, c.id)):
        longest_s = samples_to_seconds(batches[-1][0].num_samples) if batches else 0.0
        if not batches or 2 * longest_s * (len(batches[-1]) + 1) > batch_s:
            batches.append([])
        batches[-1].append(conversation)
    return batches


def _card_body(report: EncodeReport, facts: Mapping[str, Any]) -> str:
    origin = (
        f"The dialogues of `{facts['manifest']}`, both channels as recorded,"
        if "manifest" in facts
        else f"Conversations composed from the corpus {facts['corpus']!r}"
    )
    settings = {
        "codec (SHA-256 of its weights and configuration)": facts["codec_sha256"],
        "composition": json.dumps(facts["composition"]),
        **{key: facts[key] for key in ("label", "variants") if key in facts},
    }
    lines = "\n".join(f"- {name}: `{value}`" for name, value in settings.items())
    return (
        f"{origin} encoded with Mimi, {facts['num_codebooks']} codebooks, {SAMPLES_PER_FRAME} samples a frame.\n"
        f"`codes` is `[2, Q, T]`: Moshi's channel, then the user's.\n\n"
        f"{lines}\n\n```\n{report.render()}\n```\n\n"
        f"## Terms of the corpus\n\n{facts['notice']}\n"
    )
