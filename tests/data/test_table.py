import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_csm.data.schema import UTTERANCE_FEATURES, WINDOW_FEATURES
from hf_csm.data.table import (
    ParquetRows,
    ShardWriter,
    SplitInfo,
    check_schema,
    count_splits,
    nested_to_numpy,
    read_card_metadata,
    read_columns,
    shard_name,
    split_files,
    write_card,
)
from hf_csm.errors import UserError


def window(index, num_frames=5):
    codes = np.arange(2 * 3 * num_frames).reshape(2, 3, num_frames) + index
    return {"id": f"w{index}", "emotion": 2, "codes": codes.tolist(), "num_frames": num_frames, "words": []}


def write_rows(path, rows):
    with ShardWriter(path, WINDOW_FEATURES) as writer:
        writer.write(rows)
    return path


def test_files_depend_on_the_rows_and_not_on_the_size_of_writes(tmp_path):
    rows = [window(index) for index in range(70)]
    whole = write_rows(tmp_path / "a.parquet", rows)
    with ShardWriter(tmp_path / "b.parquet", WINDOW_FEATURES) as writer:
        for start in range(0, 70, 7):
            writer.write(rows[start : start + 7])
    assert whole.read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a.parquet", WINDOW_FEATURES) as writer:
        writer.write([window(0)])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_random_access_stays_within_the_memory_limit(tmp_path):
    files = [write_rows(tmp_path / f"{n}.parquet", [window(n * 100 + i) for i in range(75)]) for n in range(2)]
    table = ParquetRows(files, columns=["id", "codes"], cache_bytes=1)
    assert (len(table), table.num_rows(1)) == (150, 75)
    for file_index, row_index in [(1, 74), (0, 0), (1, 31), (1, 32), (0, 64)]:
        row = table.row(file_index, row_index)
        assert row == {key: window(file_index * 100 + row_index)[key] for key in ("id", "codes")}
        codes = nested_to_numpy(table.arrow_row(file_index, row_index)["codes"])
        np.testing.assert_array_equal(codes[0], row["codes"])
        assert codes.dtype == np.int16
        assert len(table._groups) == 1
    with pytest.raises(IndexError):
        table.row(0, 75)


def test_columns_keep_the_order_of_files_and_rows(tmp_path):
    files = [write_rows(tmp_path / f"{n}.parquet", [window(n * 10 + i) for i in range(3)]) for n in (0, 1)]
    assert read_columns(files, ["id"])["id"].to_pylist() == ["w0", "w1", "w2", "w10", "w11", "w12"]


def test_lists_of_unequal_length_are_rejected():
    with pytest.raises(AssertionError):
        nested_to_numpy(pa.array([[1, 2], [3]]))


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"a\.parquet"):
        ParquetRows([tmp_path / "a.parquet"])


def test_damage_within_a_parquet_file_is_an_error_that_names_it(tmp_path):
    path = write_rows(tmp_path / "a.parquet", [window(index) for index in range(40)])
    content = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path)
    for column in range(metadata.num_columns):
        start = metadata.row_group(0).column(column).data_page_offset
        content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    assert len(ParquetRows([path])) == 40  # the footer is whole
    with pytest.raises(UserError, match=r"a\.parquet"):
        [ParquetRows([path]).row(0, row) for row in range(40)]
    with pytest.raises(UserError, match=r"a\.parquet"):
        read_columns([path], ["id", "codes"])


@pytest.fixture
def table(tmp_path):
    folder = tmp_path / "table"
    counts = {"train": 3, "test": 2}
    for split, count in counts.items():
        write_rows(folder / "data" / split / shard_name("happy", 0, 1), [window(index) for index in range(count)])
    write_card(
        folder,
        features=WINDOW_FEATURES,
        title="A table",
        license="cc-by-4.0",
        splits={split: SplitInfo(count, 1_000) for split, count in counts.items()},
        metadata={"stage": "codes", "codec": {"sha256": "abc"}},
        body="Text.",
    )
    return folder


def test_datasets_loads_and_streams_a_table(table, tmp_path):
    loaded = datasets.load_dataset(str(table), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "test": 2}
    streamed = datasets.load_dataset(str(table), streaming=True)
    assert list(streamed["test"]) == list(loaded["test"])
    assert streamed["test"].features == loaded["test"].features == WINDOW_FEATURES
    assert loaded["train"][1]["codes"] == window(1)["codes"]


def test_the_card_stores_our_metadata(table):
    assert read_card_metadata(table) == {"stage": "codes", "codec": {"sha256": "abc"}}
    assert [path.name for path in split_files(table, "train")] == ["happy-00000-of-00001.parquet"]
    assert split_files(table, "validation") == []


DAMAGED = [f"---\nhf_csm: {value}\n---\n" for value in ("3", "[a]", "text")]


@pytest.mark.parametrize("card", [None, "# Hello\n", "---\nlicense: mit\n---\n", "---\n[\n---\n", *DAMAGED])
def test_a_folder_that_is_not_a_table_is_an_error(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    with pytest.raises(UserError, match="not a table"):
        read_card_metadata(tmp_path)


def test_audio_features_survive_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    with ShardWriter(path, UTTERANCE_FEATURES) as writer:
        writer.write([{"id": "x", "audio": {"bytes": b"fLaC", "path": "x.flac"}, "emotion": None}])
    row = next(iter(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)))
    assert row["audio"] == {"bytes": b"fLaC", "path": "x.flac"}
    assert row["emotion"] is None


def old_table(folder, features, metadata):
    """Write a table of one row as a version with these features would have."""
    with ShardWriter(folder / "data" / "train" / shard_name("happy", 0, 1), features) as writer:
        writer.write([{"id": "a"}])
    write_card(
        folder, features=features, title="t", license="other", splits=count_splits(folder), metadata=metadata, body="b"
    )
    return folder


@pytest.mark.parametrize(
    ("features", "metadata", "command"),
    [
        (
            UTTERANCE_FEATURES,
            {"stage": "prepared", "corpus": "mine", "builder": "csv_manifest"},
            "prepare csv_manifest",
        ),
        (WINDOW_FEATURES, {"stage": "codes", "corpus": "ravdess"}, "encode prepared/ravdess"),
        (WINDOW_FEATURES, {"stage": "codes", "corpus": "talk", "manifest": "talk.jsonl"}, "encode talk.jsonl"),
    ],
)
@pytest.mark.parametrize("difference", ["missing", "type", "labels"])
def test_a_table_of_another_version_is_refused_with_the_command_that_makes_it(
    tmp_path, features, metadata, command, difference
):
    old = features.copy()
    if difference == "missing":
        del old["speaker_id"]
    else:
        other = {
            "type": ("speaker_id", datasets.Value("int32")),
            "labels": ("emotion", datasets.ClassLabel(names=["x"])),
        }
        old.update([other[difference]])
    table = old_table(tmp_path / "old", old, metadata)
    with pytest.raises(UserError, match="another version") as caught:
        check_schema(table, features)
    assert f"hf-csm {command}" in caught.value.remedy and str(table) in caught.value.remedy
    check_schema(old_table(tmp_path / "new", features, metadata), features)


def test_an_optional_column_may_be_missing(tmp_path):
    old = WINDOW_FEATURES.copy()
    del old["language"]
    table = old_table(tmp_path / "old", old, {"stage": "codes", "corpus": "ravdess"})
    check_schema(table, WINDOW_FEATURES, optional=("language",))
    with pytest.raises(UserError, match="'language'"):
        check_schema(table, WINDOW_FEATURES)
