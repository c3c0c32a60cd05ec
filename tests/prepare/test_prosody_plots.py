import re

import numpy as np
import pytest

from hf_csm.data.schema import PROSODY_COLUMNS, UTTERANCE_FEATURES
from hf_csm.data.table import ShardWriter
from hf_csm.prepare.prosody_plots import draw_prosody


def write_rows(table, rows, split="train"):
    empty = dict.fromkeys(UTTERANCE_FEATURES)
    with ShardWriter(table / "data" / split / "x-00000-of-00001.parquet", UTTERANCE_FEATURES) as writer:
        writer.write([{**empty, "split": split, "words": [], **row} for row in rows])
    return table


def row(emotion, f0_hz, gender=None, language="en", **changes):
    values = dict(zip(PROSODY_COLUMNS, [f0_hz, 4.0, 8.0, 2.5, 0.7], strict=True))
    return {"emotion": emotion, "gender": gender, "language": language, **values, **changes}


def table_of(section):
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def test_medians_are_by_emotion_over_all_splits_in_label_order(tmp_path):
    write_rows(tmp_path, [row(4, 200.0), row(0, 100.0), row(0, 120.0)])
    write_rows(tmp_path, [row(0, 140.0, words_per_s=None), row(None, 150.0)], "test")
    rows = table_of(draw_prosody(tmp_path))
    assert [(r["emotion"], r["clips"], r["median F0, Hz"]) for r in rows] == [
        ("neutral", "3", "120"),
        ("angry", "1", "200"),
        ("unlabelled", "1", "150"),
    ]
    assert rows[0]["words/s"] == "2.50"


def test_median_pitch_is_by_gender(tmp_path):
    write_rows(tmp_path, [row(0, 100.0, "male"), row(0, 200.0, "female"), row(2, 220.0, "female"), row(0, 300.0)])
    rows = table_of(draw_prosody(tmp_path))
    assert [(r["median F0, Hz (female)"], r["median F0, Hz (male)"]) for r in rows] == [("200", "100"), ("220", "")]
    assert rows[0]["F0 range, semitones"] == "4.0"


def test_median_rate_is_by_language(tmp_path):
    write_rows(tmp_path, [row(0, 100.0), row(0, 100.0, language="zh", words_per_s=5.0)])
    assert table_of(draw_prosody(tmp_path))[0]["words/s (zh)"] == "5.00"


def test_every_plot_exists_and_is_linked(tmp_path):
    links = re.findall(r"\]\((.*?)\)", draw_prosody(write_rows(tmp_path, [row(3, 100.0, "male")])))
    assert len(links) == 5
    for link in links:
        assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(link[6:] for link in links)


def test_the_same_rows_give_the_same_bytes_under_any_style(tmp_path):
    import matplotlib

    drawn = []
    for name, line_width in (("a", 1), ("b", 9)):
        with matplotlib.rc_context({"axes.linewidth": line_width}):
            table = write_rows(tmp_path / name, [row(index % 8, 100.0 + index) for index in range(40)])
            text = draw_prosody(table)
            drawn.append((text, [path.read_bytes() for path in sorted((table / "plots").iterdir())]))
    assert drawn[0] == drawn[1]


def test_a_table_without_prosody_gets_no_section_and_no_folder(tmp_path):
    assert draw_prosody(write_rows(tmp_path, [row(0, None, **dict.fromkeys(PROSODY_COLUMNS))])) == ""
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("missing", PROSODY_COLUMNS)
def test_a_measure_without_values_is_left_out(tmp_path, missing):
    section = draw_prosody(write_rows(tmp_path, [row(0, 100.0, **{missing: None})]))
    assert f"{missing}.png" not in section
    assert section.count(".png") == 4


def test_thousands_of_clips_fit_in_the_plot(tmp_path):
    rng = np.random.default_rng(0)
    rows = [row(int(rng.integers(8)), float(rng.normal(150, 20)), "female") for _ in range(3_000)]
    assert sum(int(r["clips"].replace(",", "")) for r in table_of(draw_prosody(write_rows(tmp_path, rows)))) == 3_000
