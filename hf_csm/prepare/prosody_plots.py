"""Plots for the card of a prepared table: pitch, loudness and speaking rate by emotion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_csm.data.labels import EMOTIONS, UNLABELLED, emotion_name
from hf_csm.data.schema import PROSODY_COLUMNS, SPLITS
from hf_csm.data.table import read_columns, split_files
from hf_csm.files import replaced_file


FOLDER = "plots"


_MEASURES = (
    ("f0_median_hz", "median F0, Hz", 0, "gender"),
    ("f0_range_st", "F0 range, semitones", 1, None),
    ("loudness_range_db", "loudness range, dB", 1, None),
    ("words_per_s", "words/s", 2, "language"),
    ("voiced_share", "voiced share", 2, None),
)
"""Prosody column, heading, number of digits, and the column by which medians are separated."""
assert tuple(column for column, *_ in _MEASURES) == PROSODY_COLUMNS

_HOW = """\
Medians over the clips of all splits. Boxes hold the middle half of the clips, whiskers 90 %. Between the first word's
start and the last one's end: F0 (swift-f0, 50 to 800 Hz, voiced from a confidence of 0.5) as the median of the voiced
frames and the range from their 5th to their 95th percentile; loudness range as in EBU Tech 3342, from the 10th to the
95th percentile, over windows of 400 ms; words by time, pauses included (a Chinese character is a word); voiced frames
by frames. A clip in which a measure is undefined is left out of it."""


def draw_prosody(table: Path) -> str:
    """Plot the prosody of a prepared table by emotion as PNGs in its folder `plots`; same rows, same bytes.

    Returns:
        a section for the card: plots, medians and definitions of the measures; empty if nothing was measured.
    """
    files = [file for split in SPLITS for file in split_files(table, split)]
    rows = read_columns(files, ["emotion", "gender", "language", *PROSODY_COLUMNS])
    measured = [measure for measure in _MEASURES if rows[measure[0]].null_count < len(rows)]
    if not measured:
        return ""
    emotions = [emotion_name(index) for index in rows["emotion"].to_pylist()]
    present = [emotion for emotion in (*EMOTIONS, UNLABELLED) if emotion in set(emotions)]
    by_emotion = {emotion: np.array([own == emotion for own in emotions]) for emotion in present}
    header, columns, pictures = ["emotion", "clips"], [], []
    for column, heading, digits, group_by in measured:
        values = rows[column].to_numpy().astype(np.float64)  # null is nan
        boxes: dict[str, list[np.ndarray]] = {}
        for group, is_member in _groups(rows, group_by):
            own = [values[is_member & is_emotion] for is_emotion in by_emotion.values()]
            boxes[group] = [found[~np.isnan(found)] for found in own]
        for group, of_emotions in boxes.items():
            header.append(f"{heading} ({group})" if group else heading)
            columns.append([f"{np.median(v):.{digits}f}" if len(v) else "" for v in of_emotions])
        _draw(Path(table, FOLDER, f"{column}.png"), heading, present, boxes)
        pictures.append(f"![{heading} by emotion]({FOLDER}/{column}.png)")
    counts = [f"{int(is_emotion.sum()):,}" for is_emotion in by_emotion.values()]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *zip(present, counts, *columns, strict=True)]
    medians = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## Prosody\n\n{medians}\n\n{' '.join(pictures)}\n\n{_HOW}\n"


def _groups(rows: pa.Table, column: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the values of a column and the rows that have them; one nameless group if there is only one value."""
    values = [None] * len(rows) if column is None else rows[column].to_pylist()
    names = sorted({value for value in values if value is not None})
    if len(names) < 2:
        yield "", np.ones(len(rows), dtype=bool)
        return
    for name in names:
        yield name, np.array([value == name for value in values])


def _draw(path: Path, heading: str, emotions: list[str], boxes: dict[str, list[np.ndarray]]) -> None:
    """Draw a box for each emotion and group. The bytes depend on the values only, not on user settings or time."""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no display, no state
    from matplotlib.patches import Patch

    with matplotlib.style.context("default"):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(boxes)
        legend = []
        for index, (group, of_emotions) in enumerate(boxes.items()):
            style: dict[str, Any] = {"facecolor": f"C{index}", "alpha": 0.45}
            axes.boxplot(
                of_emotions,
                positions=[place + (index - (len(boxes) - 1) / 2) * width for place in range(len(emotions))],
                widths=0.85 * width,
                whis=(5, 95),
                showfliers=False,
                patch_artist=True,
                boxprops=style,
                medianprops={"color": "black"},
            )
            legend.append(Patch(label=group, **style))
        axes.set_xticks(range(len(emotions)), emotions, rotation=30)
        axes.set_xlim(-0.5, len(emotions) - 0.5)
        axes.set_ylabel(heading)
        axes.grid(axis="y", alpha=0.3)
        if len(boxes) > 1:
            axes.legend(handles=legend, loc="best")
        with replaced_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
