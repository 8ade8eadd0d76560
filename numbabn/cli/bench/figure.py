"""The picture: where each shape stands against memory itself, and the peers against both."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import blended_transform_factory

from ..command import CommandError
from .cases import TRAFFIC
from .measurement import Result, geometric_mean
from .results import Results
from .suites import SUITES

BLUE, RED, GREY, DARK = "#0b62a4", "#b3261e", "#6b6b6b", "#222222"
PEERS = {
    "torch": ("D", "#c8501e"),
    "onnxruntime": ("s", "#7a3ea1"),
    "jax": ("^", "#2c8a4b"),
    "numpy": ("o", "#8a6d00"),
}
Key = tuple[str, str, str]  # layout, dtype, shape
OURS = "numbabn"
FARTHEST = 1.5  # of the limit; what is faster yet stands at the edge
# Inches. A README is some 850 pixels wide: 9 points of 9 inches are 12 of them.
WIDTH, ROW, MARGIN, LETTER = 9.0, 0.22, 0.1, 0.081
ABOVE, BELOW = 1.12, 0.5
GAP = 1.4  # rows between groups
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": DARK,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Group:
    """The rows of a layout and dtype.

    Attributes
    ----------
    name : str
    heading, mean, ratios : float
        Heights of its name, of the geometric means, and of how many times as fast as each peer
        numbabn is.
    shapes : dict
        The height of each shape.
    """

    name: str
    heading: float
    shapes: dict[str, float]
    mean: float
    ratios: float


def draw(path: Path, results: Results) -> None:
    """Draw a panel per op, a bar per shape, a marker per peer, and write the file."""
    if all(result.timing is None for result in results.found):
        raise CommandError("--plot: nothing to draw, for no case was timed", code=1)
    ops = list(dict.fromkeys(result.case.op for result in results.found))
    peers = list(results.peers)
    groups = _groups(results.found, bool(peers))
    lowest = groups[-1].ratios + 0.7
    inches = ABOVE + ROW * lowest + BELOW
    longest = max(len(shape) for group in groups for shape in group.shapes)
    left = MARGIN + LETTER * max(longest, len("geometric means"))
    values = [each for result in results.found for each in _fractions(result, peers).values()]
    right = 1.22 * min(max(1.0, *values), FARTHEST)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, inches), dpi=200)
        panels = figure.subplots(1, len(ops), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(
            left=left / WIDTH, right=1 - MARGIN / WIDTH, wspace=0.08,
            top=1 - ABOVE / inches, bottom=BELOW / inches,
        )  # fmt: skip
        _draw_head(figure, results)
        for axes, op in zip(panels, ops, strict=True):
            axes.set_title(op, color=DARK)
            axes.set_xlabel(f"fraction of a {'copy' if TRAFFIC[op].reads == 1 else 'triad'}")
            axes.set_xlim(0, right)
            axes.set_ylim(lowest, -0.5)
            _draw_panel(axes, [each for each in results.found if each.case.op == op], groups, peers)
        _name_rows(panels[0], groups, bool(peers))
        figure.savefig(path)


def _groups(found: list[Result], with_ratios: bool) -> list[Group]:
    """Stack the rows of all layouts and dtypes; heights grow downwards."""
    shapes: dict[str, dict[str, float]] = {}
    for result in found:
        shapes.setdefault(_group_of(result), {})[result.case.name] = 0
    groups, top = [], 0.0
    for name, names in shapes.items():
        mean = top + len(names) + 1.15
        heights = dict(zip(names, np.arange(top + 1, mean).tolist(), strict=False))
        groups.append(Group(name, top, heights, mean, mean + with_ratios))
        top = groups[-1].ratios + GAP
    return groups


def _group_of(result: Result) -> str:
    return f"{result.case.layout} {result.case.dtype}"


def _fractions(result: Result, peers: Iterable[str]) -> dict[str, float]:
    """Give the limit's time as a fraction of numbabn's and of each able peer's, if it was timed."""
    if result.fraction is None:
        return {}
    ratios = {peer: result.ratio(peer) for peer in peers}
    return {OURS: result.fraction} | {
        peer: result.fraction / ratio for peer, ratio in ratios.items() if ratio is not None
    }


def _shaky(result: Result, name: str) -> bool:
    """Whether the limit, or the time of numbabn or a peer, is not to be relied on."""
    timing = result.timing if name == OURS else result.peers[name].best
    limit = None if result.limit is None else result.limits[result.limit]
    return any(t is not None and t.noisy for t in (timing, limit))


