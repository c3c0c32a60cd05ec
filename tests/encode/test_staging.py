import functools

import pyarrow.parquet as pq
import pytest
from datasets import Features, Value

from hf_csm.data.table import write_card
from hf_csm.encode import staging as module
from hf_csm.encode.staging import Staging, Unit
from hf_csm.errors import UserError


FEATURES = Features({"id": Value("string"), "text": Value("string")})
FINGERPRINT = "0123456789abcdef"


def units_of(*sizes, split="train", cell="happy"):
    ids = iter(range(sum(sizes)))
    return [
        Unit(split, cell, f"{cell}-{i:05d}-of-{len(sizes):05d}.parquet", [f"{cell}{next(ids)}" for _ in range(size)])
        for i, size in enumerate(sizes)
    ]


def write_parts(staging, units):
    for unit in units:
        with staging.part(unit, FEATURES) as writer:
            writer.write([{"id": id_, "text": "x" * 50} for id_ in unit.conversations])


def publish(staging, units, before=lambda: None):
    def card(folder, splits):
        before()
        metadata = {"stage": "codes", "fingerprint": staging.fingerprint}
        write_card(folder, features=FEATURES, title="t", license="other", splits=splits, metadata=metadata, body="b")

    return staging.publish_table(units, FEATURES, card)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_parts_of_any_size_become_a_file_of_full_row_groups(tmp_path):
    units = units_of(7, 40, 1, 33)
    staging = Staging(tmp_path / "out", FINGERPRINT)
    write_parts(staging, units)
    assert publish(staging, units)
    (file,) = (tmp_path / "out" / "data" / "train").iterdir()
    parquet = pq.ParquetFile(file)
    assert file.name == "happy-00000-of-00001.parquet"
    assert [parquet.metadata.row_group(i).num_rows for i in range(3)] == [32, 32, 17]
    assert parquet.read().column("id").to_pylist() == [id_ for unit in units for id_ in unit.conversations]
    assert hidden(tmp_path) == []


def test_a_large_cell_is_cut_in_files_between_parts(tmp_path, monkeypatch):
    units = [*units_of(*[10] * 9), *units_of(5, cell="sad"), *units_of(5, split="test")]
    staging = Staging(tmp_path / "out", FINGERPRINT)
    write_parts(staging, units)
    size = (staging.folder / "parts" / "train" / units[0].name).stat().st_size
    monkeypatch.setattr(module, "equal_files", functools.partial(module.equal_files, most=4 * size))
    assert publish(staging, units)
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


def test_nothing_is_published_while_a_part_is_missing(tmp_path):
    units = units_of(3, 3)
    staging = Staging(tmp_path / "out", FINGERPRINT)
    write_parts(staging, units[:1])
    assert not publish(staging, units)
    assert not (tmp_path / "out").exists()


def test_a_part_that_was_cut_short_does_not_exist(tmp_path):
    (unit,) = units_of(3)
    staging = Staging(tmp_path / "out", FINGERPRINT)
    with pytest.raises(KeyboardInterrupt), staging.part(unit, FEATURES) as writer:
        writer.write([{"id": "a", "text": ""}])
        raise KeyboardInterrupt
    assert not staging.has(unit)


def test_of_two_that_end_together_one_publishes(tmp_path):
    units = units_of(3, 3)
    first, second = Staging(tmp_path / "out", FINGERPRINT), Staging(tmp_path / "out", FINGERPRINT)
    write_parts(first, units)
    seconds = []
    assert publish(first, units, before=lambda: seconds.append(publish(second, units)))
    assert seconds == [False]
    assert publish(second, units)  # it is there by now


def test_a_rerun_takes_over_from_one_that_was_killed_while_it_merged(tmp_path):
    units = units_of(3, 3)
    killed = Staging(tmp_path / "out", FINGERPRINT)
    write_parts(killed, units)
    (killed.folder / "claimed").mkdir()
    assert publish(Staging(tmp_path / "out", FINGERPRINT), units)
    assert hidden(tmp_path) == []


def test_a_rerun_that_takes_over_from_one_that_lives_does_no_harm(tmp_path):
    units = units_of(3, 3)
    slow = Staging(tmp_path / "out", FINGERPRINT)
    write_parts(slow, units)
    reruns = []
    assert publish(slow, units, before=lambda: reruns.append(publish(Staging(tmp_path / "out", FINGERPRINT), units)))
    assert reruns == [True]
    assert pq.read_table(tmp_path / "out" / "data").num_rows == 6
    assert hidden(tmp_path) == []


def test_a_merge_that_fails_leaves_the_parts(tmp_path):
    def fail():
        raise OSError("disk full")

    units = units_of(3, 3)
    staging = Staging(tmp_path / "out", FINGERPRINT)
    write_parts(staging, units)
    with pytest.raises(OSError, match="disk full"):
        publish(staging, units, before=fail)
    assert not list(staging.folder.glob("table-*"))
    assert publish(Staging(tmp_path / "out", FINGERPRINT), units)


def test_only_what_was_staged_for_this_table_is_removed(tmp_path):
    abandoned = Staging(tmp_path / "out", "f" * 16).folder
    other = Staging(tmp_path / "out.v2", "f" * 16).folder
    units = units_of(3)
    staging = Staging(tmp_path / "out", FINGERPRINT)
    write_parts(staging, units)
    assert publish(staging, units)
    assert not abandoned.exists()
    assert other.exists()


@pytest.mark.parametrize("name", ["notes.txt", "README.md"])
def test_what_else_is_at_out_is_kept(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        Staging(tmp_path / "out", FINGERPRINT)
    assert hidden(tmp_path) == []


def test_an_empty_folder_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    units = units_of(3)
    staging = Staging(tmp_path / "out", FINGERPRINT)
    write_parts(staging, units)
    assert publish(staging, units)
