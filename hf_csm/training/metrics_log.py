"""metrics.jsonl, one JSON object per line, and the same values for the trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hf_csm.files import write_text_atomic


if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricsLog:
    """Writes on the main process only.

    Args:
        path: the metrics.jsonl of the run.
        resumed_step: lines of later steps are from an interrupted run, and are dropped; None for a new run.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resumed_step: int | None):
        self.accelerator = accelerator
        self._file = None
        if not accelerator.is_main_process:
            return
        kept = []
        if resumed_step is not None and path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
        write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line and log it to the trackers."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        self.accelerator.log(values, step=step)


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a metrics.jsonl; an incomplete last line is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
