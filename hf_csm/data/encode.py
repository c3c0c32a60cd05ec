"""Prepared utterances to a table of codes: compose conversations, encode them, shard by shard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from hf_csm.data.audio import decode_audio
from hf_csm.data.codec import encode_waveforms
from hf_csm.data.conversation import (
    Composition,
    Conversation,
    compose,
    plan_conversations,
    trimmed_clip,
    turns_of,
    words_of,
)
from hf_csm.data.labels import EMOTIONS
from hf_csm.data.schema import SPLITS, WINDOW_FEATURES
from hf_csm.data.table import (
    ParquetRows,
    ShardWriter,
    SplitInfo,
    read_card_metadata,
    read_columns,
    shard_name,
    split_files,
    write_card,
)
from hf_csm.errors import UserError
from hf_csm.units import SAMPLES_PER_FRAME, samples_to_seconds


if TYPE_CHECKING:
    from moshi.models import MimiModel

SHARD_CONVERSATIONS = 256
"""Conversations in a shard: about 5 hours and 25 MB of 32-codebook codes at the most."""
AUDIO_CACHE_BYTES = 512 << 20
"""Memory for the clips' audio: a user's turn may be any clip of the split."""


@dataclass(frozen=True)
class EncodeReport:
    """What `encode` made.

    Attributes:
        cells: conversations and hours for each (split, emotion).
        dropped: clips left out, by reason.
    """

    cells: dict[tuple[str, str], tuple[int, float]]
    dropped: dict[str, int]

    def render(self) -> str:
        """Return the report as a text table."""
        lines = [f"{'split':<12}{'emotion':<12}{'conversations':>14}{'hours':>9}"]
        for (split, emotion), (count, hours) in sorted(
            self.cells.items(), key=lambda item: (SPLITS.index(item[0][0]), item[0][1])
        ):
            lines.append(f"{split:<12}{emotion:<12}{count:>14}{hours:>9.3f}")
        lines += [f"dropped: {count} clips, {reason}" for reason, count in sorted(self.dropped.items())]
        return "\n".join(lines)


@dataclass(frozen=True)
class Shard:
    """The conversations of one file of the table."""

    split: str
    name: str
    conversations: list[Conversation]


def encode(
    prepared: Path,
    out: Path,
    mimi: MimiModel,
    codec_sha256: str,
    *,
    composition: Composition | None = None,
    variants: int = 1,
    batch_s: float | None = None,
    progress: bool = True,
) -> EncodeReport:
    """Compose the clips of a prepared corpus into conversations and encode them with Mimi.

    Shards are written beside `out` and the folder is renamed when it is whole; a run that was stopped goes on after
    its last shard.

    Args:
        prepared: folder that `prepare` wrote.
        mimi: codec of the base model, all codebooks active.
        codec_sha256: hash that names the codec in the card.
        variants: different sets of conversations from the same clips.
        batch_s: most seconds of audio in a batch, padding and both channels included; by default 640 on a GPU and
            80 on a CPU, where larger batches fall out of its caches.

    Raises:
        UserError: `prepared` is no prepared corpus, or `out` holds something else.
    """
    composition = composition or Composition()
    batch_s = batch_s or (640.0 if next(mimi.parameters()).is_cuda else 80.0)
    prepared, out = Path(prepared), Path(out)
    card = read_card_metadata(prepared)
    if card.get("stage") != "prepared":
        raise UserError(f"{prepared} is not a prepared corpus.", "Run `hf-csm prepare` and give its output here.")
    metadata = {
        "stage": "codes",
        "corpus": card["corpus"],
        "codec_sha256": codec_sha256,
        "num_codebooks": mimi.num_codebooks,
        "composition": json.loads(json.dumps(dataclasses.asdict(composition))),
        "variants": variants,
        "prepared_fingerprint": card["fingerprint"],
        "notice": card["notice"],
    }
    metadata["fingerprint"] = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()

    files = [path for split in SPLITS for path in split_files(prepared, split)]
    clip_audio = ParquetRows(files, columns=["audio"], cache_bytes=AUDIO_CACHE_BYTES)
    shards, dropped = plan_shards(files, composition, variants)
    if not shards:
        raise UserError(
            f"No clip of {prepared} fits a conversation of {composition.duration_s:g} seconds.",
            "Give a longer --duration-sec or a shorter --lead-in-s.",
        )
    report = EncodeReport(_count(shards), dropped)
    if out.exists():
        if (
            out.is_dir()
            and (out / "README.md").exists()
            and (read_card_metadata(out).get("fingerprint") == metadata["fingerprint"])
        ):
            return report
        raise UserError(f"{out} exists and holds something else.", "Choose another --out, or remove that folder.")

    staging = out.parent / f".{out.name}.{metadata['fingerprint'][:12]}.partial"
    staging.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is found out now, not after a shard
    hours = sum(hours for _, hours in report.cells.values())
    with tqdm(total=round(hours * 3600), unit="s", desc=f"encode {card['corpus']}", disable=not progress) as bar:
        for shard in shards:
            path = staging / "data" / shard.split / shard.name
            if not path.exists():
                _write_shard(path, shard, card["corpus"], clip_audio, mimi, composition, batch_s, bar)
            else:
                bar.update(round(_seconds(shard.conversations)))
    splits = {}
    for split in SPLITS:
        paths = split_files(staging, split)
        num_rows = sum(count for (name, _), (count, _) in report.cells.items() if name == split)
        if paths:
            splits[split] = SplitInfo(num_rows, sum(path.stat().st_size for path in paths))
    write_card(
        staging,
        features=WINDOW_FEATURES,
        title=f"{card['title']}: Mimi codes of conversations",
        license=card["license"],
        splits=splits,
        metadata=metadata,
        body=_card_body(report, metadata),
    )
    staging.rename(out)
    for abandoned in out.parent.glob(f".{out.name}.*.partial"):  # of other settings
        shutil.rmtree(abandoned)
    return report


def plan_shards(files: list[Path], composition: Composition, variants: int) -> tuple[list[Shard], dict[str, int]]:
    """Plan every conversation of every split, in shards of one emotion each; also count the clips left out, by reason.

    Args:
        files: of the prepared corpus; a clip's `place` is its file in this list and its row there.
    """
    clips = defaultdict(list)
    columns = ["id", "speaker_id", "emotion", "duration_s", "words", "split"]
    for file_index, file in enumerate(files):
        for row_index, row in enumerate(read_columns([file], columns).to_pylist()):
            emotion = None if row["emotion"] is None else EMOTIONS[row["emotion"]]
            clips[row["split"]].append(trimmed_clip(row, (file_index, row_index), emotion, composition.margin_s))
    shards = []
    dropped: Counter[str] = Counter()
    for split in SPLITS:
        cells = defaultdict(list)
        for variant in range(variants):
            for conversation in plan_conversations(clips[split], composition, variant):
                cells[conversation.emotion].append(conversation)
        for emotion, conversations in sorted(cells.items()):
            total = -(-len(conversations) // SHARD_CONVERSATIONS)
            for index in range(total):
                part = conversations[index * SHARD_CONVERSATIONS : (index + 1) * SHARD_CONVERSATIONS]
                shards.append(Shard(split, shard_name(emotion, index, total), part))
        spoken = {turn.clip.id for part in cells.values() for c in part for turn in c.turns if turn.channel == 0}
        unlabelled = sum(clip.emotion is None for clip in clips[split])
        dropped["without an emotion label"] += unlabelled
        dropped["longer than a conversation may be"] += len(clips[split]) - unlabelled - len(spoken)
    return shards, {reason: count for reason, count in dropped.items() if count}


def _write_shard(
    path: Path,
    shard: Shard,
    corpus: str,
    clip_audio: ParquetRows,
    mimi: MimiModel,
    composition: Composition,
    batch_s: float,
    bar: tqdm,
) -> None:
    """Encode the conversations of a shard, longest batches first, and write them in their order."""
    codes: dict[str, np.ndarray] = {}
    for batch in _batches(shard.conversations, batch_s):
        waveforms = [
            compose(conversation, lambda clip: decode_audio(clip_audio.row(*clip.place)["audio"]), composition)
            for conversation in batch
        ]
        for conversation, window in zip(batch, encode_waveforms(mimi, waveforms), strict=True):
            codes[conversation.id] = window
        bar.update(round(_seconds(batch)))
    with ShardWriter(path, WINDOW_FEATURES, compression="zstd") as writer:
        for conversation in shard.conversations:
            writer.write(window_table(conversation, codes[conversation.id], corpus, shard.split))


def window_table(conversation: Conversation, codes: np.ndarray, corpus: str, split: str) -> pa.Table:
    """Return the window row of a conversation and its `codes`, int16 `[2, Q, T]`, as a table."""
    schema = WINDOW_FEATURES.arrow_schema
    row = {
        "id": f"{corpus}-{conversation.id}",
        "corpus": corpus,
        "split": split,
        "emotion": EMOTIONS.index(conversation.emotion),
        "speaker_id": conversation.speaker_id,
        "language": None,
        "codes": None,
        "num_frames": codes.shape[2],
        "words": words_of(conversation),
        "turns": turns_of(conversation),
        "variant": conversation.variant,
    }
    table = pa.Table.from_pylist([row], schema=schema)
    nested: pa.Array = pa.array(codes.reshape(-1))  # no Python object for each of a hundred thousand codes
    for size in (codes.shape[2], codes.shape[1], codes.shape[0]):
        nested = pa.ListArray.from_arrays(pa.array(range(0, len(nested) + 1, size), pa.int32()), nested)
    return table.set_column(schema.get_field_index("codes"), schema.field("codes"), nested)


def _batches(conversations: Sequence[Conversation], batch_s: float) -> list[list[Conversation]]:
    """Put conversations of like length together, two channels each, up to `batch_s` seconds with padding."""
    batches: list[list[Conversation]] = []
    for conversation in sorted(conversations, key=lambda c: (-c.num_samples, c.id)):
        longest_s = samples_to_seconds(batches[-1][0].num_samples) if batches else 0.0
        if not batches or 2 * longest_s * (len(batches[-1]) + 1) > batch_s:
            batches.append([])
        batches[-1].append(conversation)
    return batches


def _seconds(conversations: Sequence[Conversation]) -> float:
    return samples_to_seconds(sum(conversation.num_samples for conversation in conversations))


def _count(shards: Sequence[Shard]) -> dict[tuple[str, str], tuple[int, float]]:
    cells: dict[tuple[str, str], tuple[int, float]] = {}
    for shard in shards:
        emotion = shard.conversations[0].emotion
        count, hours = cells.get((shard.split, emotion), (0, 0.0))
        cells[shard.split, emotion] = (
            count + len(shard.conversations),
            hours + _seconds(shard.conversations) / 3600,
        )
    return cells


def _card_body(report: EncodeReport, metadata: dict) -> str:
    return (
        f"Conversations composed from the corpus {metadata['corpus']!r} and encoded with Mimi, "
        f"{metadata['num_codebooks']} codebooks, {SAMPLES_PER_FRAME} samples a frame.\n"
        f"`codes` is `[2, Q, T]`: Moshi's channel, then the user's.\n\n"
        f"- codec (SHA-256 of its weights and configuration): `{metadata['codec_sha256']}`\n"
        f"- composition: `{json.dumps(metadata['composition'])}`\n"
        f"- variants: {metadata['variants']}\n\n```\n{report.render()}\n```\n\n"
        f"## Terms of the corpus\n\n{metadata['notice']}\n"
    )
