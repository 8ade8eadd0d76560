"""What the demo shows in the terminal while it trains and when it has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .training import GOAL, History

MILESTONES = (0.02, 0.05, 0.1, 0.25, 0.5, 1)  # shares of all steps


@contextmanager
def progress(console: Console, name: str, steps: int) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal, nothing elsewhere; the function given moves it by one step."""
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=steps)
        yield lambda: bar.advance(task)


def results(plain: History, normalized: History) -> Table:
    """Lay both histories side by side."""
    both = plain, normalized
    table = Table("", "without", "with batch\nnormalization")
    for column in table.columns[1:]:
        column.justify = "right"
    last = len(plain.steps) - 1
    for look in sorted({round(share * last) for share in MILESTONES} - {0}):
        accuracies = (f"{history.accuracy[look]:.1%}" for history in both)
        table.add_row(f"test accuracy at step {plain.steps[look]}", *accuracies)
    table.add_section()
    reached = (history.steps_to(GOAL) for history in both)
    table.add_row(
        f"steps to reach {GOAL:.0%}",
        *("not reached" if step is None else f"{step}" for step in reached),
    )
    table.add_section()
    table.add_row("seconds in numbabn", *(f"{history.numbabn_seconds:.2f}" for history in both))
    table.add_row("seconds in all", *(f"{history.seconds:.2f}" for history in both))
    return table
