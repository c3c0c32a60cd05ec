"""A table or folder in the making, by any number of processes on any number of machines that share a disk.

Work is cut into units. Each is written as a part into a hidden folder beside the table and is there when it is whole,
so a run that was cut short goes on after its last part, with any number of processes. Whoever finds all parts there
merges those of a cell, in order, into files of 250 to 500 MB, and publishes the table by one rename. The processes say
nothing to each other. The table depends on the units alone.
"""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from hf_csm.data.schema import SPLITS
from hf_csm.data.table import (
    ShardWriter,
    SplitInfo,
    equal_files,
    read_card_metadata,
    shard_name,
    split_files,
)
from hf_csm.encode.compose import BLOCK_CONVERSATIONS, Conversation
from hf_csm.errors import UserError
from hf_csm.units import Seconds, samples_to_seconds


Item = TypeVar("Item", bound=Conversation)
FINGERPRINT_DIGITS = 12


@dataclass(frozen=True)
class Unit(Generic[Item]):
    """Conversations of one cell of a table that one process makes together.

    Attributes:
        name: of the file that holds them until the table is whole; sorts in the order of the cell's units.
    """

    split: str
    cell: str
    name: str
    conversations: list[Item]

    @property
    def duration_s(self) -> Seconds:
        """Length of all of them together."""
        return samples_to_seconds(sum(conversation.num_samples for conversation in self.conversations))


def cut_units(split: str, cell: str, conversations: Sequence[Item]) -> list[Unit[Item]]:
    """Cut the conversations of a cell into units, in order."""
    total = -(-len(conversations) // BLOCK_CONVERSATIONS)
    return [
        Unit(
            split,
            cell,
            shard_name(cell, index, total),
            list(conversations[index * BLOCK_CONVERSATIONS : (index + 1) * BLOCK_CONVERSATIONS]),
        )
        for index in range(total)
    ]


class Staging:
    """The hidden folder of one table in the making.

    Args:
        out: where the table goes.
        fingerprint: of everything that the table depends on; hexadecimal.

    Raises:
        UserError: `out` holds something else.
    """

    def __init__(self, out: Path, fingerprint: str):
        self.out = Path(os.path.abspath(out))
        self.fingerprint = fingerprint
        self.folder = self.out.parent / f".{self.out.name}.{fingerprint[:FINGERPRINT_DIGITS]}.partial"
        self._claim = self.folder / "claimed"
        if not self.is_published():
            self.folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is found out at once
        self._was_claimed = self._claim.exists()

    def is_published(self) -> bool:
        """Say whether the table is at `out`; raise if something else is."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        try:
            is_same = read_card_metadata(self.out).get("fingerprint") == self.fingerprint
        except UserError:
            is_same = False
        if not is_same:
            raise UserError(
                f"{self.out} exists and holds something else.", "Choose another --out, or remove that folder."
            )
        return True

    def has(self, unit: Unit) -> bool:
        """Say whether the part of a unit is there."""
        return self._part(unit).exists()

    @contextmanager
    def part(self, unit: Unit, features: Features) -> Iterator[ShardWriter]:
        """Open the part of a unit for writing; it is there once the `with` block ends without error."""
        part = self._part(unit)
        private = part.with_name(f"{uuid.uuid4().hex[:8]}-{part.name}")  # should two processes make the same part
        with ShardWriter(private, features, compression="zstd") as writer:
            yield writer
        os.replace(private, part)

    def publish_table(
        self, units: Sequence[Unit], features: Features, write_card: Callable[[Path, Mapping[str, SplitInfo]], None]
    ) -> bool:
        """Merge the parts of all units, write the card and publish, unless other processes still have work to do.

        Args:
            write_card: writes the card into the folder it is given.

        Returns:
            whether the table is at `out` now.
        """
        if not all(self.has(unit) for unit in units):
            return self.is_published()

        def fill(table: Path) -> None:
            cells: dict[tuple[str, str], list[Unit]] = {}
            for unit in units:
                cells.setdefault((unit.split, unit.cell), []).append(unit)
            num_rows = dict.fromkeys(SPLITS, 0)
            for (split, cell), own_units in cells.items():
                self._merge(own_units, table / "data" / split, cell, features)
                num_rows[split] += sum(len(unit.conversations) for unit in own_units)
            files = {split: split_files(table, split) for split in SPLITS}
            write_card(
                table,
                {
                    split: SplitInfo(num_rows[split], sum(path.stat().st_size for path in paths))
                    for split, paths in files.items()
                    if paths
                },
            )

        return self.publish(fill)

    def publish(self, fill: Callable[[Path], None]) -> bool:
        """Let `fill` make a folder and rename it to `out`; only one process does, the others return `False` at once.

        A claim that was there before this run began is that of a process that was killed, so it counts for nothing.
        Should its process live after all, both do the same work apart from each other and the first one publishes.
        """
        try:
            self._claim.mkdir()
        except (FileExistsError, FileNotFoundError):  # claimed by another, which may have published meanwhile
            if not self._was_claimed:
                return self.is_published()
        private = self.folder / f"table-{uuid.uuid4().hex[:8]}"
        try:
            private.mkdir()
            fill(private)
            self.put_in_place(private)
        except OSError:
            shutil.rmtree(private, ignore_errors=True)
            if not self.is_published():
                raise
        except BaseException:
            shutil.rmtree(private, ignore_errors=True)
            raise
        return True

    def put_in_place(self, folder: Path) -> None:
        """Rename a folder to `out` and remove all that was staged for it, with these settings or others."""
        os.rename(folder, self.out)
        abandoned = f".{glob.escape(self.out.name)}.{'[0-9a-f]' * FINGERPRINT_DIGITS}.partial"
        for staged in self.out.parent.glob(abandoned):
            shutil.rmtree(staged, ignore_errors=True)

    def _part(self, unit: Unit) -> Path:
        return self.folder / "parts" / unit.split / unit.name

    def _merge(self, units: Sequence[Unit], folder: Path, cell: str, features: Features) -> None:
        """Merge the parts of a cell, a row group in memory at a time."""
        parts = [self._part(unit) for unit in units]
        ends = equal_files([part.stat().st_size for part in parts])
        for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            path = folder / shard_name(cell, index, len(ends))
            with ShardWriter(path, features, compression="zstd") as writer:
                for part in parts[start:end]:
                    with pq.ParquetFile(part, memory_map=False) as file:
                        for group in range(file.metadata.num_row_groups):
                            table: pa.Table = file.read_row_group(group, use_threads=False)
                            writer.write(table)
