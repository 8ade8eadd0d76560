"""``numbabn predict``: what calls should take on a GPU that need not be here."""

import argparse
import json
import os
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from .bench import suites
from .bench.cases import DTYPES, LAYOUTS, Case
from .command import (
    CommandError,
    add_json_option,
    names_of,
    require,
    whole_number,
    write_json,
)

OPS = ("forward", "inference", "backward")
US = 1e6  # microseconds of a second


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "predict",
        help="say what calls should take on a GPU, and what bounds them; needs none",
        description=(
            "Predict device times from what kernels move, issue and wait for, and from their "
            "registers and shared memory, for which they are compiled here. Shapes as in bench."
        ),
    )
    add = parser.add_argument
    add("what", nargs="*", default=["resnet50"], metavar="SUITE|SHAPE")
    add("--op", type=names_of(OPS), default=["forward", "backward"], metavar="OPS")
    add("--layout", type=names_of(LAYOUTS), metavar="LAYOUTS")
    add("--dtype", type=names_of(DTYPES), default=["float16"], metavar="DTYPES")
    add("--batch", type=whole_number(1), default=suites.BATCH, metavar="N")
    add("--gpu", default="H200", help="A100, H100 or H200 (default: %(default)s)")
    add(
        "--against",
        type=Path,
        metavar="FILE",
        help="report.json of benchmarks/gpu_report.py: its cases, and what was measured",
    )
    add_json_option(parser, "all predictions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict all cases; show the table, write the JSON."""
    require("bench", "rich")
    if find_spec("numba_cuda") is None:
        raise CommandError(
            'predict: numba-cuda not found, which compiles kernels: pip install "numbabn[cuda13]"'
        )
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        raise CommandError("predict: nothing is compiled while numba simulates a GPU")
    from rich.console import Console

    from ..cuda import model

    gpu = model.GPUS.get(args.gpu.upper())
    if gpu is None:
        raise CommandError(f"--gpu: expected one of {', '.join(model.GPUS)}, got {args.gpu!r}")
    measured = _measured(args.against) if args.against else {}
    cases = list(measured) or suites.choose(args.what, args.op, args.layout, args.dtype, args.batch)
    console = Console(stderr=args.json == Path("-"), highlight=False, emoji=False)
    found = []
    with console.status("Compiling") as status:
        for case in cases:
            status.update(f"{case.op} {case.layout} {case.name}")
            dtype = DTYPES[case.dtype]
            found.append((case, model.predict(case.op, case.array_shape, case.axis, dtype, gpu)))
    _show(console, found, measured, gpu)
    if args.json is not None:
        write_json(args.json, {"gpu": gpu._asdict(), "cases": [_document(*each) for each in found]})
    return 0


def _measured(path: Path) -> dict[Case, float]:
    """Read cases and their measured seconds from a report."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["cases"]
        return {
            Case(row["op"], row["layout"], row["dtype"], tuple(row["shape"])): (
                row["times"]["numbabn"]["ms"] / 1e3
            )
            for row in rows
            if "numbabn" in row.get("times", {})
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(
            f"--against: expected a report.json of gpu_report, got {path} ({error!r})"
        ) from None


def _document(case: Case, found: Any) -> dict[str, Any]:
    return {
        "op": case.op, "layout": case.layout, "dtype": case.dtype, "shape": list(case.shape),
        "variant": found.variant, "view": found.cut.view, "width": found.cut.width,
        "cut": found.cut.shape._asdict(), "held_bytes": found.cut.held, "tasks": found.cut.tasks,
        "blocks_of_a_multiprocessor": found.resident, "registers": found.registers,
        "waves": found.waves, "bytes": found.nbytes, "seconds": found.seconds,
        "bounds": found.bounds, "bound": found.bound,
    }  # fmt: skip


def _show(console: Any, found: list[Any], measured: dict[Case, float], gpu: Any) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("", no_wrap=True)
    table.add_column("view, variant", no_wrap=True)
    for heading in (
        "bytes\nat once", "pieces", "tasks", "KB\nheld", "blocks\neach", "waves",
        "memory\nus", "issue\nus", "waits\nus", "us", "of the\ncopy",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    if measured:
        table.add_column("measured\nus   ratio", justify="right", no_wrap=True)
    for name, group in groupby(
        found, lambda each: f"{each[0].op} {each[0].layout} {each[0].dtype}"
    ):
        table.add_row(f"[bold]{name}[/]")
        for case, each in group:
            cut = each.cut
            at_once = cut.width * DTYPES[case.dtype].itemsize
            times = (f"{US * seconds:.1f}" for seconds in each.bounds.values())
            row = [
                case.name, f"{cut.view}, {each.variant}", str(at_once),
                str(cut.shape.pieces), str(cut.tasks), f"{cut.held / 1024:.0f}",
                str(each.resident), str(each.waves), *times, f"{US * each.seconds:.1f}",
                f"{case.traffic / gpu.copy / each.seconds:.2f}", each.bound,
            ]  # fmt: skip
            if case in measured:
                ratio = measured[case] / each.seconds
                row.append(f"{US * measured[case]:.1f}   {ratio:.2f}")
            table.add_row(*row)
        table.add_section()
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
    console.print(
        f"For a {gpu.name}: {gpu.multiprocessors} multiprocessors, {gpu.shared >> 10} KB of shared "
        f"memory each, {gpu.cache >> 20} MB of L2, a copy at {gpu.copy / 1e12:.2f} TB/s. Kernels "
        "are compiled for it; latencies, waits and instructions are estimates"
        + (".\n" if measured else " that no measurement has corrected yet.\n")
        + "pieces: of a channel, or of channels side by side; a block holds one at a time. "
        "blocks: that a multiprocessor holds at once. Of memory, issue and waits the longest "
        "counts, and each launch 2 us. of the copy: 1 read and 1 write of x, backward 2 and 1.",
        markup=False,
        soft_wrap=True,
    )
