"""Tables of codes to one endless, balanced stream of micro-batches.

`datasets.interleave_datasets` draws references to windows from the (corpus, emotion) cells; the codes behind a
reference are read when its micro-batch is laid out. The sequence of micro-batches is a pure function of the options
and the seed, the same for every number of processes: process r of W takes the micro-batches r, r + W, r + 2W, ... So
a run goes on from its step alone, and two processes see together what one process would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np

from hf_csm.config import Balance, DatasetConfig, Source
from hf_csm.data.collate import Batch, collate
from hf_csm.data.labels import EMOTIONS
from hf_csm.data.layout import Layout, Tokenize, Window, lay_out
from hf_csm.data.table import ParquetRows, nested_to_numpy, read_card_metadata, read_columns, split_files
from hf_csm.errors import UserError
from hf_csm.units import Frames, Seconds, frames_to_seconds, seconds_to_frames


POOL_BATCHES = 32
"""Micro-batches' worth of windows that are sorted by length at a time."""


@dataclass(frozen=True)
class Cell:
    """The windows of one corpus and emotion.

    Attributes:
        weight: of its table in the mixture.
        rows: `[N]` rows of the `WindowTable`.
        duration_s: of all its windows together.
    """

    corpus: str
    emotion: str
    weight: float
    rows: np.ndarray
    duration_s: Seconds


class WindowTable:
    """The windows of one split of some tables of codes; only ids and lengths are in memory.

    Args:
        sources: folders that `hf-csm encode` wrote, with their weights.
        codec_sha256: hash of the base model's codec.
        emotions: keep these only; None for all.
        max_frames: longer windows count as this long, and are cut there when they are laid out.

    Attributes:
        num_frames: `[N]`, length of each window.
        num_cut: windows longer than `max_frames`.

    Raises:
        UserError: a folder is not a table of codes, or holds codes of another codec, or an emotion is unknown.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        split: str,
        *,
        codec_sha256: str,
        emotions: Sequence[str] | None = None,
        max_frames: Frames | None = None,
    ):
        for emotion in emotions or ():
            if emotion not in EMOTIONS:
                raise UserError(f"dataset.emotions has {emotion!r}.", f"Choose from {', '.join(EMOTIONS)}.")
        files: list[Path] = []
        source_of: list[Source] = []
        for source in sources:
            _check_codec(Path(source.path), codec_sha256)
            shards = split_files(source.path, split)
            files += shards
            source_of += [source] * len(shards)
        self._rows = ParquetRows(files, columns=["id", "codes", "words", "turns"])
        self._places: list[tuple[int, int]] = []
        self.corpora: list[str] = []
        self.emotions: list[str] = []
        self._weights: list[float] = []
        lengths: list[Frames] = []
        for file_index, file in enumerate(files):
            columns = read_columns([file], ["corpus", "emotion", "num_frames"]).to_pydict()
            for row_index, (corpus, label, num_frames) in enumerate(zip(*columns.values(), strict=True)):
                if emotions is None or EMOTIONS[label] in emotions:
                    self._places.append((file_index, row_index))
                    self.corpora.append(corpus)
                    self.emotions.append(EMOTIONS[label])
                    self._weights.append(source_of[file_index].weight)
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

    def cells(self) -> list[Cell]:
        """Return the cells in order of name."""
        members = defaultdict(list)
        for i, key in enumerate(zip(self.corpora, self.emotions, self._weights, strict=True)):
            members[key].append(i)
        return [
            Cell(corpus, emotion, weight, np.array(rows), frames_to_seconds(int(self.num_frames[rows].sum())))
            for (corpus, emotion, weight), rows in sorted(members.items())
        ]


def _check_codec(folder: Path, codec_sha256: str) -> None:
    metadata = read_card_metadata(folder)
    if metadata.get("stage") != "codes":
        raise UserError(f"{folder} is not a table of codes.", f"Run `hf-csm encode {folder} --out ...` first.")
    if metadata["codec_sha256"] != codec_sha256:
        raise UserError(
            f"{folder} holds codes of codec {metadata['codec_sha256'][:12]}; the base model's is {codec_sha256[:12]}.",
            "Encode the corpus again with this base model, or train the base model that it was encoded for.",
        )


def cell_probabilities(cells: Sequence[Cell], balance: Balance) -> np.ndarray:
    """Return the probability `[cells]` of drawing from each: `weight * seconds ** temperature`, normalised and capped.

    A cell's probability is cut where it would be passed more than `max_repeats` times while as many seconds are drawn
    as the mixture has; what is cut goes to the other cells in proportion.
    """
    seconds = np.array([cell.duration_s for cell in cells])
    wanted = np.array([cell.weight for cell in cells]) * seconds**balance.temperature
    caps = balance.max_repeats * seconds / seconds.sum()  # these sum to max_repeats >= 1, so a solution exists
    capped = np.zeros(len(cells), dtype=bool)
    while True:
        left = 1.0 - caps[capped].sum()
        probabilities = np.where(capped, caps, left * wanted / wanted[~capped].sum())
        over = (probabilities > caps) & ~capped
        if not over.any() or (over | capped).all():
            return probabilities / probabilities.sum()
        capped |= over


def draw_windows(cells: Sequence[Cell], probabilities: Sequence[float], seed: int) -> Iterator[int]:
    """Yield rows of the table without end; each pass over a cell is in a new order."""

    def rows_of(cell: int) -> Iterator[dict]:
        epoch = 0
        while True:
            for row in np.random.default_rng([seed, cell, epoch]).permutation(cells[cell].rows):
                yield {"row": int(row)}
            epoch += 1

    features = datasets.Features({"row": datasets.Value("int64")})
    streams = [
        datasets.IterableDataset.from_generator(rows_of, features=features, gen_kwargs={"cell": cell})
        for cell in range(len(cells))
    ]
    mixture = datasets.interleave_datasets(
        streams, probabilities=list(probabilities), seed=seed, stopping_strategy="first_exhausted"
    )
    for example in mixture:
        yield example["row"]


def group_by_length(
    rows: Iterator[int], num_frames: np.ndarray, *, budget_frames: Frames, pool_size: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield micro-batches of windows of like length, each a list of (draw, row); the draws are numbered from 0.

    A pool of windows is sorted by length and cut where the next window would carry the padded micro-batch over
    `budget_frames`. All of a pool leaves before the next is drawn, in random order: carrying the last, incomplete
    micro-batch over would hold the longest windows back for ever.
    """
    draws = enumerate(rows)
    for number in range(2**62):
        pool = sorted(islice(draws, pool_size), key=lambda draw: (num_frames[draw[1]], draw[0]))
        if not pool:
            return
        batches: list[list[tuple[int, int]]] = [[]]
        for draw in pool:
            if batches[-1] and (len(batches[-1]) + 1) * num_frames[draw[1]] > budget_frames:
                batches.append([])
            batches[-1].append(draw)
        for i in np.random.default_rng([seed, number]).permutation(len(batches)):
            yield batches[i]


