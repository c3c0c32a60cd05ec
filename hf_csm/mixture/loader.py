"""Tables of codes to one endless, balanced stream of micro-batches.

`datasets.interleave_datasets` draws references to windows from the cells; the codes behind a reference are read when
its micro-batch is laid out. The sequence of micro-batches is a pure function of the options and the seed, the same for
every number of processes: process r of W takes the micro-batches r, r + W, r + 2W, ... So a run goes on from its step
alone, and two processes see together what one process would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice

import datasets
import numpy as np

from hf_csm.config import Balance, DatasetConfig
from hf_csm.data.labels import UNLABELLED
from hf_csm.errors import UserError
from hf_csm.mixture.collate import Batch, collate
from hf_csm.mixture.windows import Cell, WindowTable
from hf_csm.models.family import Layout, Window
from hf_csm.models.moshi.layout import Tokenize, lay_out
from hf_csm.units import Frames, Seconds, seconds_to_frames


POOL_BATCHES = 32
"""Micro-batches' worth of windows that are sorted by length at a time."""


def mix(table: WindowTable, config: DatasetConfig) -> tuple[list[Cell], np.ndarray]:
    """Return the cells, replay last, and the probability `[cells]` that a drawn window is from each.

    Raises:
        UserError: the filters leave no window.
    """
    cells = table.cells(config.balance.by)
    if not cells:
        raise UserError(
            "No training windows are left.",
            "Check dataset.manifest_path, dataset.sources and the filters: dataset.emotions, languages, speakers.",
        )
    probabilities = cell_probabilities(cells, config.balance)
    if config.replay is None or not config.replay.fraction:
        return cells, probabilities
    fraction = config.replay.fraction
    return [*cells, table.replay_cell()], np.append((1 - fraction) * probabilities, fraction)


def cell_probabilities(cells: Sequence[Cell], balance: Balance) -> np.ndarray:
    """Return the probability `[cells]` of drawing from each: `weight * seconds ** temperature`, normalised and capped.

    A cell that spans several tables has their mean weight by seconds, and its windows are drawn in proportion to
    weight x seconds of each. What would be passed more than `max_repeats` times while as many seconds are drawn as the
    mixture has is held there; what that cuts goes to the others in proportion.
    """
    seconds = np.array([cell.duration_s for cell in cells])
    window_s = seconds / [len(cell.rows) for cell in cells]
    seconds_of_cell: dict[tuple[str, ...], Seconds] = defaultdict(float)
    for cell in cells:
        seconds_of_cell[cell.names] += cell.duration_s
    total = np.array([seconds_of_cell[cell.names] for cell in cells])
    weights = np.array([cell.weight for cell in cells])
    weights = np.maximum(weights / weights.max(), 1e-100)  # no sum or product of them overflows, none is 0
    drawn = weights * seconds * total ** (balance.temperature - 1)

    # Repeats are counted in seconds, windows differ in length: so the caps hold for shares of the seconds.
    wanted = drawn * window_s
    caps = balance.max_repeats * seconds / seconds.sum()  # these sum to max_repeats >= 1, so a solution exists
    capped = np.zeros(len(cells), dtype=bool)
    while True:
        left = 1.0 - caps[capped].sum()
        shares = np.where(capped, caps, left * wanted / wanted[~capped].sum())
        over = (shares > caps) & ~capped
        if not over.any() or (over | capped).all():
            return shares / window_s / (shares / window_s).sum()
        capped |= over


def expected_repeats(cells: Sequence[Cell], probabilities: np.ndarray) -> np.ndarray:
    """Return how often each cell `[cells]` is passed in an epoch.

    An epoch draws as many seconds from the balanced cells as they hold; what it draws from replay comes on top.
    """
    num_windows = np.array([len(cell.rows) for cell in cells])
    seconds = np.array([cell.duration_s for cell in cells])
    is_balanced = np.array([not cell.is_replay for cell in cells])
    drawn_s = (probabilities * seconds / num_windows)[is_balanced].sum()  # by one draw, from the balanced cells
    return seconds[is_balanced].sum() / drawn_s * probabilities / num_windows


def draw_windows(cells: Sequence[Cell], probabilities: Sequence[float], seed: int) -> Iterator[int]:
    """Yield rows of the table without end; each pass over a cell is in a new order."""
    features = datasets.Features({"row": datasets.Value("int64")})
    streams = [
        datasets.IterableDataset.from_generator(
            _passes, features=features, gen_kwargs={"rows": cell.rows, "seed": seed, "number": number}
        )
        for number, cell in enumerate(cells)
    ]
    mixture = datasets.interleave_datasets(
        streams, probabilities=list(probabilities), seed=seed, stopping_strategy="first_exhausted"
    )
    for example in mixture:
        yield example["row"]


def _passes(rows: np.ndarray, seed: int, number: int) -> Iterator[dict[str, int]]:
    """Yield the rows of a cell pass after pass.

    A function of its own, because `datasets` hashes everything that a generator can reach: in a closure over all cells
    that takes minutes for a thousand of them.
    """
    epoch = 0
    while True:
        for row in np.random.default_rng([seed, number, epoch]).permutation(rows):
            yield {"row": int(row)}
        epoch += 1


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
        self.cells, self.probabilities = mix(table, config)

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
    """Read a window and lay it out, with the emotion prefix if it has an emotion and `config.control` says so."""
    emotion = table.emotions[row]
    has_prefix = emotion is not None and config.control == "prefix" and with_prefix
    return lay_out(
        table.row(row),
        layout,
        tokenize,
        emotion=emotion or UNLABELLED,
        prefix=config.prefix_template.format(emotion=emotion) if has_prefix else None,
        max_frames=table.max_frames,
    )
