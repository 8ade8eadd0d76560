"""The demo's picture, in the manner of Figure 1 of the batch normalization paper."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from .training import GOAL, PERCENTILES, History

WITH, WITHOUT, GREY = "#0b62a4", "#c8501e", "#555555"
HALO = [withStroke(linewidth=3, foreground="white")]
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.labelcolor": "#333333",
}


def draw(
    path: Path, title: str, subtitle: str, plain: History, normalized: History, unit: int
) -> None:
    """Draw the accuracies beside the percentiles of one unit's input and write the file."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.9), dpi=150)
        grid = figure.add_gridspec(
            1, 3, width_ratios=(1.25, 1, 1), wspace=0.22,
            left=0.045, right=0.955, bottom=0.2, top=0.78,
        )  # fmt: skip
        accuracy = figure.add_subplot(grid[0])
        left = figure.add_subplot(grid[1], sharex=accuracy)
        right = figure.add_subplot(grid[2], sharex=accuracy, sharey=left)
        figure.text(0.012, 0.93, title, fontsize=13, fontweight="bold", parse_math=False)
        figure.text(0.012, 0.875, subtitle, color=GREY)
        figure.text(
            0.012,
            0.03,
            "Evaluated with population statistics. (b), (c): percentiles, over test images, "
            f"of what enters the sigmoid of unit {unit} of the last hidden layer.",
            fontsize=9,
            color=GREY,
        )
        accuracy.set_title("(a)  Test accuracy, %")
        left.set_title("(b)  Input of one sigmoid, without")
        right.set_title("(c)  The same, with batch normalization")
        right.tick_params(labelleft=False)
        for axes in accuracy, left, right:
            axes.set_xlabel("training step")
            axes.set_xlim(0, plain.steps[-1])
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(color="#e6e6e6", linewidth=0.8)
            axes.set_axisbelow(True)
        _draw_accuracy(accuracy, plain, normalized)
        _draw_bands(left, plain, unit, WITHOUT)
        _draw_bands(right, normalized, unit, WITH)
        # Only now do both panels know the range that they share.
        _name_percentiles(left, plain, unit, WITHOUT)
        _name_percentiles(right, normalized, unit, WITH)
        figure.savefig(path)


def _draw_accuracy(axes: Axes, plain: History, normalized: History) -> None:
    axes.set_ylim(0, 102)
    axes.axhline(100 * GOAL, color=GREY, linewidth=0.8, linestyle=(0, (4, 4)))
    # Accuracies rise, so that the lower right corner is free.
    lines = (normalized, WITH, "with batch normalization", 0.5), (plain, WITHOUT, "without", 0.32)
    for history, color, name, height in lines:
        axes.plot(history.steps, 100 * np.array(history.accuracy), color=color, linewidth=2)
        step = history.steps_to(GOAL)
        if step is not None:
            reached = 100 * history.accuracy[history.steps.index(step)]
            axes.plot(step, reached, "o", color=color, clip_on=False)
        milestone = f"{GOAL:.0%} not reached" if step is None else f"{GOAL:.0%} at step {step}"
        style: Any = {"ha": "right", "color": color, "path_effects": HALO}
        axes.text(0.98, height, name, transform=axes.transAxes, fontweight="bold", **style)
        axes.text(0.98, height - 0.065, milestone, transform=axes.transAxes, **style)


def _draw_bands(axes: Axes, history: History, unit: int, color: str) -> None:
    low, median, high = history.unit_percentiles(unit)
    axes.fill_between(history.steps, low, high, color=color, alpha=0.15, linewidth=0)
    for series, width in (low, 1), (median, 2), (high, 1):
        axes.plot(history.steps, series, color=color, linewidth=width)


def _name_percentiles(axes: Axes, history: History, unit: int, color: str) -> None:
    """Write each percentile at its line's end, moved up where it would cover the one below."""
    bottom, top = axes.get_ylim()
    free = bottom
    for percentile, end in zip(PERCENTILES, history.unit_percentiles(unit)[:, -1], strict=True):
        y = max(end, free)
        free = y + 0.06 * (top - bottom)
        axes.annotate(
            f"{percentile}th",
            (history.steps[-1], y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
        )
