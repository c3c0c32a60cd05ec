"""The windows of tables of codes: labels and lengths in memory, filters and groups; codes are read on demand."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from hf_csm.config import DatasetConfig, Source, Trait
from hf_csm.data.labels import EMOTIONS
from hf_csm.data.schema import WINDOW_FEATURES
from hf_csm.data.table import ParquetRows, nested_to_numpy, split_files
from hf_csm.errors import UserError
from hf_csm.hub import check_table, find_table
from hf_csm.mixture.groups import MAX_CHOICES, Group, make_groups, read_traits
from hf_csm.units import FRAME_RATE, Frames, Seconds, frames_to_seconds, seconds_to_frames


class WindowTable:
    """The windows of one split of several tables of codes; only labels and lengths are in memory.

    Args:
        codec_sha256: hash of the base model's codec; None if the tables need only agree with each other.
        emotions: keep these only, None for all; likewise languages and speakers.
        replay: one more table, of dialogues, to which no filter applies.
        max_frames: longer windows count as this long, and are cut there when they are laid out.

    Attributes:
        corpora: of each window, as are the next four.
        emotions: None for a window without label.
        speakers: of the model's channel.
        languages: None where the table has none.
        num_frames: `[N]`.
        num_cut: windows longer than `max_frames`.
        num_read: windows of each source, before the filters; replay comes last.

    Raises:
        UserError: a table is missing, is not whole, is named twice, is not of codes, or holds codes of another codec,
            or an emotion is unknown.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        split: str,
        *,
        codec_sha256: str | None,
        emotions: Sequence[str] | None = None,
        languages: Sequence[str] | None = None,
        speakers: Sequence[str] | None = None,
        replay: Source | None = None,
        max_frames: Frames | None = None,
    ):
        unknown = [emotion for emotion in emotions or () if emotion not in EMOTIONS]
        if unknown:
            raise UserError(f"dataset.emotions has {unknown[0]!r}.", f"Choose from {', '.join(EMOTIONS)}.")
        self._sources = [*sources, *([] if replay is None else [replay])]
        self._num_balanced = len(sources)
        folders = [find_table(source.path, source.revision) for source in self._sources]
        _check_codecs([source.path for source in self._sources], folders, codec_sha256)
        shards = [split_files(folder, split) for folder in folders]
        files = [(file, source) for source, of_source in enumerate(shards) for file in of_source]
        self._rows = ParquetRows([file for file, _ in files], columns=["id", "codes", "words", "turns"])
        self._places: list[tuple[int, int]] = []
        self._source_of: list[int] = []
        self.corpora: list[str] = []
        self.emotions: list[str | None] = []
        self.speakers: list[str] = []
        self.languages: list[str | None] = []
        self._wanted = {"emotions": emotions, "languages": languages, "speakers": speakers}
        self._present: dict[str, set[str | None]] = {name: set() for name in self._wanted}
        self.num_read = [0] * len(self._sources)
        lengths: list[Frames] = []
        for file_index, (file, source) in enumerate(files):
            for row_index, (corpus, emotion, speaker, language, num_frames) in enumerate(
                read_traits(file, "num_frames")
            ):
                self.num_read[source] += 1
                if source < self._num_balanced:
                    labels = {"emotions": emotion, "languages": language, "speakers": speaker}
                    for name, label in labels.items():
                        self._present[name].add(label)
                    if any(kept is not None and labels[name] not in kept for name, kept in self._wanted.items()):
                        continue
                self._places.append((file_index, row_index))
                self._source_of.append(source)
                self.corpora.append(corpus)
                self.emotions.append(emotion)
                self.speakers.append(speaker)
                self.languages.append(language)
                lengths.append(num_frames)
        self.num_frames = np.array(lengths, dtype=np.int64)
        self.max_frames = max_frames
        self.num_cut = 0 if max_frames is None else int((self.num_frames > max_frames).sum())
        if max_frames is not None:
            self.num_frames = np.minimum(self.num_frames, max_frames)

    def __len__(self) -> int:
        return len(self._places)

    def row(self, i: int) -> dict:
        """Return `id`, `codes` (int16 `[2, Q, T]`), `words` and `turns` of a window."""
        table = self._rows.arrow_row(*self._places[i])
        row = table.drop_columns(["codes"]).to_pylist()[0]
        row["codes"] = nested_to_numpy(table.column("codes"))[0]
        return row

    def groups(self, by: Sequence[Trait] = ("corpus", "emotion")) -> list[Group]:
        """Return the groups in order of name; replay is in none of them."""
        traits: dict[Trait, Sequence[str | None]] = {
            "corpus": self.corpora,
            "emotion": self.emotions,
            "speaker": self.speakers,
            "language": self.languages,
        }
        weights = [source.weight for source in self._sources[: self._num_balanced]]
        return make_groups(traits, self._source_of, weights, self.num_frames, FRAME_RATE, by)

    def replay_group(self) -> Group:
        """Return the windows of the replay table."""
        rows = np.flatnonzero(np.array(self._source_of) == self._num_balanced)
        return Group(("replay",), 1.0, rows, frames_to_seconds(int(self.num_frames[rows].sum())), is_replay=True)

    def left_out(self) -> list[str]:
        """Return a line for each source that loses windows to the filters, with their number."""
        kept = Counter(self._source_of)
        return [
            f"{source.path}: {total - kept[number]:,} of {total:,} windows left out by the filters"
            for number, (source, total) in enumerate(zip(self._sources, self.num_read, strict=True))
            if kept[number] < total
        ]

    def check_filters(self) -> None:
        """Check that each value of a filter occurs in some window.

        Raises:
            UserError: one does not.
        """
        for name, wanted in self._wanted.items():
            known = sorted(label for label in self._present[name] if label is not None)
            for label in wanted or ():
                if label not in known:
                    near = difflib.get_close_matches(label, known, n=1, cutoff=0.75)
                    more = f" and {len(known) - MAX_CHOICES} more" if len(known) > MAX_CHOICES else ""
                    raise UserError(
                        f"dataset.{name} has {label!r}, which no training window has.",
                        (f"Did you mean {near[0]}? " if near else "")
                        + (f"There are {', '.join(known[:MAX_CHOICES])}{more}." if known else "The tables have none."),
                    )


