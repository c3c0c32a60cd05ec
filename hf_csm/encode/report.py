"""The report of an encode or an export of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_csm.data.schema import SPLITS
from hf_csm.encode.compose import Unit


@dataclass(frozen=True)
class EncodeReport:
    """Result of an encode.

    Attributes:
        groups: conversations and hours of each (split, emotion).
        dropped: number of clips left out, by reason.
        noted: other irregularities, with their counts.
        is_complete: whether the table is published; `False` while other processes are still working on it.
        is_new: `False` if it existed already, and nothing was done.
    """

    groups: dict[tuple[str, str], tuple[int, float]]
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    is_complete: bool = True
    is_new: bool = True

    def render(self) -> str:
        """Return the report as a text table."""
        lines = [f"{'split':<12}{'emotion':<12}{'conversations':>14}{'hours':>9}"]
        for (split, emotion), (count, hours) in sorted(
            self.groups.items(), key=lambda item: (SPLITS.index(item[0][0]), item[0][1])
        ):
            lines.append(f"{split:<12}{emotion:<12}{count:>14}{hours:>9.3f}")
        lines += [f"dropped: {count} clips, {reason}" for reason, count in sorted(self.dropped.items())]
        lines += [f"noted: {count} {what}" for what, count in sorted(self.noted.items())]
        if not self.is_complete:
            lines.append("Other processes are still encoding the rest; the last one publishes the table.")
        return "\n".join(lines)


def count_groups(units: Sequence[Unit]) -> dict[tuple[str, str], tuple[int, float]]:
    """Return conversations and hours of each (split, emotion)."""
    groups: dict[tuple[str, str], tuple[int, float]] = {}
    for unit in units:
        count, hours = groups.get((unit.split, unit.group), (0, 0.0))
        groups[unit.split, unit.group] = (count + len(unit.conversations), hours + unit.duration_s / 3600)
    return groups
