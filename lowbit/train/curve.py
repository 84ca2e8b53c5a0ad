"""The picture of a run: training and validation loss by step."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.checkpoint.writer import disk_errors

PLOT_NAME = "loss.png"


def can_draw() -> bool:
    """Returns True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(history: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Writes a PNG of the loss, nats per token.

    Args:
        history: entries with `step`, and `loss` or `eval_loss`.
        title: above the picture.
        file: to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validated = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    steps, losses = zip(*trained, strict=True)
    axes.plot(steps, losses, color="C0", alpha=0.35, linewidth=1)
    axes.plot(steps, _smoothed(losses), color="C0", label="training, running mean")
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", color="C1", markersize=4, label="validation")
        best = min(validated, key=lambda point: point[1])
        axes.plot(*best, "o", color="C1", markersize=9, markerfacecolor="none", label="best")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per counted token")
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    with disk_errors(file):
        figure.savefig(file)


def _smoothed(losses: Sequence[float], share: float = 0.05) -> list[float]:
    """Returns the mean of each loss and those before it, a twentieth of the run at most."""
    width = max(1, round(share * len(losses)))
    parts = [losses[max(0, end - width) : end] for end in range(1, len(losses) + 1)]
    return [sum(part) / len(part) for part in parts]
