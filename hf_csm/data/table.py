"""Tables on disk, of utterances or codes: Parquet shards by split and group, and a card that `datasets` understands.

A table is a folder: `data/<split>/<group>-00000-of-0000N.parquet` and `README.md`; the group is an emotion.
`load_dataset(folder)`, streaming too, works on it locally and on the Hub. Row groups are small, so that `ParquetRows`
has fast random access.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import DatasetInfo, Features, SplitDict
from datasets import SplitInfo as HubSplitInfo

from hf_csm.data.schema import SPLITS
from hf_csm.errors import UserError
from hf_csm.files import replaced_file, write_text_atomic


ROWS_PER_GROUP = 32
WINDOWS_PER_GROUP = 4
"""In tables of codes: a window takes 70 kB and is read on its own, in any order."""
CARD_NAME = "README.md"
CARD_KEY = "hf_csm"
_SIZE_CATEGORIES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
)


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split: rows, and bytes of its Parquet files."""

    num_rows: int
    num_bytes: int


def shard_name(group: str, index: int, total: int) -> str:
    """Return the file name of a group's shard: `happy-00000-of-00002.parquet`."""
    assert 0 <= index < total, (index, total)
    return f"{group}-{index:05d}-of-{total:05d}.parquet"


def split_files(folder: str | Path, split: str) -> list[Path]:
    """Return the Parquet files of a split in order; empty if the table does not have the split."""
    return sorted(Path(folder, "data", split).glob("*.parquet"))


def count_splits(folder: str | Path) -> dict[str, SplitInfo]:
    """Return rows and bytes of each split that a table has, from its Parquet files."""
    counts = {}
    for split in SPLITS:
        files = split_files(folder, split)
        if files:
            num_rows = sum(pq.read_metadata(file).num_rows for file in files)
            counts[split] = SplitInfo(num_rows, sum(file.stat().st_size for file in files))
    return counts


