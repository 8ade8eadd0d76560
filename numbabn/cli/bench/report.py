"""What the command shows in the terminal: a bar while it measures, then the table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .cases import TRAFFIC
from .measurement import Result, group_of, means
from .results import Results
from .sampling import LEAST, Timing

WIDTH = 100  # of running text
MARKS = {"plain": "p", "non-temporal": "n", "plain, one thread": "1", "driver": "d", "kernel": "k"}


def show(console: Console, results: Results) -> None:
    """Print the table, what was not timed, and the footer."""
    table = table_of(results.found, list(results.peers))
    wide = console.options.update(max_width=1000)
    footer_width = min(console.width, WIDTH)
    # The table stays whole where it is wider than the terminal.
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
    for line in problems(results.found):
        console.print(line, markup=False, soft_wrap=True)
    console.print(footer(results), markup=False, width=footer_width)


@contextmanager
def progress(console: Console, cases: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on a terminal, nothing elsewhere; the function given names the next case."""
    columns = (
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # A thread that redraws the bar would disturb the samples.
    quiet: Any = {"auto_refresh": False, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, console=console, **quiet) as bar:
        task = bar.add_task("", total=cases)
        begun = 0

        def begin(name: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=name, refresh=True)
            begun += 1

        yield begin


def table_of(found: list[Result], peers: list[str]) -> Table:
    """Lay the results out by op, layout and dtype, geometric means at the end."""
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
    dtypes = {result.case.dtype for result in found}
    common = dtypes.pop() if len(dtypes) == 1 else ""
    table.add_column(common, no_wrap=True)
    for heading in "ms ", "±", "GB/s", "limit\nGB/s   ", "of the\nlimit":
        table.add_column(heading, justify="right", no_wrap=True)
    for peer in peers:
        table.add_column(f"{peer}\nms   ratio", justify="right", no_wrap=True)
    for name, group in groupby(found, group_of):
        table.add_row(f"[bold]{name.removesuffix(common)}[/]")
        for result in group:
            table.add_row(result.case.name, *_cells(result), *(_peer(result, p) for p in peers))
        table.add_section()
    table.add_row("[bold]geometric means[/]")
    for name, mean in means(found, peers).items():
        ratios = (_ratio(mean["ratios"][peer]) for peer in peers)
        name = name.removesuffix(common)
        table.add_row(name, "", "", "", "", _fraction(mean["fraction_of_limit"]), *ratios)
    return table


def problems(found: list[Result]) -> list[str]:
    """List the cases that were not timed, and why."""
    return [
        f"{group_of(result)} {result.case.name} {result.check.problem}"
        for result in found
        if result.check.problem is not None
    ]


def footer(results: Results) -> str:
    """Say how the numbers were got."""
    found, notes = results.found, results.notes
    right = [result for result in found if result.check.problem is None]
    partly = [result for result in right if result.check.channels < result.case.channels]
    checked = f"{len(right)} of {len(found)} cases agree with the float64 oracle"
    if partly:
        least = min(result.check.channels for result in partly)
        checked += f", {len(partly)} of them on some channels ({least} or more, evenly spread)"
    ops = {result.case.op for result in found}
    conventions = "; ".join(
        f"{' and '.join(op for op in TRAFFIC if op in ops and TRAFFIC[op] == traffic)} "
        f"{traffic.reads} read{'s' * (traffic.reads > 1)} + {traffic.writes} write"
        for traffic in dict.fromkeys(TRAFFIC[op] for op in TRAFFIC if op in ops)
    )
    lines = [
        f"ms: median of one call, {notes.timed}, results preallocated. ±: half the quartiles' "
        "distance, in %.",
        f"GB/s: traffic of x's size, {conventions}.",
        "limit: a copy (1 read + 1 write), or a triad's traffic (2 reads + 1 write, a ^ b), of the "
        f"same arrays {notes.limit}.",
        "of the limit: the limit's time as a fraction of ms.",
        f"{notes.cache}.",
        _disturbances(right, notes.disturbed),
        f"{checked}.",
    ]
    if results.peers:
        lines.append(
            "Peers: each in its own process, in turns while the others idle, by the best of its "
            "ways to do it. ratio: how many times numbabn's time it takes. -: it cannot do this."
        )
    versions = {"numbabn": results.version} | results.peers
    by = (f"{name} {version}" for name, version in versions.items())
    return "\n".join([*lines, f"{', '.join([results.place, *by])}."])


def _disturbances(timed: list[Result], why: str) -> str:
    timings = [result.timing for result in timed if result.timing is not None]
    for result in timed:
        for ways in (result.limits, *(peer.timings for peer in result.peers.values())):
            timings += ways.values()
    share = sum(t.left_out for t in timings) / max(1, sum(t.samples for t in timings))
    text = f"{share:.0%} of the samples are left out: {why}."
    if any(timing.noisy for timing in timings):
        text += f" !: fewer than {LEAST} remained, or none and all are in: not to be relied on."
    return text


def _cells(result: Result) -> tuple[str, ...]:
    timing, limit, speed = result.timing, result.limit, result.gigabytes_per_second
    if timing is None or limit is None or speed is None:
        return result.failure or "-", "", "", "", ""
    best = result.limits[limit]
    return (
        _milliseconds(timing),
        f"{100 * timing.spread:.0f}",
        f"{speed:.1f}",
        f"{result.case.traffic / best.median / 1e9:.1f} {MARKS[limit]}{_mark(best)}",
        _fraction(result.fraction),
    )


def _peer(result: Result, name: str) -> str:
    best = result.peers[name].best if name in result.peers else None
    return "-" if best is None else f"{_milliseconds(best)} {_ratio(result.ratio(name)):>6}"


def _mark(timing: Timing) -> str:
    return "!" if timing.noisy else " "


def _milliseconds(timing: Timing) -> str:
    return milliseconds(timing.median) + _mark(timing)


def milliseconds(seconds: float) -> str:
    """Write a time with three digits, or all those before the point."""
    value = 1e3 * seconds
    for digits, top in (4, 0.0995), (3, 0.9995), (2, 9.995), (1, 99.95):
        if value < top:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x"
