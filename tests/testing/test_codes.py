import numpy as np
from datasets import load_dataset

from hf_csm.data.table import read_card_metadata
from hf_csm.testing.codes import RandomWindow, write_random_codes


def test_the_table_is_one_of_codes(tmp_path):
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
