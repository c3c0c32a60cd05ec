"""Tables of random codes, to test mixtures and training without audio."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_csm.data.labels import UNLABELLED, emotion_id
from hf_csm.data.schema import WINDOW_FEATURES
from hf_csm.data.table import CARD_NAME, ShardWriter, SplitInfo, shard_name, split_files, write_card
from hf_csm.units import Frames, frames_to_seconds


CODEC_SHA256 = "0" * 64
CARD = 2048
LEAD_IN_S = 2.0
TURN_S = 5.0
WORD_S = 0.4


@dataclass(frozen=True)
class RandomWindow:
    """The fixed facts of a window; its codes are random."""

    emotion: str | None
    num_frames: Frames = 25
    speaker: str = "01"
    split: str = "train"
    language: str | None = "en"


def write_random_codes(
    out: Path,
    windows: Iterable[RandomWindow],
    *,
    codec_sha256: str = CODEC_SHA256,
    num_codebooks: int = 8,
    without: tuple[str, ...] = (),
) -> Path:
    """Write a table of codes as `encode` would; the corpus is named after the folder. Same arguments, same bytes.

    Args:
        out: folder to write.
        without: columns to leave out.

    Returns:
        the folder.
    """
    rng = np.random.default_rng(0)
    features = WINDOW_FEATURES.copy()
    for column in without:
        del features[column]
    groups: dict[tuple[str, str], list[tuple[int, RandomWindow]]] = {}
    for number, window in enumerate(windows):
        groups.setdefault((window.split, window.emotion or UNLABELLED), []).append((number, window))
    num_rows: dict[str, int] = {}
    for (split, emotion), members in sorted(groups.items()):
        num_rows[split] = num_rows.get(split, 0) + len(members)
        with ShardWriter(out / "data" / split / shard_name(emotion, 0, 1), features, compression="zstd") as writer:
            for number, window in members:
                codes = rng.integers(0, CARD, (2, num_codebooks, window.num_frames), dtype=np.int16)
                writer.write(_row(f"{out.name}-{number:06d}", out.name, window, codes).drop_columns(list(without)))
    splits = {
        split: SplitInfo(count, sum(file.stat().st_size for file in split_files(out, split)))
        for split, count in num_rows.items()
    }
    metadata = {"stage": "codes", "corpus": out.name, "codec_sha256": codec_sha256}
    write_card(
        out, features=features, title=out.name, license="other", splits=splits, metadata=metadata, body="Random codes."
    )
    return out


def restate_sizes(table: Path) -> None:
    """Update the sizes in the card of a table after its files were changed or removed."""
    from huggingface_hub.repocard import metadata_load, metadata_save

    front = metadata_load(table / CARD_NAME) or {}
    for split in front["dataset_info"]["splits"]:
        split["num_bytes"] = sum(file.stat().st_size for file in split_files(table, split["name"]))
    metadata_save(table / CARD_NAME, front)


def _row(id_: str, corpus: str, window: RandomWindow, codes: np.ndarray) -> pa.Table:
    """Return a row in which the two channels take turns of 5 seconds, Moshi first."""
    duration_s = frames_to_seconds(window.num_frames)
    starts_s = np.arange(LEAD_IN_S, max(duration_s, LEAD_IN_S + WORD_S), TURN_S).tolist()
    turns: list[dict[str, Any]] = [
        {"clip_id": id_, "channel": i % 2, "start_s": start_s, "end_s": min(start_s + TURN_S, duration_s)}
        for i, start_s in enumerate(starts_s)
    ]
    words = [
        {"word": "word", "channel": turn["channel"], "start_s": start_s, "end_s": start_s + WORD_S}
        for turn in turns
        for start_s in np.arange(turn["start_s"], turn["end_s"], WORD_S).tolist()
    ]
    row = {
        "id": id_,
        "corpus": corpus,
        "split": window.split,
        "emotion": emotion_id(window.emotion),
        "speaker_id": f"{corpus}-{window.speaker}",
        "language": window.language,
        "codes": None,
        "num_frames": window.num_frames,
        "words": words,
        "turns": turns,
        "variant": 0,
    }
    schema = WINDOW_FEATURES.arrow_schema
    nested: pa.Array = pa.array(codes.reshape(-1))
    for size in codes.shape[:0:-1]:
        nested = pa.ListArray.from_arrays(pa.array(range(0, len(nested) + 1, size), pa.int32()), nested)
    nested = pa.ListArray.from_arrays(pa.array([0, len(nested)], pa.int32()), nested)
    table = pa.Table.from_pylist([row], schema=schema)
    return table.set_column(schema.get_field_index("codes"), schema.field("codes"), nested)