def training_table(config: DatasetConfig, codec_sha256: str | None) -> WindowTable:
    """Open the windows to train on, replay included.

    Raises:
        UserError: as `WindowTable`; a value of a filter occurs in no window; or a source or replay has no windows.
    """
    replay = Source(config.replay.manifest_path) if config.replay and config.replay.fraction else None
    sources = config.training_sources()
    table = WindowTable(
        sources,
        "train",
        codec_sha256=codec_sha256,
        emotions=config.emotions,
        languages=config.languages,
        speakers=config.speakers,
        replay=replay,
        max_frames=seconds_to_frames(config.duration_sec),
    )
    for source, num_windows in zip(sources, table.num_read, strict=False):
        if not num_windows:
            raise UserError(
                f"{source.path} has no training windows.", "Name a table with a training split, or leave this one out."
            )
    table.check_filters()
    if replay is not None and not len(table.replay_group().rows):
        raise UserError(
            f"dataset.replay.manifest_path is {replay.path}, which has no training windows.",
            "Name a table with a training split, or leave dataset.replay out.",
        )
    return table


def held_out_table(config: DatasetConfig, split: str, codec_sha256: str | None) -> WindowTable:
    """Open the windows of the validation or test split, filtered by emotion and language as in training.

    `config.speakers` does not apply, since no speaker is in two splits. A table that is used for validation only and
    has nothing but a training split, such as an encoded manifest, is used as a whole.
    """
    sources = config.training_sources()
    if split == "validation" and config.val_manifest_path:
        folder = find_table(config.val_manifest_path)
        trained = [find_table(source.path, source.revision).resolve() for source in sources]
        sources = [Source(config.val_manifest_path)]
        if not split_files(folder, split) and folder.resolve() not in trained:
            split = "train"
    return WindowTable(
        sources,
        split,
        codec_sha256=codec_sha256,
        emotions=config.emotions,
        languages=config.languages,
        max_frames=seconds_to_frames(config.duration_sec),
    )


def with_tables(config: DatasetConfig, table_of: Callable[[str], str]) -> DatasetConfig:
    """Return a copy with `table_of(path)` for each path, such as encoded tables for manifests."""
    return replace(
        config,
        manifest_path=config.manifest_path and table_of(config.manifest_path),
        val_manifest_path=config.val_manifest_path and table_of(config.val_manifest_path),
        sources=[replace(source, path=table_of(source.path)) for source in config.sources],
        replay=config.replay and replace(config.replay, manifest_path=table_of(config.replay.manifest_path)),
    )


def is_manifest(path: str) -> bool:
    """Return whether a path of the configuration is a JSONL manifest, which has to be encoded first."""
    return path.endswith(".jsonl")


def manifest_table(manifest: str, run_dir: str, duration_s: Seconds) -> Path:
    """Return the folder for the codes of a manifest in its current content, in windows of up to `duration_s`."""
    name = hashlib.sha256(f"{Path(manifest).resolve()} {duration_s:g}".encode())
    with suppress(OSError):  # read errors are reported when it is parsed
        name.update(Path(manifest).read_bytes())
    return Path(run_dir, "codes", f"{Path(manifest).stem}-{name.hexdigest()[:8]}")


def _check_codecs(names: Sequence[str], folders: Sequence[Path], codec_sha256: str | None) -> None:
    """Check that the tables, as the user names them, are whole, all different, and hold codes of one codec."""
    first: tuple[str, str] | None = None
    name_of: dict[Path, str] = {}
    for name, folder in zip(names, folders, strict=True):
        # Tables of version 1 have no language.
        card = check_table(folder, "codes", WINDOW_FEATURES, name=name, optional=("language",))
        if folder.resolve() in name_of:
            raise UserError(
                f"{name} and {name_of[folder.resolve()]} are one table, named twice in sources or replay.",
                "Name it once; a weight gives it more.",
            )
        name_of[folder.resolve()] = name
        found = card["codec_sha256"]
        first = first or (name, found)
        if codec_sha256 is not None and found != codec_sha256:
            raise UserError(
                f"{name} holds codes of codec {found[:12]}; the base model's is {codec_sha256[:12]}.",
                "Encode the corpus again with this base model, or train the base model that it was encoded for.",
            )
        if found != first[1]:
            raise UserError(
                f"{name} holds codes of codec {found[:12]}; {first[0]} of codec {first[1][:12]}.",
                "Encode both with the same base model.",
            )
