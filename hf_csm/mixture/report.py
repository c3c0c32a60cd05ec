"""Preview of the training mixture: its groups as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hf_csm.config import DatasetConfig, RunConfig
from hf_csm.data.table import CARD_NAME
from hf_csm.errors import UserError
from hf_csm.files import replaced_file
from hf_csm.mixture.groups import Group, expected_repeats
from hf_csm.mixture.loader import mix
from hf_csm.mixture.windows import (
    WindowTable,
    held_out_table,
    is_manifest,
    manifest_table,
    training_table,
    with_tables,
)
from hf_csm.units import Seconds, frames_to_seconds


MAX_GROUPS = 60
"""Groups listed individually, the longest ones; the others are summed up."""
REST = "others"


@dataclass(frozen=True)
class Line:
    """A group of the mixture, or several together.

    Attributes:
        names: its corpus, emotion or other traits of `balance.by`.
        probability: that a drawn window is of it.
        repeats: expected passes over it in an epoch.
        is_capped: whether `max_repeats` limits it, or the part of it in one table.
    """

    names: tuple[str, ...]
    num_windows: int
    duration_s: Seconds
    probability: float
    repeats: float
    is_capped: bool


@dataclass(frozen=True)
class Description:
    """The mixture of a run.

    Attributes:
        by: traits that make a group.
        groups: in order of name.
        replay: the dialogues for replay, if there are any.
        split_s: length of the windows of each split; `train` without replay.
        notes: filters and cut windows.
    """

    by: tuple[str, ...]
    groups: list[Line]
    replay: Line | None
    max_repeats: float
    split_s: dict[str, Seconds]
    notes: list[str]

    @property
    def sources(self) -> Line:
        """All groups together."""
        return replace(_sum_up(("all",), self.groups), is_capped=False)

    def shown(self) -> list[Line]:
        """Return a line for each group, or for the largest ones and one for the rest."""
        if len(self.groups) <= MAX_GROUPS:
            return self.groups
        largest = {id(line) for line in sorted(self.groups, key=lambda line: -line.duration_s)[: MAX_GROUPS - 1]}
        rest = [line for line in self.groups if id(line) not in largest]
        return [
            *(line for line in self.groups if id(line) in largest),
            _sum_up((f"{len(rest)} {REST}",), rest),
        ]

    def render(self) -> str:
        """Return the description as a text table."""
        lines = [*self.shown(), self.sources, *([self.replay] if self.replay else [])]
        columns = range(len(self.by))
        names = [[line.names[i] if i < len(line.names) else "" for i in columns] for line in lines]
        widths = [max(12, len(self.by[i]), *(len(row[i]) for row in names)) + 2 for i in columns]

        def left(texts: Sequence[str]) -> str:
            return "".join(text.ljust(width) for text, width in zip(texts, widths, strict=True))

        text = [f"{left(self.by)}{'windows':>9}{'hours':>9}{'drawn':>9}{'repeats':>9}"]
        for line, row in zip(lines, names, strict=True):
            text.append(
                f"{left(row)}{line.num_windows:>9,}{line.duration_s / 3600:>9.2f}{line.probability:>9.1%}"
                f"{line.repeats:>9.2f}{' *' if line.is_capped else ''}"
            )
        if any(line.is_capped for line in self.groups):
            text.append(f"* capped at dataset.balance.max_repeats {self.max_repeats:g}")
        more = self.replay.repeats * self.replay.duration_s / 3600 if self.replay else 0.0
        text.append(
            f"repeats: passes over a group in an epoch, which draws {self.sources.duration_s / 3600:.2f} hours"
            + (f" and {more:.2f} hours of replay" if self.replay else "")
        )
        text.append("hours: " + ", ".join(f"{split} {s / 3600:.2f}" for split, s in self.split_s.items()))
        return "\n".join([*text, *self.notes])

    def draw(self, path: Path) -> None:
        """Draw the description as PNG: hours and draws of each group, and its expected repeats."""
        import matplotlib.style
        from matplotlib.figure import Figure  # without pyplot: no display, no state

        lines = [*self.shown(), *([self.replay] if self.replay else [])]
        total_s = sum(line.duration_s for line in lines)
        places = _places(lines)
        with matplotlib.style.context("default"):
            figure = Figure(figsize=(9.0, 1.6 + 0.21 * (places[-1] + 1)), dpi=120, layout="constrained")
            shares, repeats = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
            shares.barh(
                places - 0.2,
                [100 * line.duration_s / total_s for line in lines],
                0.4,
                color="0.72",
                label="of the hours recorded",
            )
            shares.barh(
                places + 0.2, [100 * line.probability for line in lines], 0.4, color="C0", label="of the windows drawn"
            )
            shares.set_yticks(places, [" · ".join(line.names) for line in lines], fontsize=8)
            shares.set_ylim(places[-1] + 0.7, -0.7)
            shares.set_xlabel("share, %")
            shares.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
            colors = ["C3" if line.is_capped else "C0" for line in lines]
            repeats.barh(places, [line.repeats for line in lines], 0.7, color=colors)
            if any(line.is_capped for line in lines):
                repeats.axvline(self.max_repeats, color="C3", linestyle="--", linewidth=1)
                repeats.set_title(f"red: capped at max_repeats {self.max_repeats:g}", fontsize=9)
            for place, line in zip(places, lines, strict=True):
                repeats.annotate(
                    f"{line.repeats:.1f}",
                    (line.repeats, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    size=7,
                )
            repeats.set_xlabel("expected repeats per epoch")
            repeats.margins(x=0.12)
            for axes in (shares, repeats):
                axes.grid(axis="x", alpha=0.3)
                axes.set_axisbelow(True)
            with replaced_file(path) as temporary:
                figure.savefig(temporary, format="png", metadata={"Software": None})


def describe(config: RunConfig) -> Description:
    """Describe the training mixture of a configuration. Needs the tables, not the base model.

    Raises:
        UserError: a table or filter is wrong, or a manifest has not been encoded yet.
    """

    def table_of(path: str) -> str:
        if not is_manifest(path):
            return path
        folder = manifest_table(path, config.run_dir, config.dataset.duration_sec)
        if not (folder / CARD_NAME).is_file():
            raise UserError(
                f"{path} is a manifest whose dialogues are not encoded yet.",
                f"Run `hf-csm encode {path} --out codes/{Path(path).stem} --base-model "
                f"{config.moshi_paths.hf_repo_id} --duration-sec {config.dataset.duration_sec:g}` and name that "
                "folder, or start the training, which encodes it.",
            )
        return str(folder)

    dataset = with_tables(config.dataset, table_of)
    train = training_table(dataset, None)
    groups, probabilities = mix(train, dataset)
    held_out = {split: held_out_table(dataset, split, None) for split in ("validation", "test")}
    return describe_mixture(groups, probabilities, dataset, {"train": train, **held_out})


def describe_mixture(
    groups: Sequence[Group], probabilities: np.ndarray, config: DatasetConfig, tables: Mapping[str, WindowTable]
) -> Description:
    """Describe groups and probabilities as `mix` gives them; `tables` are those of the splits."""
    repeats = expected_repeats(groups, probabilities)
    lines: dict[tuple[str, ...], list[Line]] = {}
    replay = None
    for group, probability, times in zip(groups, probabilities.tolist(), repeats.tolist(), strict=True):
        is_capped = not group.is_replay and times > config.balance.max_repeats * (1 - 1e-6)
        line = Line(group.names, len(group.rows), group.duration_s, probability, times, is_capped)
        if group.is_replay:
            replay = line
        else:
            lines.setdefault(group.names, []).append(line)
    split_s = {split: frames_to_seconds(int(table.num_frames.sum())) for split, table in tables.items()}
    if replay is not None:
        split_s["train"] -= replay.duration_s
    notes = [
        f"only {name}: {', '.join(getattr(config, name))}"
        for name in ("emotions", "languages", "speakers")
        if getattr(config, name)
    ]
    notes += tables["train"].left_out()
    if tables["train"].num_cut:
        notes.append(f"{tables['train'].num_cut} training windows are cut at {config.duration_sec:g} s.")
    return Description(
        by=tuple(config.balance.by),
        groups=[_sum_up(names, parts) for names, parts in lines.items()],
        replay=replay,
        max_repeats=config.balance.max_repeats,
        split_s=split_s,
        notes=notes,
    )


def _sum_up(names: tuple[str, ...], lines: Sequence[Line]) -> Line:
    """Return several lines as one; its repeats are the mean by seconds."""
    duration_s = sum(line.duration_s for line in lines)
    return Line(
        names,
        sum(line.num_windows for line in lines),
        duration_s,
        sum(line.probability for line in lines),
        sum(line.repeats * line.duration_s for line in lines) / duration_s,
        any(line.is_capped for line in lines),
    )


def _places(lines: Sequence[Line]) -> np.ndarray:
    """Return a place for each line; where the first of several names changes, there is a gap."""
    is_new = [len(before.names) > 1 and line.names[0] != before.names[0] for before, line in pairwise(lines)]
    return np.cumsum([0.0, *np.where(is_new, 1.8, 1.0)])