class MixtureLoader:
    """The micro-batches of one process.

    Args:
        table: windows of the training split.
        layout: streams of the model.
        tokenize: text to token ids.
        seed: of the order and of the prefix dropout.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        table: WindowTable,
        layout: Layout,
        tokenize: Tokenize,
        config: DatasetConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.table, self.layout, self.tokenize, self.config = table, layout, tokenize, config
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.cells = table.cells()
        if not self.cells:
            raise UserError(
                "No training windows are left.", "Check dataset.manifest_path, dataset.sources and dataset.emotions."
            )
        self.probabilities = cell_probabilities(self.cells, config.balance)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield this process's micro-batches without end.

        Args:
            start: micro-batches that all processes together have already had.
        """
        groups = islice(self._groups(), start + self.rank, None, self.world_size)
        for group in groups:
            yield collate([self._window(draw, row) for draw, row in group], self.layout)

    def _groups(self) -> Iterator[list[tuple[int, int]]]:
        rows = draw_windows(self.cells, self.probabilities.tolist(), self.seed)
        batch_size = self.config.batch_size
        if not self.config.batch_by_length:
            draws = enumerate(rows)
            while True:
                yield list(islice(draws, batch_size))
        yield from group_by_length(
            rows,
            self.table.num_frames,
            budget_frames=batch_size * seconds_to_frames(self.config.duration_sec),
            pool_size=POOL_BATCHES * batch_size,
            seed=self.seed,
        )

    def _window(self, draw: int, row: int) -> Window:
        dropped = np.random.default_rng([self.seed, draw]).random() < self.config.prefix_dropout
        return lay_out_row(self.table, row, self.layout, self.tokenize, self.config, with_prefix=not dropped)


def validation_batches(table: WindowTable, config: DatasetConfig, *, max_windows: int) -> list[list[int]]:
    """Return a fixed set of at most `max_windows` windows, as rows in batches of like length."""
    chosen = np.random.default_rng(0).permutation(len(table))[:max_windows]
    budget_frames = config.batch_size * seconds_to_frames(config.duration_sec)
    batches: list[list[int]] = []
    for row in sorted(chosen.tolist(), key=lambda row: (table.num_frames[row], row)):
        if not batches or (len(batches[-1]) + 1) * table.num_frames[row] > budget_frames:
            batches.append([])
        batches[-1].append(row)
    return batches


def lay_out_row(
    table: WindowTable,
    row: int,
    layout: Layout,
    tokenize: Tokenize,
    config: DatasetConfig,
    *,
    with_prefix: bool = True,
) -> Window:
    """Read a window and lay it out, with the emotion prefix if `config.control` says so."""
    emotion = table.emotions[row]
    prefix = config.prefix_template.format(emotion=emotion) if config.control == "prefix" and with_prefix else None
    return lay_out(table.row(row), layout, tokenize, emotion=emotion, prefix=prefix, max_frames=table.max_frames)
