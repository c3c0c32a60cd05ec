"""Groups, the units of balancing: which rows they have, with which probability they are drawn, and in which order.

Training (`loader.py`) and the public stream (`interleave.py`) draw by these functions.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_csm.config import Balance, Trait
from hf_csm.data.labels import EMOTIONS, UNLABELLED
from hf_csm.data.table import read_columns
from hf_csm.units import Seconds


TRAIT_COLUMNS: dict[Trait, str] = {
    "corpus": "corpus",
    "emotion": "emotion",
    "speaker": "speaker_id",
    "language": "language",
}
"""Columns of prepared tables and of tables of codes that rows can be grouped by."""
DRAWS_PER_BLOCK = 1_000
"""Groups drawn at a time. Part of the order: with another value, a resumed run would not repeat its windows."""
MAX_CHOICES = 12
"""Most values that a message lists; there may be thousands of speakers."""


@dataclass(frozen=True)
class Group:
    """Rows of one table that agree in the traits the mixture is balanced by.

    A group that spans several tables is several of these, with the same names.

    Attributes:
        names: the values of the traits.
        weight: of the table.
        rows: `[N]` row numbers.
        duration_s: of all its rows together.
        is_replay: whether these are the dialogues for replay, to which no balance applies.
    """

    names: tuple[str, ...]
    weight: float
    rows: np.ndarray
    duration_s: Seconds
    is_replay: bool = False


def read_traits(file: str | Path, length: str) -> list[tuple[str, str | None, str, str | None, Any]]:
    """Return corpus, emotion, speaker, language and the column `length` of each row of a Parquet file."""
    columns = read_columns([file], [*TRAIT_COLUMNS.values(), length]).to_pydict()
    columns.setdefault("language", [None] * len(columns["corpus"]))  # tables of version 1 lack this column
    return [
        (
            sys.intern(corpus),
            None if emotion is None else EMOTIONS[emotion],
            sys.intern(speaker),
            language and sys.intern(language),
            of_row,
        )
        for corpus, emotion, speaker, language, of_row in zip(
            *(columns[name] for name in (*TRAIT_COLUMNS.values(), length)), strict=True
        )
    ]


def make_groups(
    traits: Mapping[Trait, Sequence[str | None]],
    table_of_row: Sequence[int],
    weights: Sequence[float],
    lengths: np.ndarray,
    per_second: float,
    by: Sequence[Trait],
) -> list[Group]:
    """Return the groups in order of name; rows of a table without weight are in none.

    Args:
        weights: of the tables.
        lengths: `[N]`, in frames or samples.
        per_second: frames or samples a second.
    """
    members: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
    for row, (table, *values) in enumerate(zip(table_of_row, *(traits[trait] for trait in by), strict=True)):
        if table < len(weights):
            members[tuple(value or UNLABELLED for value in values), table].append(row)
    return [
        Group(names, weights[table], np.array(rows, dtype=np.int64), int(lengths[rows].sum()) / per_second)
        for (names, table), rows in sorted(members.items())
    ]


def group_probabilities(groups: Sequence[Group], balance: Balance) -> np.ndarray:
    """Return the probability `[groups]` of each: `weight * seconds ** temperature`, normalized and capped.

    A group that spans several tables has their mean weight by seconds, and its rows are drawn in proportion to
    weight x seconds of each. A group that would be repeated more than `max_repeats` times while as many seconds are
    drawn as the mixture has is capped there; the rest of its share goes to the others in proportion.
    """
    seconds = np.array([group.duration_s for group in groups])
    row_s = seconds / [len(group.rows) for group in groups]
    seconds_of_names: dict[tuple[str, ...], Seconds] = defaultdict(float)
    for group in groups:
        seconds_of_names[group.names] += group.duration_s
    total = np.array([seconds_of_names[group.names] for group in groups])
    weights = np.array([group.weight for group in groups])
    weights = np.maximum(weights / weights.max(), 1e-100)  # no sum or product of them overflows, none is 0
    drawn = weights * seconds * total ** (balance.temperature - 1)

    # Repeats are counted in seconds, rows differ in length: so the caps hold for shares of the seconds.
    wanted = drawn * row_s
    caps = balance.max_repeats * seconds / seconds.sum()  # these sum to max_repeats >= 1, so a solution exists
    capped = np.zeros(len(groups), dtype=bool)
    while True:
        left = 1.0 - caps[capped].sum()
        shares = np.where(capped, caps, left * wanted / wanted[~capped].sum())
        over = (shares > caps) & ~capped
        if not over.any() or (over | capped).all():
            return shares / row_s / (shares / row_s).sum()
        capped |= over


def expected_repeats(groups: Sequence[Group], probabilities: np.ndarray) -> np.ndarray:
    """Return how often each group `[groups]` is repeated in an epoch.

    An epoch draws as many seconds from the balanced groups as they hold; replay comes on top.
    """
    num_rows = np.array([len(group.rows) for group in groups])
    seconds = np.array([group.duration_s for group in groups])
    is_balanced = np.array([not group.is_replay for group in groups])
    drawn_s = (probabilities * seconds / num_rows)[is_balanced].sum()  # by one draw, from the balanced groups
    return seconds[is_balanced].sum() / drawn_s * probabilities / num_rows


def draw_rows(groups: Sequence[Group], probabilities: Sequence[float] | np.ndarray, seed: int) -> Iterator[int]:
    """Yield row numbers without end; each pass over a group is in a new order."""
    rng = np.random.default_rng(seed)
    passes = [_passes(group.rows, seed, number) for number, group in enumerate(groups)]
    while True:
        for number in rng.choice(len(groups), size=DRAWS_PER_BLOCK, p=probabilities).tolist():
            yield next(passes[number])


def _passes(rows: np.ndarray, seed: int, number: int) -> Iterator[int]:
    """Yield the rows of group `number`, pass after pass."""
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, number, epoch]).permutation(rows).tolist()
        epoch += 1
