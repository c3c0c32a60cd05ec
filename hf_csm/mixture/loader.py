"""Tables of codes to one endless, balanced stream of micro-batches.

`groups.draw_rows` draws row numbers; the codes of a window are read when its micro-batch is laid out. The sequence of
micro-batches is a pure function of the options and the seed, the same for every number of processes: process r of W
takes the micro-batches r, r + W, r + 2W, ... So a run resumes from its step number alone, and W processes together
train on what one process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from hf_csm.config import DatasetConfig
from hf_csm.errors import UserError
from hf_csm.mixture.collate import Batch, collate
from hf_csm.mixture.groups import Group, draw_rows, group_probabilities
from hf_csm.mixture.windows import WindowTable
from hf_csm.models.family import Layout, Window
from hf_csm.units import Frames, seconds_to_frames


POOL_BATCHES = 32
"""Micro-batches' worth of windows that are sorted by length at a time."""


def mix(table: WindowTable, config: DatasetConfig) -> tuple[list[Group], np.ndarray]:
    """Return the groups, replay last, and the probability `[groups]` that a drawn window is from each.

    Raises:
        UserError: the filters leave no window.
    """
    groups = table.groups(config.balance.by)
    if not groups:
        raise UserError(
            "No training windows are left.",
            "Check dataset.manifest_path, dataset.sources and the filters: dataset.emotions, languages, speakers.",
        )
    probabilities = group_probabilities(groups, config.balance)
    if config.replay is None or not config.replay.fraction:
        return groups, probabilities
    fraction = config.replay.fraction
    return [*groups, table.replay_group()], np.append((1 - fraction) * probabilities, fraction)


def group_by_length(
    rows: Iterator[int], num_frames: np.ndarray, *, budget_frames: Frames, pool_size: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield micro-batches of windows of similar length, each a list of (draw, row); the draws are numbered from 0.

    A pool of windows is sorted by length and cut where the next window would make the padded micro-batch longer than
    `budget_frames`. The micro-batches of a pool are shuffled, and all are yielded before the next pool is drawn:
    carrying the last, incomplete one over would hold the longest windows back for ever.
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
        lay_out: `(row, *, prefix, max_frames)`: a row of a codes table to a window; of the model's family.
        seed: of the order and of the prefix dropout.
    """

    def __init__(
        self,
        table: WindowTable,
        layout: Layout,
        lay_out: Callable[..., Window],
        config: DatasetConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.table, self.layout, self.lay_out, self.config = table, layout, lay_out, config
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.groups, self.probabilities = mix(table, config)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield this process's micro-batches without end.

        Args:
            start: micro-batches that all processes together have already consumed.
        """
        groups = islice(self._groups(), start + self.rank, None, self.world_size)
        for group in groups:
            yield collate([self._window(draw, row) for draw, row in group], self.layout)

    def _groups(self) -> Iterator[list[tuple[int, int]]]:
        rows = draw_rows(self.groups, self.probabilities, self.seed)
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
        return lay_out_row(self.table, row, self.lay_out, self.config, with_prefix=not dropped)


def validation_batches(table: WindowTable, config: DatasetConfig, *, max_windows: int) -> list[list[int]]:
    """Return a fixed set of at most `max_windows` windows, as rows in batches of similar length."""
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
    lay_out: Callable[..., Window],
    config: DatasetConfig,
    *,
    with_prefix: bool = True,
) -> Window:
    """Read a window and lay it out, with the emotion prefix if it has an emotion and `config.control` is `prefix`."""
    emotion = table.emotions[row]
    has_prefix = emotion is not None and config.control == "prefix" and with_prefix
    return lay_out(
        table.row(row),
        prefix=config.prefix_template.format(emotion=emotion) if has_prefix else None,
        max_frames=table.max_frames,
    )
