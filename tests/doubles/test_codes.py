import shutil

import numpy as np
from datasets import load_dataset

from hf_csm.data.table import read_card_metadata
from hf_csm.hub import is_whole
from tests.doubles.codes import RandomWindow, restate_sizes, write_random_codes


def test_the_table_loads_as_a_table_of_codes(tmp_path):
    windows = [RandomWindow("sad", 100), RandomWindow(None, 30, "02", "validation", None)]
    folder = write_random_codes(tmp_path / "esd", windows, num_codebooks=4)
    assert read_card_metadata(folder)["stage"] == "codes"
    table = load_dataset(str(folder))
    (row,) = table["train"]
    assert np.asarray(row["codes"]).shape == (2, 4, 100)
    assert (row["corpus"], row["speaker_id"], row["language"]) == ("esd", "esd-01", "en")
    assert {word["channel"] for word in row["words"]} == {0, 1}
    (row,) = table["validation"]
    assert (row["emotion"], row["language"], row["num_frames"]) == (None, None, 30)


def test_a_table_is_whole_if_its_files_match_its_card(tmp_path):
    table = write_random_codes(tmp_path / "esd", [RandomWindow("sad", 5), RandomWindow("sad", 5, split="test")])
    (tmp_path / "empty").mkdir()
    empty = write_random_codes(tmp_path / "empty", [])
    assert is_whole(table) and is_whole(empty)
    for split in ("validation", "train"):
        shutil.copytree(table / "data" / "test", empty / "data" / split)
        assert not is_whole(empty)
        shutil.rmtree(empty / "data")
    shutil.rmtree(table / "data" / "test")
    assert not is_whole(table)
    restate_sizes(table)
    assert is_whole(table)