def _draw_head(figure: Figure, results: Results) -> None:
    """Write what is shown, where it was measured, and who is who."""
    inches = figure.get_figheight()
    suites = [name for text in results.what for name in text.split(",") if name in SUITES]
    device = "a GPU" if results.device == "cuda" else "the CPU"
    figure.text(
        MARGIN / WIDTH, 1 - 0.24 / inches,
        f"Batch normalization on {device}: speed as a fraction of memory's limit",
        fontsize=12.5, fontweight="bold", color=DARK,
    )  # fmt: skip
    figure.text(
        MARGIN / WIDTH, 1 - 0.45 / inches,
        " | ".join([*([", ".join(suites)] if suites else []), results.place]),
        fontsize=8.5, color=GREY, parse_math=False,
    )  # fmt: skip
    shaky = any(
        _shaky(result, name)
        for result in results.found
        for name in _fractions(result, results.peers)
    )
    handles: list[Any] = [
        Line2D([], [], label="the limit", marker="|", linestyle="", color=DARK, markersize=10),
        Patch(color=BLUE, label=f"{OURS} {results.version}"),
    ]
    for peer, version in results.peers.items():
        marker, color = PEERS[peer]
        label = f"{peer} {version.partition('+')[0]}"
        handles.append(Line2D([], [], label=label, **_marker(marker, color)))
    if shaky:
        handles.append(Line2D([], [], label="pale: disturbed", **_marker("o", GREY, pale=True)))
    figure.legend(
        handles=handles, loc="center left", ncols=len(handles), frameon=False, fontsize=8.5,
        bbox_to_anchor=(MARGIN / WIDTH, 1 - 0.66 / inches), borderpad=0, borderaxespad=0,
        handlelength=1.1, handletextpad=0.4, columnspacing=1.1,
    )  # fmt: skip


def _marker(marker: str, color: str, pale: bool = False) -> dict[str, Any]:
    """Style a peer's marker; a pale one is hollow."""
    return {
        "marker": marker, "linestyle": "", "markersize": 5.5, "markeredgewidth": 0.9,
        "color": "white" if pale else color, "markeredgecolor": color if pale else "white",
    }  # fmt: skip


def _draw_panel(axes: Axes, results: list[Result], groups: list[Group], peers: list[str]) -> None:
    ticks = np.arange(0, axes.get_xlim()[1] - 0.1, 0.5)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks(np.arange(0, axes.get_xlim()[1] - 0.1, 0.25), minor=True)
    axes.tick_params(axis="x", which="minor", size=0)
    axes.grid(axis="x", which="both", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axvline(1, color=DARK, linewidth=1.2)
    for group in groups:
        members = [result for result in results if _group_of(result) == group.name]
        for result in members:
            height, fractions = group.shapes[result.case.name], _fractions(result, peers)
            if result.failure is not None:
                axes.text(0.02, height, result.failure, va="center_baseline", color=RED)
            pale = [name for name in fractions if _shaky(result, name)]
            _draw_row(axes, height, fractions, pale)
        means = {
            name: geometric_mean(_fractions(result, peers).get(name) for result in members)
            for name in (OURS, *peers)
        }
        there = {name: mean for name, mean in means.items() if mean is not None}
        axes.axhline(group.mean - 0.6, color="#bbbbbb", linewidth=0.8)
        axes.axhspan(group.mean + 0.5, group.ratios + GAP - 0.5, color="white", zorder=2.3)
        _draw_row(axes, group.mean, there, [])
        _write_ratios(axes, group.ratios, members, peers)


def _draw_row(axes: Axes, height: float, fractions: dict[str, float], pale: list[str]) -> None:
    """Draw numbabn's bar, its number at the right edge, and the peers' markers."""
    for name, fraction in fractions.items():
        if name == OURS:
            alpha = 0.35 if OURS in pale else 1
            axes.barh(height, min(fraction, FARTHEST), height=0.64, color=BLUE, alpha=alpha)
            axes.text(
                axes.get_xlim()[1], height, f"{fraction:.2f}", ha="right", va="center_baseline",
                color=BLUE, alpha=alpha, fontweight="bold",
            )  # fmt: skip
        else:
            style = _marker(*PEERS[name], pale=name in pale)
            axes.plot(min(fraction, FARTHEST), height, zorder=3, **style)


def _write_ratios(axes: Axes, height: float, results: list[Result], peers: list[str]) -> None:
    """Write the geometric means of how many times numbabn's time each peer takes, side by side."""
    across = blended_transform_factory(axes.transAxes, axes.transData)
    for k, peer in enumerate(peers):
        ratio = geometric_mean(result.ratio(peer) for result in results)
        if ratio is not None:
            marker, color = PEERS[peer]
            start, text = 0.02 + k / len(peers), f"{ratio:.{1 if ratio < 9.95 else 0}f}x"
            axes.plot(start + 0.02, height, zorder=3, transform=across, **_marker(marker, color))
            axes.text(
                start + 0.055, height, text, transform=across, va="center_baseline",
                color=color, fontweight="bold", fontsize=8.5,
            )  # fmt: skip


def _name_rows(axes: Axes, groups: list[Group], with_ratios: bool) -> None:
    names = {height: shape for group in groups for shape, height in group.shapes.items()}
    for group in groups:
        names |= {group.heading: group.name, group.mean: "geometric mean"}
        if with_ratios:
            names[group.ratios] = "times as fast as"
    axes.set_yticks(list(names), list(names.values()))
    headings = {group.heading for group in groups}
    for label, height in zip(axes.get_yticklabels(), names, strict=True):
        if names[height] == "geometric mean" or height in headings:
            label.set(fontweight="bold", color=GREY if height in headings else DARK)
