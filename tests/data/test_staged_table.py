import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Value

from hf_csm.data import staged_table
from hf_csm.data.staged_table import Piece, StagedTable, equal_files, merge_pieces, part_writer, plan_shards
from hf_csm.data.table import count_splits, write_card
from hf_csm.errors import UserError


FEATURES = Features({"id": Value("string"), "text": Value("string")})
FINGERPRINT = "0123456789abcdef"
TRAIN = ("train", "happy")


def write_parts(staged, *sizes, name="happy"):
    ids = iter(range(sum(sizes)))
    pieces = []
    for index, size in enumerate(sizes):
        part = staged.part(f"{name}-{index}")
        rows = [{"id": f"{name}{next(ids)}", "text": "x" * 50} for _ in range(size)]
        with part_writer(part, FEATURES) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema), max_chunksize=32)
        pieces.append(Piece(part, size))
    return pieces


def assemble(staged, groups):
    table = staged.table("key")
    for path, pieces in plan_shards(table, groups).items():
        merge_pieces(pieces, path, FEATURES)
    metadata = {"stage": "codes", "fingerprint": staged.fingerprint}
    write_card(
        table, features=FEATURES, title="t", license="other", splits=count_splits(table), metadata=metadata, body="b"
    )
    return table


def publish(staged, groups):
    with staged.lock():
        staged.publish(assemble(staged, groups))


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_parts_of_any_size_become_a_file_of_full_row_groups(tmp_path):
    staged = StagedTable(tmp_path / "out", FINGERPRINT)
    assert not staged.is_published()
    publish(staged, {TRAIN: write_parts(staged, 7, 40, 1, 33)})
    (file,) = (tmp_path / "out" / "data" / "train").iterdir()
    parquet = pq.ParquetFile(file)
    assert file.name == "happy-00000-of-00001.parquet"
    assert [parquet.metadata.row_group(i).num_rows for i in range(3)] == [32, 32, 17]
    assert parquet.read().column("id").to_pylist() == [f"happy{i}" for i in range(81)]
    assert staged.is_published()
    assert hidden(tmp_path) == []


def test_one_batch_of_a_part_less_some_rows_is_merged(tmp_path):
    staged = StagedTable(tmp_path / "out", FINGERPRINT)
    (piece,) = write_parts(staged, 40)
    publish(staged, {TRAIN: [Piece(piece.part, 1, batch=1, dropped=(0, 6))]})
    assert pq.read_table(tmp_path / "out" / "data")["id"].to_pylist() == [
        f"happy{i}" for i in range(33, 40) if i != 38
    ]


def test_a_large_group_is_split_between_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(staged_table, "MAX_SHARD_BYTES", 40)
    staged = StagedTable(tmp_path / "out", FINGERPRINT)
    groups = {
        TRAIN: write_parts(staged, *[10] * 9),
        ("train", "sad"): write_parts(staged, 5, name="sad"),
        ("test", "happy"): write_parts(staged, 5, name="test"),
    }
    publish(staged, groups)
    rows = {
        str(path.relative_to(tmp_path / "out" / "data")): pq.read_metadata(path).num_rows
        for path in (tmp_path / "out" / "data").rglob("*.parquet")
    }
    assert rows == {
        "train/happy-00000-of-00003.parquet": 30,
        "train/happy-00001-of-00003.parquet": 30,
        "train/happy-00002-of-00003.parquet": 30,
        "train/sad-00000-of-00001.parquet": 5,
        "test/happy-00000-of-00001.parquet": 5,
    }


def test_equal_files_stay_below_the_limit():
    assert equal_files([150_000_000] * 4) == [2, 4]
    assert equal_files([1]) == [1]


def test_a_part_that_was_interrupted_does_not_exist(tmp_path):
    staged = StagedTable(tmp_path / "out", FINGERPRINT)
    rows = pa.Table.from_pylist([{"id": "a", "text": ""}], schema=FEATURES.arrow_schema)
    with pytest.raises(KeyboardInterrupt), part_writer(staged.part("a"), FEATURES) as writer:
        writer.write_table(rows)
        raise KeyboardInterrupt
    assert not staged.part("a").exists()


