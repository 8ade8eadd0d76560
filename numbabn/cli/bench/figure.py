"""The picture: where each shape stands against memory itself, and the peers against both."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .measurement import Result

BLUE, GREY, DARK = "#0b62a4", "#777777", "#222222"
PEERS = {
    "torch": ("D", "#c8501e"),
    "onnxruntime": ("s", "#7a3ea1"),
    "jax": ("^", "#2c8a4b"),
    "numpy": ("o", "#8a6d00"),
}
Key = tuple[str, str, str]  # layout, dtype, shape
OURS = "numbabn"
FARTHEST = 1.5  # of the limit; what is faster yet stands at the edge
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": DARK,
    "ytick.major.size": 0,
}


def draw(path: Path, found: list[Result], peers: list[str], subtitle: str) -> None:
    """Draw a panel per op, a bar per shape, a marker per peer, and write the file."""
    timed = [result for result in found if result.timing is not None]
    ops = list(dict.fromkeys(result.case.op for result in timed))
    rows = _rows(timed)
    lowest = max(rows.values(), default=0)
    inches = 1.55 + 0.25 * (lowest + 1)
    values = [value for result in timed for value in _fractions(result, peers).values()]
    right = min(max([1.0, *values]), FARTHEST)
    if any(_shaky(result, name) for result in timed for name in _fractions(result, peers)):
        subtitle += "; pale, hollow: too disturbed to rely on"
    with rc_context(STYLE):
        figure = Figure(figsize=(12, inches), dpi=150)
        panels = figure.subplots(1, max(1, len(ops)), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(
            left=0.115, right=0.985, top=1 - 1.02 / inches, bottom=0.42 / inches, wspace=0.06
        )
        figure.text(
            0.012, 1 - 0.27 / inches, "numbabn against the speed of memory",
            fontsize=13, fontweight="bold",
        )  # fmt: skip
        figure.text(0.012, 1 - 0.5 / inches, subtitle, color=GREY, parse_math=False)
        for axes, op in zip(panels, ops, strict=False):
            sweeps = "a copy" if op in ("forward", "inference") else "a triad"
            axes.set_title(f"{op}, as a fraction of {sweeps}", color=DARK)
            axes.set_xlim(0, 1.17 * right)
            _draw_panel(axes, [result for result in timed if result.case.op == op], rows, peers)
        panels[0].set_ylim(lowest + 0.6, -0.5)
        panels[0].set_yticks(list(rows.values()), [shape for _, _, shape in rows])
        _name_groups(panels[0], rows)
        _draw_legend(figure, peers, 1 - 0.1 / inches)
        figure.savefig(path)


def _key(result: Result) -> Key:
    return result.case.layout, result.case.dtype, result.case.name


def _fractions(result: Result, peers: list[str]) -> dict[str, float]:
    """Give the limit's time as a fraction of numbabn's and of each able peer's."""
    assert result.fraction is not None
    ratios = {peer: result.ratio(peer) for peer in peers}
    return {OURS: result.fraction} | {
        peer: result.fraction / ratio for peer, ratio in ratios.items() if ratio is not None
    }


def _shaky(result: Result, name: str) -> bool:
    """Whether the limit, or the time of numbabn or a peer, is not to be relied on."""
    timing = result.timing if name == OURS else result.peers[name].best
    limit = None if result.limit is None else result.limits[result.limit]
    return any(t is not None and t.noisy for t in (timing, limit))


def _rows(timed: list[Result]) -> dict[Key, float]:
    """Give each shape its height, with room for a name above each layout and dtype."""
    keys = dict.fromkeys(map(_key, timed))
    rows: dict[Key, float] = {}
    height = -1.0
    for group in dict.fromkeys(key[:2] for key in keys):
        height += 1.0
        for key in keys:
            if key[:2] == group:
                height += 1.0
                rows[key] = height
    return rows


def _draw_panel(
    axes: Axes, results: list[Result], rows: dict[Key, float], peers: list[str]
) -> None:
    ticks = np.arange(0, axes.get_xlim()[1] - 0.1, 0.25)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axvline(1, color=DARK, linewidth=1.2)
    for result in results:
        height, fractions = rows[_key(result)], _fractions(result, peers)
        fraction = fractions.pop(OURS)
        alpha = 0.35 if _shaky(result, OURS) else 1
        axes.barh(height, min(fraction, FARTHEST), height=0.62, color=BLUE, alpha=alpha)
        axes.text(
            axes.get_xlim()[1], height, f"{fraction:.2f}", ha="right", va="center",
            color=BLUE, alpha=alpha, fontweight="bold",
        )  # fmt: skip
        for peer, fraction in fractions.items():
            marker, color = PEERS[peer]
            shaky = _shaky(result, peer)
            axes.plot(
                min(fraction, FARTHEST), height, marker, markersize=6, zorder=3,
                color="white" if shaky else color, markeredgecolor=color if shaky else "white",
                markeredgewidth=0.9,
            )  # fmt: skip


def _name_groups(axes: Axes, rows: dict[Key, float]) -> None:
    for group in dict.fromkeys(key[:2] for key in rows):
        top = min(height for key, height in rows.items() if key[:2] == group)
        axes.annotate(
            " ".join(group), (0, top - 0.85), xytext=(-4, 0), textcoords="offset points",
            ha="right", va="center", color=GREY, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _draw_legend(figure: Figure, peers: list[str], top: float) -> None:
    handles: list[Any] = [Patch(color=BLUE, label=OURS)]
    for peer in peers:
        marker, color = PEERS[peer]
        handles.append(
            Line2D([], [], marker=marker, color=color, linestyle="", markeredgecolor="white",
                   markersize=7, label=peer)
        )  # fmt: skip
    figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(0.99, top), ncols=len(handles),
        frameon=False, handletextpad=0.4, columnspacing=1.4,
    )  # fmt: skip
