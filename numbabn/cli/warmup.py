"""``numbabn warmup``: compile the kernels ahead of their first call, or show what it costs."""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import ml_dtypes
import numba
import numpy as np

import numbabn

from .. import cpu
from .command import CommandError, names_of

ALL = "all"
SHAPE = (32, 64, 56, 56)  # of the calls that --report times
LATER = 21  # calls of each, after the first
# A program by name would find another numbabn than this where this one is not installed.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1));"
    "from numbabn.cli.warmup import time_calls; time_calls(*sys.argv[1:])"
)
_ROOT = Path(__file__).parents[2]


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "warmup",
        help="compile the kernels ahead of their first call",
        description=(
            "Compile the kernels for this processor and keep them on disk, so that no first call "
            "in any later process waits for the compiler."
        ),
    )
    add = parser.add_argument
    add(
        "--op",
        type=names_of([*cpu.OPERATIONS, ALL]),
        default=[ALL],
        metavar="OPS",
        help=f"some of {', '.join(cpu.OPERATIONS)}, or all (default: all)",
    )
    add(
        "--dtype",
        type=names_of([*cpu.DTYPES, ALL]),
        default=["float32"],
        metavar="DTYPES",
        help=f"some of {', '.join(cpu.DTYPES)}, or all (default: float32)",
    )
    add(
        "--report",
        action="store_true",
        help="compile in an empty folder instead, which is then deleted, and show how long a first "
        "call takes with nothing on disk, how long with all on disk, and how long a later call",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compile what was asked for and say where it is kept, or show the table of first calls."""
    operations = cpu.OPERATIONS if ALL in args.op else args.op
    dtypes = cpu.DTYPES if ALL in args.dtype else args.dtype
    if numba.config.DISABLE_JIT:
        raise CommandError("NUMBA_DISABLE_JIT is set, so that nothing can be compiled", code=1)
    print(report(operations, dtypes) if args.report else compile_all(operations, dtypes))
    return 0


def compile_all(operations: Sequence[str], dtypes: Sequence[str]) -> str:
    """Compile whatever is not on disk; return the line that says so."""
    folder = cpu.cache_folder()
    if folder is None:
        raise CommandError(
            "kernels cannot be kept: no folder for them can be written; "
            "set NUMBA_CACHE_DIR to one that can",
            code=1,
        )
    variants = cpu.variants(operations, dtypes)
    begun, compiled = perf_counter(), 0
    with _progress(len(variants)) as begin:
        for variant in variants:
            begin(str(variant))
            compiled += cpu.prepare(variant)
    found = len(variants) - compiled
    state = f"{compiled} compiled, {found} there already" if compiled else "all there already"
    return (
        f"{len(variants)} kernels ({', '.join(operations)}; {', '.join(dtypes)}): {state}, "
        f"{perf_counter() - begun:.1f} s, kept in {folder}"
    )


def report(operations: Sequence[str], dtypes: Sequence[str]) -> str:
    """Time first and later calls in new processes; return the table."""
    rows = []
    cases = list(product(dtypes, operations))
    with tempfile.TemporaryDirectory() as folder, _progress(len(cases)) as begin:
        for dtype, operation in cases:
            begin(f"{operation} {dtype}")
            cold, _ = _timed_calls(folder, operation, dtype)
            warm, later = _timed_calls(folder, operation, dtype)
            rows.append(
                f"{operation:<10} {dtype:<8} {cold * 1e3:>12.0f} {warm * 1e3:>12.0f}"
                f" {later * 1e3:>12.2f}"
            )
    return "\n".join(
        [
            f"Milliseconds of a call on {'x'.join(map(str, SHAPE))}, without imports",
            f"{'':<19} {'first, cold':>12} {'first, warm':>12} {'later':>12}",
            *rows,
        ]
    )


def time_calls(operation: str, dtype: str) -> None:
    """Print, as JSON, the seconds of this process's first call and the median of later ones."""
    data = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32).astype(data)
    out = np.zeros_like(x)
    numbers = np.float32 if data.itemsize == 2 else data
    mean, var = np.zeros(SHAPE[1], numbers), np.ones(SHAPE[1], numbers)
    call: Callable[[], Any] = {
        "forward": lambda: numbabn.batch_norm_forward(x, out=out),
        "inference": lambda: numbabn.batch_norm_inference(x, mean, var, out=out),
        "backward": lambda: numbabn.batch_norm_backward(x, x, None, mean, var, out=out),
        "statistics": lambda: numbabn.batch_stats(x),
    }[operation]
    seconds = []
    for _ in range(1 + LATER):
        begun = perf_counter()
        call()
        seconds.append(perf_counter() - begun)
    print(json.dumps([seconds[0], statistics.median(seconds[1:])]))


def _timed_calls(folder: str, operation: str, dtype: str) -> tuple[float, float]:
    """Run `time_calls` in a new process whose kernels are kept in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(_ROOT), operation, dtype],
        env=os.environ | {"NUMBA_CACHE_DIR": folder},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise CommandError(f"{operation} of {dtype} failed with code {done.returncode}", code=1)
    first, later = json.loads(done.stdout)
    return first, later


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on a terminal; the function given names the next step.

    Without rich there is no bar: compiling ahead must not need more than numbabn does.
    """
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda name: None
        return
    from rich.console import Console

    from .bench.report import progress

    with progress(Console(), steps) as begin:
        yield begin
