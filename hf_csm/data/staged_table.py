"""A table or folder that is staged beside its place, resumed after a kill, and published by one rename.

The staging folder `.<name>.partial` holds `parts/` (finished parts, one Arrow file each), `table-<key>/` (the folder
that is being assembled) and `lock`. A file exists only once it is complete, so whatever stopped a run, the next one
makes what is missing. Any number of processes on a shared disk may write parts; assembling and publishing need the
lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features
from filelock import FileLock, Timeout

from hf_csm.data.table import ShardWriter, read_card_metadata, shard_name
from hf_csm.errors import UserError
from hf_csm.files import replaced_file


LOCK_NAME = "lock"
LOCK_TIMEOUT_S = 5.0
"""Workers of a killed run may hold its lock until they notice that their parent is gone."""
MAX_SHARD_BYTES = 480_000_000
"""A larger group is split into shards of equal size, which therefore have at least half of it."""


class InUseError(UserError):
    """Another process holds the lock of the staging folder."""


@dataclass(frozen=True)
class Piece:
    """Rows of a part that go into one group of the table.

    Attributes:
        part: Arrow file.
        num_bytes: approximate size in the table.
        batch: the only record batch of the part that is used; all of them by default.
        dropped: rows of that batch that are left out.
    """

    part: Path
    num_bytes: int
    batch: int | None = None
    dropped: tuple[int, ...] = ()


def fingerprint_of(facts: Any) -> str:
    """Return the SHA-256 of everything that a table depends on; `facts` is plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class StagedTable:
    """The staging folder of one table.

    Args:
        out: folder of the table; a link is resolved.
        fingerprint: of everything that the table depends on.
        overwrite: replace any table that is at `out`.
        remedy: second line of the error if `out` holds another table.
    """

    def __init__(
        self,
        out: str | Path,
        fingerprint: str,
        *,
        overwrite: bool = False,
        remedy: str = "Name another folder with --out, or remove this one.",
    ):
        self.out = Path(os.path.realpath(Path(out).expanduser()))
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self.fingerprint = fingerprint
        self._overwrite = overwrite
        self._remedy = remedy

    def is_published(self) -> bool:
        """Return whether this very table is at `out` (always `False` with `overwrite`).

        Raises:
            UserError: `out` holds something that must not be replaced.
        """
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        try:
            found = read_card_metadata(self.out).get("fingerprint")
        except UserError as error:
            raise UserError(
                f"{self.out} exists and holds something else: it is not a table of hf-csm.",
                "Name another folder with --out.",
            ) from error
        if found != self.fingerprint and not self._overwrite:
            raise UserError(
                f"{self.out} exists and holds something else: a table of other input or options.", self._remedy
            )
        return not self._overwrite

    @contextmanager
    def lock(self, timeout_s: float | None = None) -> Iterator[None]:
        """Create the staging folder and lock it against other processes.

        Raises:
            InUseError: another process holds the lock after `timeout_s` (`LOCK_TIMEOUT_S` by default).
        """
        timeout_s = LOCK_TIMEOUT_S if timeout_s is None else timeout_s
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK_NAME)
            try:
                lock.acquire(timeout=timeout_s)
                break
            except FileNotFoundError:  # the process that held it has published and removed the folder
                continue
            except Timeout as error:
                raise InUseError(
                    f"Another process is writing {self.out}.", "Wait for it, or name another folder with --out."
                ) from error
        try:
            yield
        finally:
            lock.release()

    def part(self, name: str) -> Path:
        """Return the path of a part; the file exists if the part is complete."""
        return self.folder / "parts" / f"{name}.arrow"

    def table(self, key: str) -> Path:
        """Create the folder to assemble the table in; what was assembled under other keys is removed. Needs the lock.

        Args:
            key: of what goes into it, so that complete files in it can be kept.
        """
        table = self.folder / f"table-{key}"
        for other in self.folder.glob("table*"):
            if other != table:
                shutil.rmtree(other, ignore_errors=True)
        table.mkdir(exist_ok=True)
        for unfinished in table.rglob(".*.tmp"):
            unfinished.unlink()
        return table

    def publish(self, table: Path) -> None:
        """Rename the assembled table to `out` and remove the staging folder. Needs the lock.

        With `overwrite`, the old table stays until the new one is in its place.
        """
        if self.out.exists():
            replaced = self.folder / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.out, replaced)
        os.replace(table, self.out)
        self.remove()

    def remove(self) -> None:
        """Remove the staging folder, its lock last: until then no other run can start in it. Needs the lock."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)  # Windows cannot delete a lock that is held


def plan_shards(table: Path, groups: Mapping[tuple[str, str], Sequence[Piece]]) -> dict[Path, list[Piece]]:
    """Lay the pieces of each (split, group) out over shards of equal size, in order.

    Returns:
        the pieces of each file of the table.
    """
    shards: dict[Path, list[Piece]] = {}
    for (split, group), pieces in groups.items():
        ends = equal_files([piece.num_bytes for piece in pieces])
        for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            shards[table / "data" / split / shard_name(group, index, len(ends))] = list(pieces[start:end])
    return shards


@contextmanager
def part_writer(path: Path, features: Features, compression: str | None = None) -> Iterator[pa.RecordBatchFileWriter]:
    """Write one part, an Arrow file; it appears when the block ends without error."""
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        replaced_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, features.arrow_schema, options=options) as writer,
    ):
        yield writer


def merge_pieces(pieces: Sequence[Piece], path: Path, features: Features, compression: str = "none") -> None:
    """Write one shard of the table from pieces of parts, a record batch in memory at a time."""
    with ShardWriter(path, features, compression) as writer:
        for piece in pieces:
            with pa.memory_map(str(piece.part)) as source, pa.ipc.open_file(source) as file:
                for batch in range(file.num_record_batches) if piece.batch is None else [piece.batch]:
                    rows = pa.Table.from_batches([file.get_batch(batch)])
                    if piece.dropped:
                        rows = rows.take([row for row in range(len(rows)) if row not in piece.dropped])
                    writer.write(rows)


def equal_files(num_bytes: Sequence[int]) -> list[int]:
    """Divide pieces, in order, among as few files of equal size as hold at most about `MAX_SHARD_BYTES` each.

    Returns:
        the index one past the last piece of each file, ascending.
    """
    edges = np.cumsum(num_bytes)
    num_files = max(1, -(-int(edges[-1]) // MAX_SHARD_BYTES))
    ends = [int(np.searchsorted(edges, edges[-1] * (file + 1) / num_files - 0.5)) + 1 for file in range(num_files)]
    return sorted(set(ends[:-1]) | {len(num_bytes)})