class ShardWriter:
    """Context manager that writes one Parquet file; the file appears when the block ends without error.

    Args:
        path: of the file; its folder is created.
        features: of the rows; stored in the file, so that `datasets` restores labels and audio.
        compression: for Parquet. Audio does not compress: leave it off.
    """

    def __init__(self, path: Path, features: Features, compression: str = "none"):
        self._schema = features.arrow_schema
        self._rows_per_group = WINDOWS_PER_GROUP if "codes" in features else ROWS_PER_GROUP
        self._pending: list[pa.Table] = []
        self._num_pending = 0
        # Statistics and dictionaries of large columns cost time and space and have no use.
        light = [field.name for field in self._schema if pa.types.is_string(field.type)]
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replaced_file(path))
            self._writer = stack.enter_context(
                pq.ParquetWriter(
                    temporary, self._schema, compression=compression, use_dictionary=light, write_statistics=light
                )
            )
            stack.push(self._end)  # runs first at exit, then the file is closed, then it is renamed or removed
            self._stack = stack.pop_all()

    def write(self, rows: pa.Table | Sequence[Mapping[str, Any]]) -> None:
        """Append rows. Row groups are filled up across calls: the file depends on the rows only."""
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=self._schema)
        self._pending.append(table)
        self._num_pending += len(table)
        while self._num_pending >= self._rows_per_group:
            pending = pa.concat_tables(self._pending)
            self._writer.write_table(pending.slice(0, self._rows_per_group))
            self._pending = [pending.slice(self._rows_per_group)]
            self._num_pending -= self._rows_per_group

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _end(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._num_pending:
            self._writer.write_table(pa.concat_tables(self._pending))


def write_card(
    folder: Path,
    *,
    features: Features,
    title: str,
    license: str,
    splits: Mapping[str, SplitInfo],
    metadata: Mapping[str, Any],
    body: str,
    languages: Sequence[str] = ("en",),
    tags: Sequence[str] = ("audio", "speech", "emotion", "hf-csm"),
) -> None:
    """Write the card atomically. Same arguments, same bytes.

    Args:
        folder: of the table.
        features: of its rows.
        title: heading, and name on the Hub.
        license: license id of the Hub.
        splits: counts of the splits that the table has.
        metadata: plain data under the key `hf_csm`, for `read_card_metadata`.
        body: Markdown below the heading.
        languages: of the text, as Hub ids.
        tags: Hub tags.
    """
    present = [split for split in SPLITS if split in splits]
    assert set(present) == set(splits), f"unknown splits in {list(splits)}"
    num_rows = sum(info.num_rows for info in splits.values())
    num_bytes = sum(info.num_bytes for info in splits.values())
    hub_splits = SplitDict()
    for split in present:
        hub_splits.add(HubSplitInfo(split, splits[split].num_bytes, splits[split].num_rows))
    info = DatasetInfo(features=features, splits=hub_splits, download_size=num_bytes, dataset_size=num_bytes)
    front = {
        "license": license,
        "language": list(languages),
        "pretty_name": title,
        "tags": list(tags),
        "size_categories": [next((name for limit, name in _SIZE_CATEGORIES if num_rows < limit), "100M<n<1B")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}/*.parquet"} for split in present],
            }
        ],
        "dataset_info": dict(info._to_yaml_dict()),
        CARD_KEY: dict(metadata),
    }
    write_text_atomic(folder / CARD_NAME, card_text(front, title, body))


def card_text(front: Mapping[str, Any], title: str, body: str) -> str:
    """Return a Hub card: YAML front matter, heading, Markdown body."""
    yaml_text = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1_000)
    return f"---\n{yaml_text}---\n\n# {title}\n\n{body.strip()}\n"


def read_card_metadata(folder: str | Path) -> dict[str, Any]:
    """Return the `metadata` that `write_card` stored.

    Raises:
        UserError: the folder is not a table of hf-csm.
    """
    card = Path(folder, CARD_NAME)
    remedy = "Name a folder that `hf-csm prepare` or `hf-csm encode` wrote."
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}: not a table: it has no {CARD_NAME} that can be read.", remedy) from error
    front = text.split("---\n", 2)[1] if text.startswith("---\n") else ""
    try:
        return dict(yaml.safe_load(front)[CARD_KEY])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: not a table of hf-csm: no {CARD_KEY} in its {CARD_NAME}.", remedy) from error


def check_schema(folder: str | Path, features: Features, optional: Collection[str] = ()) -> None:
    """Check that a table has the columns, types and class labels of this version.

    Args:
        features: of the rows.
        optional: columns that a table of an earlier version may lack.

    Raises:
        UserError: it has not; the remedy is the command that makes the table again.
    """
    files = [file for split in SPLITS for file in split_files(folder, split)[:1]]
    for file in files:
        with _open_parquet(file) as parquet:
            found = Features.from_arrow_schema(parquet.schema_arrow)
        for name, feature in features.items():
            if name not in found:
                if name in optional:
                    continue
                problem = f"its rows have no column {name!r}"
            elif found[name] != feature:
                problem = f"its column {name!r} has another type"
            else:
                continue
            raise UserError(
                f"{folder}: written by another version of hf-csm: {problem}.",
                f"Make it again: `{_command_of(folder, read_card_metadata(folder))}`.",
            )


def _command_of(folder: str | Path, metadata: Mapping[str, Any]) -> str:
    """Return the command that makes a table."""
    corpus = metadata.get("corpus", "CORPUS")
    if metadata.get("stage") == "codes":
        return f"hf-csm encode {metadata.get('manifest', f'prepared/{corpus}')} --base-model BASE --out {folder}"
    return f"hf-csm prepare {metadata.get('builder', corpus)} --raw RAW --out {folder} --overwrite"


class ParquetRows:
    """Random access to the rows of many Parquet files, by row group, with a cache of the last used row groups.

    Args:
        files: in the order of their file index.
        columns: to read; all by default.
        cache_bytes: limit of the memory for row groups (one is always kept).
    """

    def __init__(self, files: Iterable[str | Path], columns: Sequence[str] | None = None, cache_bytes: int = 64 << 20):
        self._files = [str(file) for file in files]
        self._columns = None if columns is None else list(columns)
        self._cache_bytes = cache_bytes
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._num_cached_bytes = 0
        # First row of each row group, and one past the last row.
        self._starts: list[list[int]] = []
        self._metadata: list[pq.FileMetaData] = []  # parsed once, not at every read
        for file in self._files:
            metadata = _open_parquet(file).metadata
            self._metadata.append(metadata)
            lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._starts.append([0, *np.cumsum(lengths).tolist()])

    def __len__(self) -> int:
        return sum(starts[-1] for starts in self._starts)

    def num_rows(self, file_index: int) -> int:
        """Return the number of rows of a file."""
        return self._starts[file_index][-1]

    def arrow_row(self, file_index: int, row_index: int) -> pa.Table:
        """Return a table of one row, a view without copy, as `nested_to_numpy` takes it."""
        starts = self._starts[file_index]
        if not 0 <= row_index < starts[-1]:
            raise IndexError(f"row {row_index} of {self._files[file_index]}, which has {starts[-1]}")
        group = bisect.bisect_right(starts, row_index) - 1
        return self._group(file_index, group).slice(row_index - starts[group], 1)

    def row(self, file_index: int, row_index: int) -> dict[str, Any]:
        """Return a row as a dict of plain Python values."""
        return self.arrow_row(file_index, row_index).to_pylist()[0]

    def _group(self, file_index: int, group: int) -> pa.Table:
        key = (file_index, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        name = self._files[file_index]
        with parquet_errors(name), _open_parquet(name, self._metadata[file_index]) as file:
            table = file.read_row_group(group, columns=self._columns, use_threads=False).combine_chunks()
        self._groups[key] = table
        self._num_cached_bytes += table.nbytes
        while self._num_cached_bytes > self._cache_bytes and len(self._groups) > 1:
            _, dropped = self._groups.popitem(last=False)
            self._num_cached_bytes -= dropped.nbytes
        return table


def read_columns(files: Iterable[str | Path], columns: Sequence[str]) -> pa.Table:
    """Read some columns of all rows of many Parquet files, in the order of files and rows."""
    tables = []
    for file in files:
        with parquet_errors(file), _open_parquet(file) as parquet:
            tables.append(parquet.read(columns=list(columns), use_threads=False))
    if not tables:
        raise UserError("The table has no Parquet files.", "Prepare or encode it again.")
    return pa.concat_tables(tables)


def nested_to_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return equal-sized nested lists of numbers as one array, without a Python object per number.

    A column of one row of `codes` gives `[1, 2, Q, T]`.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    shape = [len(array)]
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        num_lists = len(array)
        array = array.flatten()
        assert num_lists and len(array) % num_lists == 0, f"lists of unequal length: {len(array)} in {num_lists}"
        shape.append(len(array) // num_lists)
    return array.to_numpy(zero_copy_only=False).reshape(shape)


@contextlib.contextmanager
def parquet_errors(file: str | Path) -> Iterator[None]:
    """Convert errors of reading a Parquet file to `UserError`."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{file}: not a Parquet file that can be read ({str(error).splitlines()[0]}).",
            "Prepare or encode the table again.",
        ) from error


def _open_parquet(file: str | Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    with parquet_errors(file):
        return pq.ParquetFile(file, memory_map=False, metadata=metadata)
