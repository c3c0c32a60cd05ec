"""Conversations to a table of codes: composed of the clips of a prepared corpus, encoded in batches, part by part."""

from __future__ import annotations

import dataclasses
import hashlib
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
from hf_csm.data.table import SplitInfo, write_card
from hf_csm.encode.compose import Composition, Conversation, turns_of
from hf_csm.encode.prepared_corpus import EncodeReport, PreparedCorpus, count_cells, plan_shards
from hf_csm.encode.staging import Staging, Unit
from hf_csm.models.family import Codec
from hf_csm.units import SAMPLES_PER_FRAME, samples_to_seconds


__all__ = ["EncodeReport", "encode", "encode_units", "plan_shards", "window_table"]

WINDOWS_VERSION = 2
"""Part of the fingerprint: raise it when the same input gives other windows."""
GPU_BATCH_S = 640.0
CPU_BATCH_S = 80.0
"""Larger batches fall out of a processor's caches."""

Item = TypeVar("Item", bound=Conversation)
Item_contra = TypeVar("Item_contra", bound=Conversation, contravariant=True)


class Sound(Protocol[Item_contra]):
    """What is heard and said in the conversations of a unit."""

    def waveform(self, conversation: Item_contra) -> np.ndarray:
        """Return float32 `[2, S]` at 24 kHz."""

    def words(self, conversation: Item_contra) -> list[dict]:
        """Return the words as `WINDOW_FEATURES` has them."""


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

    Parts are written beside `out`, which is there when it is whole; a run that was stopped goes on after its last
    part. With the same arguments but `rank`, several processes share the work, on any machines that see both folders.

    Args:
        prepared: folder that `prepare` wrote.
        codec: of the base model.
        codec_sha256: hash that names the codec in the card.
        variants: different sets of conversations from the same clips.
        label: which emotion of a clip counts: `acted`, `perceived`, or `agreed` for those where both are the same.
        batch_s: most seconds of audio in a batch, padding and both channels included; by default 640 on a GPU and
            80 on a CPU, where larger batches fall out of its caches.
        rank: number of this process.
        world_size: number of processes that share the work.

    Raises:
        UserError: `prepared` is no prepared corpus, has no such labels or gives no conversation, or `out` holds
            something else.
    """
    composition = composition or Composition()
    corpus = PreparedCorpus(prepared)
    units, dropped = corpus.plan(composition, variants, label)
    metadata = {
        **{key: corpus.card[key] for key in ("corpus", "builder", "title", "license", "notice")},
        "codec_sha256": codec_sha256,
        "composition": dataclasses.asdict(composition),
        "variants": variants,
        "label": label,
        "prepared_fingerprint": corpus.card["fingerprint"],
    }
    return encode_units(
        units,
        lambda conversations: corpus.read(conversations, composition),
        out,
        codec,
        metadata,
        EncodeReport(count_cells(units), dropped),
        batch_s=batch_s,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )


def encode_units(
    units: Sequence[Unit[Item]],
    read: Callable[[Sequence[Item]], Sound[Item]],
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
    """Encode this process's share of the units and publish the table if no other process has work left.

    Args:
        read: gives sound and words of a unit's conversations.
        metadata: what the table depends on, and `corpus, title, license, notice` for the card.
        report: for the card.

    Returns:
        the report; it says whether the table is in its place.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    batch_s = batch_s or (GPU_BATCH_S if codec.device.type == "cuda" else CPU_BATCH_S)
    facts = {"stage": "codes", "version": WINDOWS_VERSION, "num_codebooks": codec.num_codebooks, **metadata}
    facts = json.loads(json.dumps(facts))
    facts["fingerprint"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    staging = Staging(out, facts["fingerprint"])
    if staging.is_published():
        return replace(report, is_new=False)
    own_units = units[rank::world_size]
    total_s = sum(unit.duration_s for unit in own_units)
    with tqdm(total=round(total_s), unit="s", desc=f"encode {facts['corpus']}", disable=not progress) as bar:
        for unit in own_units:
            if staging.has(unit):
                bar.update(round(unit.duration_s))
                continue
            try:
                with staging.part(unit, WINDOW_FEATURES) as writer:
                    for table in _encode_unit(unit, read(unit.conversations), facts["corpus"], codec, batch_s, bar):
                        writer.write(table)
            except FileNotFoundError:  # another run with the same settings was faster and removed all that was staged
                if not staging.is_published():
                    raise
                return report

    def card(table: Path, splits: Mapping[str, SplitInfo]) -> None:
        write_card(
            table,
            features=WINDOW_FEATURES,
            title=f"{facts['title']}: Mimi codes of conversations",
            license=facts["license"],
            splits=splits,
            metadata=facts,
            body=_card_body(report, facts),
            languages=sorted({c.language for unit in units for c in unit.conversations if c.language is not None}),
        )

    return replace(report, is_complete=staging.publish_table(units, WINDOW_FEATURES, card))


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
    unit: Unit[Item], sound: Sound[Item], corpus: str, codec: Codec, batch_s: float, bar: tqdm
) -> list[pa.Table]:
    """Encode the conversations of a unit, longest batches first; return their rows in order."""
    tables: dict[str, pa.Table] = {}
    for batch in _batches(unit.conversations, batch_s):
        waveforms = [sound.waveform(conversation) for conversation in batch]
        for conversation, codes in zip(batch, codec.encode(waveforms), strict=True):
            words = sound.words(conversation)
            tables[conversation.id] = window_table(conversation, codes, corpus, unit.split, words)
        bar.update(round(sum(samples_to_seconds(conversation.num_samples) for conversation in batch)))
    return [tables[conversation.id] for conversation in unit.conversations]


def _batches(conversations: Sequence[Item], batch_s: float) -> list[list[Item]]:
    """Put conversations of like length together, two channels each, up to `batch_s` seconds with padding."""
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