def test_while_one_process_holds_the_lock_another_is_refused_and_afterwards_not(tmp_path):
    staged = StagedTable(tmp_path / "out", FINGERPRINT)
    code = f"""
from hf_csm.data.staged_table import StagedTable
with StagedTable({str(tmp_path / "out")!r}, "0").lock():
    print("locked", flush=True)
    input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match=r"Another process is writing .*out"), staged.lock(timeout_s=0.0):
        pass
    other.kill()
    other.wait()
    with staged.lock():
        staged.remove()
    assert hidden(tmp_path) == []


def test_a_run_that_waited_for_the_lock_of_one_that_published_finds_the_table(tmp_path):
    """The holder removes the lock file with the staging folder; a waiting run must not lock the removed file."""
    first, second = StagedTable(tmp_path / "out", FINGERPRINT), StagedTable(tmp_path / "out", FINGERPRINT)
    publish(first, {TRAIN: write_parts(first, 3)})
    with second.lock():
        assert second.is_published()
        assert (second.folder / "lock").exists()
        second.remove()
    assert hidden(tmp_path) == []


def test_an_assembly_that_failed_keeps_parts_and_complete_files_and_drops_the_rest(tmp_path):
    staged = StagedTable(tmp_path / "out", FINGERPRINT)
    pieces = write_parts(staged, 3, 3)
    with pytest.raises(OSError, match="disk full"), staged.lock():
        assemble(staged, {TRAIN: pieces})
        (staged.table("key") / "data" / "train" / ".sad.parquet.0a1b2c3d.tmp").write_bytes(b"PAR1")  # of a killed run
        (staged.folder / "table-other").mkdir()
        raise OSError("disk full")
    assert all(piece.part.exists() for piece in pieces)
    with staged.lock():
        table = staged.table("key")
        assert [path.name for path in (table / "data" / "train").iterdir()] == ["happy-00000-of-00001.parquet"]
        assert not (staged.folder / "table-other").exists()
        staged.publish(table)
    assert pq.read_table(tmp_path / "out" / "data").num_rows == 6


def test_only_staging_folders_of_this_table_are_removed(tmp_path):
    abandoned = StagedTable(tmp_path / "out", "f" * 16).part("a")
    other = StagedTable(tmp_path / "out.v2", "f" * 16).part("a")
    for part in (abandoned, other):
        part.parent.mkdir(parents=True)
        part.write_bytes(b"")
    staged = StagedTable(tmp_path / "out", FINGERPRINT)
    publish(staged, {TRAIN: write_parts(staged, 3)})
    assert not abandoned.exists()
    assert other.exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "README.md"])
def test_other_files_at_out_are_kept(tmp_path, name, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        StagedTable(tmp_path / "out", FINGERPRINT, overwrite=overwrite).is_published()
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert hidden(tmp_path) == []


def test_a_table_of_other_input_is_replaced_only_with_overwrite(tmp_path):
    old = StagedTable(tmp_path / "out", "f" * 16)
    publish(old, {TRAIN: write_parts(old, 3)})
    with pytest.raises(UserError, match="holds something else"):
        StagedTable(tmp_path / "out", FINGERPRINT).is_published()
    new = StagedTable(tmp_path / "out", FINGERPRINT, overwrite=True)
    assert not new.is_published()
    publish(new, {TRAIN: write_parts(new, 4)})
    assert pq.read_table(tmp_path / "out" / "data").num_rows == 4
    assert hidden(tmp_path) == []


def test_an_empty_folder_at_out_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    staged = StagedTable(tmp_path / "out", FINGERPRINT)
    assert not staged.is_published()
    publish(staged, {TRAIN: write_parts(staged, 3)})
    assert staged.is_published()
