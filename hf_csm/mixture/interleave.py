"""Prepared tables to one balanced `datasets.IterableDataset` of utterances."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.iterable_dataset import _BaseExamplesIterable

from hf_csm.config import Balance
from hf_csm.data.schema import SPLITS, UTTERANCE_FEATURES
from hf_csm.data.table import ParquetRows, split_files
from hf_csm.errors import UserError
from hf_csm.hub import check_table, find_table
from hf_csm.mixture.groups import (
    MAX_CHOICES,
    TRAIT_COLUMNS,
    Group,
    draw_rows,
    expected_repeats,
    group_probabilities,
    make_groups,
    read_traits,
)
from hf_csm.units import SAMPLE_RATE, seconds_to_samples


NUM_SHARDS = 960
"""Of every stream: divisible by the usual numbers of nodes times workers."""

Weights = Sequence[float] | Mapping[Any, float]


def interleave_corpora(
    tables: Sequence[str | Path],
    weights: Weights | None = None,
    by: Sequence[str] = ("corpus", "emotion"),
    temperature: float = 0.5,
    max_repeats: float = 4.0,
    seed: int = 0,
    split: str = "train",
) -> datasets.IterableDataset:
    """Interleave prepared corpora as utterance rows (`UTTERANCE_FEATURES`), balanced as training balances its windows.

        import hf_csm
        from hf_csm.data.audio import decode_audio

        stream = hf_csm.interleave_corpora(["prepared/ravdess", "user/esd"], weights={"user/esd": 2.0}, temperature=0)
        for row in stream:
            samples = decode_audio(row["audio"])  # float32, 24 kHz

    One iteration is one epoch. It draws about as many seconds as the tables have, each row from a group with
    probability `weight * seconds ** temperature`; no row repeats before all rows of its group were drawn. The order
    depends on the arguments and the epoch only: `set_epoch` gives another one, `state_dict` and `load_state_dict`
    resume at the exact row. Workers of a `DataLoader` and nodes (`datasets.distributed.split_dataset_by_node`) share
    an epoch without overlap. Rows are read from Parquet when they are drawn; `audio` has the bytes of a FLAC file.

    Args:
        tables: folders that `hf-csm prepare` has written, or such datasets on the Hub as `user/name`.
        weights: factors on the probabilities, 1 by default: a number for each table in order, or a dict whose keys are
            tables or groups. A group is named by the values of `by`: `("ravdess", "happy")`, or `"happy"` if `by` is
            one trait only. Where a table and a group both have a weight, their product counts.
        by: rows that agree in these make a group: some of corpus, emotion, speaker and language.
        temperature: 1 draws groups as often as they were recorded, 0 equally often.
        max_repeats: most passes over a group in an epoch, on average; the rest of its share goes to other groups.
        seed: of the order.
        split: train, validation or test.

    Raises:
        UserError: a table is missing, incomplete, named twice, without rows in this split, or not a prepared one; or
            an argument is out of range or names what is not there.
    """
    by = (by,) if isinstance(by, str) else tuple(by or ())
    unknown = [trait for trait in by if trait not in TRAIT_COLUMNS]
    if unknown:
        raise UserError(f"by has {unknown[0]!r}.", f"Choose from {', '.join(TRAIT_COLUMNS)}.")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed is {seed!r}.", "Give a whole number of at least 0.")
    for argument, number in {"temperature": temperature, "max_repeats": max_repeats}.items():
        if not isinstance(number, (int, float)):
            raise UserError(f"{argument} is {number!r}.", "Give a number.")
    if not isinstance(tables, (str, Path, Sequence)):
        raise UserError(f"tables is {tables!r}.", "Give a list of folders or Hub datasets.")
    try:
        balance = Balance(by=list(by), temperature=temperature, max_repeats=max_repeats)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(error.problem.removeprefix("dataset.balance."), error.remedy) from None
    names = [str(table) for table in ([tables] if isinstance(tables, (str, Path)) else tables)]
    files = [(file, table) for table, of_table in enumerate(_find_files(names, split)) for file in of_table]
    traits: dict[Any, list[str | None]] = {trait: [] for trait in TRAIT_COLUMNS}
    places, table_of_row, lengths = [], [], []
    for file_index, (file, table) in enumerate(files):
        for row_index, (*values, duration_s) in enumerate(read_traits(file, "duration_s")):
            for trait, value in zip(TRAIT_COLUMNS, values, strict=True):
                traits[trait].append(value)
            places.append((file_index, row_index))
            table_of_row.append(table)
            lengths.append(seconds_to_samples(duration_s))
    factors = _factors(names, weights)
    weight_of_table = [factors.get(name, 1.0) for name in names]
    groups = make_groups(traits, table_of_row, weight_of_table, np.array(lengths), SAMPLE_RATE, balance.by)
    _check_keys(factors, names, groups)
    groups = [replace(group, weight=group.weight * factors.get(group.names, 1.0)) for group in groups]
    mixture = _Mixture(ParquetRows([file for file, _ in files]), places, groups, group_probabilities(groups, balance))
    info = datasets.DatasetInfo(features=UTTERANCE_FEATURES)
    return datasets.IterableDataset(_Rows(mixture, seed), info=info, split=datasets.NamedSplit(split))


def _find_files(names: Sequence[str], split: str) -> list[list[Path]]:
    """Return the Parquet files of each table."""
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}.", f"Splits are {', '.join(SPLITS)}.")
    if not names:
        raise UserError("There are no tables to interleave.", "Name folders that `hf-csm prepare` has written.")
    name_of: dict[Path, str] = {}
    files = []
    for name in names:
        folder = find_table(name)
        check_table(folder, "prepared", UTTERANCE_FEATURES, name=name)
        if folder.resolve() in name_of:
            raise UserError(
                f"{name} and {name_of[folder.resolve()]} are one table.", "Name it once; a weight gives it more."
            )
        name_of[folder.resolve()] = name
        files.append(split_files(folder, split))
        if not files[-1]:
            raise UserError(f"{name} has no {split} split.", "Choose another split, or leave this table out.")
    return files


def _factors(names: Sequence[str], weights: Weights | None) -> dict[Any, float]:
    """Return the weights by name of a table, a string, or of a group, a tuple."""
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        if not isinstance(weights, Sequence) or len(weights) != len(names):
            raise UserError(
                f"weights is {weights!r}, for {len(names)} tables.",
                "Give one for each table, or a dict whose keys are tables or groups.",
            )
        weights = dict(zip(names, weights, strict=True))
    factors = {}
    for key, weight in weights.items():
        if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise UserError(f"The weight of {key} is {weight}.", "Give a number above 0.")
        is_table = not isinstance(key, tuple) and str(key) in names
        factors[str(key) if is_table else key if isinstance(key, tuple) else (key,)] = float(weight)
    return factors


def _check_keys(factors: Mapping[Any, float], names: Sequence[str], groups: Sequence[Group]) -> None:
    """Check that each weight is that of a table or group."""
    known = {group.names: None for group in groups}
    for key in factors:
        if key not in known and key not in names:
            listed = [str(group[0] if len(group) == 1 else group) for group in known]
            more = f" and {len(listed) - MAX_CHOICES} more" if len(listed) > MAX_CHOICES else ""
            raise UserError(
                f"weights has {key[0] if len(key) == 1 else key!r}, which is neither a table nor a group.",
                f"Tables are {', '.join(names)}; groups are {', '.join(listed[:MAX_CHOICES])}{more}.",
            )


@dataclass(frozen=True)
class _Mixture:
    """All that rows are drawn from; `places` has file and row index of each row number."""

    rows: ParquetRows
    places: list[tuple[int, int]]
    groups: list[Group]
    probabilities: np.ndarray

    def epoch(self, seed: int) -> Iterator[int]:
        """Yield the row numbers of one epoch."""
        num_rows = [len(group.rows) for group in self.groups]
        num_draws = round(float(expected_repeats(self.groups, self.probabilities) @ num_rows))
        return islice(draw_rows(self.groups, self.probabilities, seed), num_draws)


class _Rows(_BaseExamplesIterable):
    """The rows of an epoch that belong to some shards; draw n belongs to shard n % NUM_SHARDS.

    A generator (`IterableDataset.from_generator`) is never given the epoch, so it would repeat one draw for ever.
    """

    def __init__(self, mixture: _Mixture, seed: int, shards: Sequence[int] = range(NUM_SHARDS)):
        super().__init__()
        self.mixture, self.seed, self.shards = mixture, seed, shards
        self._state_dict: dict[str, Any] | None = None
        self._sleep_on_threads_shutdown = False

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        shards = frozenset(self.shards)
        own = (row for draw, row in enumerate(self.mixture.epoch(self.seed)) if draw % NUM_SHARDS in shards)
        start = int(self._state_dict["position"]) if self._state_dict else 0
        for position, row in enumerate(islice(own, start, None), start):
            values = self.mixture.rows.row(*self.mixture.places[row])
            if self._state_dict:
                self._state_dict["position"] = position + 1
            yield position, {column: values.get(column) for column in UTTERANCE_FEATURES}

    @property
    def is_typed(self) -> bool:
        return True

    @property
    def features(self) -> datasets.Features:
        return UTTERANCE_FEATURES

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def _init_state_dict(self) -> dict:
        self._state_dict = {"position": 0, "type": type(self).__name__}
        return self._state_dict

    def shuffle_data_sources(self, generator: np.random.Generator) -> _Rows:
        """Return another draw; `IterableDataset` passes a generator that it has seeded with the epoch."""
        return _Rows(self.mixture, self.seed ^ int(deepcopy(generator).integers(1 << 62)), self.shards)

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> _Rows:
        chosen = self.split_shard_indices_by_worker(num_shards, index, contiguous)
        return _Rows(self.mixture, self.seed, [self.shards[i] for i in chosen])

    def reshard_data_sources(self) -> _Rows:
        return self
