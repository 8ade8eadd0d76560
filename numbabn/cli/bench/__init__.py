"""``numbabn bench``: time the operations against memory itself and against the peers.

What it finds out is one document (`results`), which is shown, drawn and written; ``--from`` reads
it back instead of measuring.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command import (
    CommandError,
    add_json_option,
    names_of,
    output_file,
    positive_number,
    require,
    whole_number,
    write_json,
)
from . import devices, environment, peers, results, suites
from .cases import DTYPES, LAYOUTS, TRAFFIC
from .measurement import Budget, measure
from .results import Results

if TYPE_CHECKING:  # slow to import, and not there without the extra
    from rich.console import Console

OPS = ("forward", "inference", "backward")
ALL = "all"
# What to measure where the command line does not say; none of it goes with --from.
SETTINGS: dict[str, Any] = {
    "what": ["quick"],
    "op": list(OPS),
    "layout": None,
    "dtype": ["float32"],
    "device": "cpu",
    "batch": suites.BATCH,
    "threads": None,
    "against": [],
    "seconds": 1.0,
    "repeats": None,
}
FORMATS = (".png", ".pdf", ".svg")


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="time forward, inference and backward against a copy and other libraries",
        description=(
            "Time numbabn on shapes of real networks. Each case is checked against the float64 "
            "oracle, then timed in turns with a copy of as much memory (for backward: the "
            "traffic of a triad), which is the limit, and with other libraries, each in a "
            "process of its own. Exit code 1 if a case is wrong. What --json writes, --from shows "
            "and --plot draws again, elsewhere too."
        ),
    )
    # Without defaults of their own, what was said can be told from what was not.
    measured = parser.add_argument_group(
        "what to measure, and how", argument_default=argparse.SUPPRESS
    )
    add = measured.add_argument
    add(
        "what",
        nargs="*",
        metavar="SUITE|SHAPE",
        help=f"{', '.join(suites.SUITES)}, or shapes NxC or NxCxHxW, of any rank, written so "
        "whatever the layout; several, by spaces or commas (default: quick, under a minute)",
    )
    add(
        "--op",
        type=names_of(TRAFFIC),
        metavar="OPS",
        help=f"some of {', '.join(TRAFFIC)} (default: {','.join(OPS)})",
    )
    add(
        "--layout",
        type=names_of(LAYOUTS),
        metavar="LAYOUTS",
        help=f"some of {', '.join(LAYOUTS)}: channels first, channels last, no places "
        "(default: nchw and nc; all in quick)",
    )
    add(
        "--dtype",
        type=names_of(DTYPES),
        metavar="DTYPES",
        help=f"some of {', '.join(DTYPES)} (default: float32)",
    )
    add(
        "--device",
        choices=devices.NAMES,
        help="where to compute and what to time: cuda by events on the device itself, which is "
        "the first that CUDA_VISIBLE_DEVICES leaves (default: cpu)",
    )
    add(
        "--batch",
        type=whole_number(1),
        metavar="N",
        help=f"images in the suites of images (default: {suites.BATCH})",
    )
    add(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="for numbabn, the limit and the peers, on the CPU alone (default: numba's)",
    )
    add(
        "--against",
        type=names_of([*peers.NEEDS, ALL]),
        metavar="PEERS",
        help=f"some of {', '.join(peers.NEEDS)}, or all: those installed; on cuda "
        f"{', '.join(peers.ON['cuda'])} (default: none)",
    )
    budget = measured.add_mutually_exclusive_group()
    budget.add_argument(
        "--seconds",
        type=positive_number,
        metavar="F",
        help=f"how long to measure each case (default: {SETTINGS['seconds']})",
    )
    budget.add_argument(
        "--repeats",
        type=whole_number(1),
        metavar="N",
        help="samples of each instead, one in each turn",
    )
    add_json_option(parser, "the results: settings, environment and quantiles of all samples")
    parser.add_argument(
        "--from",
        type=Path,
        dest="source",
        metavar="FILE",
        help="measure nothing, and show and draw the results that --json wrote",
    )
    parser.add_argument(
        "--plot", type=_picture_file, metavar="FILE", help="draw a .png, .pdf or .svg"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure all cases or read what was measured; show the table, write, draw."""
    require("bench", "rich", *(["matplotlib"] if args.plot else []))
    from rich.console import Console

    from . import report

    given = {name: value for name, value in vars(args).items() if name in SETTINGS}
    console = Console(stderr=args.json == Path("-"), highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = report.WIDTH
    if args.source is None:
        measured = _measure(SETTINGS | given, console)
    else:
        _refuse_beside_from([*given, *(["json"] if args.json else [])])
        measured = results.read(args.source)
    report.show(console, measured)
    if args.json is not None:
        write_json(args.json, measured.document)
    if args.plot:
        from . import figure

        figure.draw(args.plot, measured)
        console.print(f"Picture: {args.plot.resolve()}", markup=False, soft_wrap=True)
    return int(any(result.failure for result in measured.found))


def _refuse_beside_from(given: list[str]) -> None:
    if given:
        names = ("SUITE or SHAPE" if name == "what" else f"--{name}" for name in given)
        raise CommandError(f"--from measures nothing: expected no {', '.join(names)} beside it")


def _measure(settings: dict[str, Any], console: "Console") -> Results:
    """Start the peers and measure every case."""
    from . import report

    if settings["threads"] is not None and settings["device"] != "cpu":
        raise CommandError(f"--threads: expected none with --device {settings['device']}")
    cases = suites.choose(*(settings[key] for key in ("what", "op", "layout", "dtype", "batch")))
    names = _peers(settings["against"], settings["device"])
    device = _device(settings["device"], settings["dtype"])
    if settings["repeats"]:
        settings = settings | {"seconds": None}
    budget = Budget(settings["seconds"], settings["repeats"])
    with environment.threads(settings["threads"]) as threads, ExitStack() as stack:
        with console.status("Starting") as status:
            facts = environment.gather(threads, device)
            running = []
            for name in names:
                status.update(f"Starting {name}")
                try:
                    running.append(
                        stack.enter_context(peers.started(name, threads, settings["device"]))
                    )
                except peers.PeerError as error:
                    raise CommandError(f"--against: {name}: {error}", code=1) from None
                facts["peers"][name] = running[-1].version
        begin = stack.enter_context(report.progress(console, len(cases)))
        found = []
        for case in cases:
            begin(f"{case.op} {case.layout} {case.name}")
            found.append(measure(case, budget, running, device))
    return Results.of(results.document(settings, facts, found))


def _picture_file(text: str) -> Path:
    path = output_file(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(
            f"expected a name ending in {', '.join(FORMATS)}, got {text!r}"
        )
    return path


def _device(name: str, dtypes: list[str]) -> devices.Device:
    """Find the device, and see that the library takes the dtypes there."""
    try:
        device = devices.find(name)
        for dtype in dtypes:
            if (refusal := device.refusal(dtype)) is not None:
                raise CommandError(f"--dtype: numbabn refuses {dtype}: {refusal}")
    except RuntimeError as error:
        raise CommandError(f"--device: {error}") from None
    return device


def _peers(against: list[str], device: str) -> list[str]:
    """List the peers to run; those named must be installed."""
    able = peers.ON[device]
    if ALL in against:
        return [name for name in able if not peers.missing(name)]
    for name in against:
        if name not in able:
            raise CommandError(
                f"--against: expected some of {', '.join(able)} with --device {device}, got {name}"
            )
        if missing := peers.missing(name):
            raise CommandError(f"--against: {name} not found: pip install {' '.join(missing)}")
    return against
