"""``numbabn bench``: time the operations against memory itself and against the peers."""

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
from . import calls, devices, environment, peers, suites
from .cases import DTYPES, LAYOUTS, TRAFFIC, Case
from .measurement import Budget, Result, means, measure

if TYPE_CHECKING:  # slow to import, and not there without the extra
    from rich.console import Console

OPS = ("forward", "inference", "backward")
SECONDS = 1.0
ALL = "all"
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
            "process of its own. Exit code 1 if a case is wrong."
        ),
    )
    add = parser.add_argument
    add(
        "what",
        nargs="*",
        default=["quick"],
        metavar="SUITE|SHAPE",
        help=f"{', '.join(suites.SUITES)}, or shapes NxC or NxCxHxW, of any rank, written so "
        "whatever the layout; several, by spaces or commas (default: quick, under a minute)",
    )
    add(
        "--op",
        type=names_of(TRAFFIC),
        default=list(OPS),
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
        default=["float32"],
        metavar="DTYPES",
        help=f"some of {', '.join(DTYPES)} (default: float32)",
    )
    add(
        "--device",
        choices=devices.NAMES,
        default="cpu",
        help="where to compute and what to time: cuda by events on the device itself, which is "
        "the first that CUDA_VISIBLE_DEVICES leaves (default: %(default)s)",
    )
    add(
        "--batch",
        type=whole_number(1),
        default=suites.BATCH,
        metavar="N",
        help="images in the suites of images (default: %(default)s)",
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
        default=[],
        metavar="PEERS",
        help=f"some of {', '.join(peers.NEEDS)}, or all: those installed; on cuda "
        f"{', '.join(peers.ON['cuda'])} (default: none)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--seconds",
        type=positive_number,
        default=SECONDS,
        metavar="F",
        help="how long to measure each case (default: %(default)s)",
    )
    budget.add_argument(
        "--repeats",
        type=whole_number(1),
        metavar="N",
        help="samples of each instead, one in each turn",
    )
    add("--plot", type=_picture_file, metavar="FILE", help="draw a .png, .pdf or .svg")
    add_json_option(parser, "settings, environment and quantiles of all samples")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure all cases; show the table, draw the picture, write the JSON."""
    require("bench", "rich", *(["matplotlib"] if args.plot else []))
    from rich.console import Console

    from . import report

    if args.threads is not None and args.device != "cpu":
        raise CommandError(f"--threads: expected none with --device {args.device}")
    cases = suites.choose(args.what, args.op, args.layout, args.dtype, args.batch)
    names = _peers(args.against, args.device)
    device = _device(args.device, args.dtype)
    console = Console(stderr=args.json == Path("-"), highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = report.WIDTH
    found, facts = _measure(args, cases, names, device, console)
    report.show(console, found, names, facts)
    if args.plot:
        from . import figure

        figure.draw(args.plot, found, names, report.place(facts))
        console.print(f"Picture: {args.plot.resolve()}", markup=False, soft_wrap=True)
    if args.json is not None:
        write_json(args.json, _document(args, found, names, facts))
    return int(any(result.check.problem for result in found))


def _measure(
    args: argparse.Namespace,
    cases: list[Case],
    names: list[str],
    device: devices.Device,
    console: "Console",
) -> tuple[list[Result], dict[str, Any]]:
    """Start the peers and measure every case; return the results and where they were got."""
    from . import report

    budget = Budget(args.seconds, args.repeats)
    with environment.threads(args.threads) as threads, ExitStack() as stack:
        with console.status("Starting") as status:
            facts = environment.gather(threads, device)
            running = []
            for name in names:
                status.update(f"Starting {name}")
                try:
                    running.append(stack.enter_context(peers.started(name, threads, args.device)))
                except peers.PeerError as error:
                    raise CommandError(f"--against: {name}: {error}", code=1) from None
                facts["peers"][name] = running[-1].version
        begin = stack.enter_context(report.progress(console, len(cases)))
        found = []
        for case in cases:
            begin(f"{case.op} {case.layout} {case.name}")
            found.append(measure(case, budget, running, device))
    return found, facts


def _document(
    args: argparse.Namespace, found: list[Result], names: list[str], facts: dict[str, Any]
) -> dict[str, Any]:
    settings = ("what", "op", "layout", "dtype", "device", "batch", "threads", "against")
    return {
        "settings": {name: getattr(args, name) for name in settings}
        | {"seconds": None if args.repeats else args.seconds, "repeats": args.repeats},
        "environment": facts,
        "traffic": {op: traffic._asdict() for op, traffic in TRAFFIC.items() if op in args.op},
        "cases": [result.document() for result in found],
        "geometric_means": means(found, names),
    }


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
            if (refusal := calls.refusal(dtype, device)) is not None:
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
