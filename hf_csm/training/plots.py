"""Plot the metrics of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_csm.files import replaced_file


def plot_losses(metrics: Sequence[dict], path: Path, title: str) -> None:
    """Draw the loss of every step and of the evaluations, with the adapter and without, as PNG.

    Args:
        metrics: lines of a metrics.jsonl; training lines have `loss`, evaluations `eval_loss` and `eval_base_loss`.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (
        ("loss", "training", {"color": "tab:blue", "alpha": 0.6}),
        ("eval_loss", "validation, adapter", {"color": "tab:orange", "marker": "o"}),
        ("eval_base_loss", "validation, base", {"color": "tab:gray", "linestyle": "--"}),
    ):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(title=title, xlabel="optimizer step", ylabel="weighted loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
