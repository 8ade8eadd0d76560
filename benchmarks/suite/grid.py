"""The cases that are measured: operations and dtypes on the shapes of ``numbabn bench quick``."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numbabn

from .yardstick import BATCH, SUITES, Arrays, Case, bench_call_of, make, parse_shape

# Those of ``numbabn bench``, whose traffic has a limit, and the other ways through the kernels.
OPS = ["forward", "inference", "backward", "add_relu"]
MORE_OPS = ["statistics", "eval_backward"]
LIKE = {"statistics": "inference", "eval_backward": "backward"}  # whose arrays they take

IMAGES = ["x".join(map(str, (BATCH, *image))) for image in SUITES["quick"].images]
ROWS = ["x".join(map(str, shape)) for shape in SUITES["quick"].whole]


class Grid:
    """Cases of one layout: every op, dtype and shape."""

    layout: str
    param_names = ("op", "dtype", "shape")
    params: tuple[list[str], list[str], list[str]]

    def case(self, op: str, dtype: str, shape: str) -> Case:
        return Case(op, self.layout, dtype, parse_shape(shape))


class NCHW(Grid):
    """Channels first."""

    layout = "nchw"
    params = (OPS, ["float32", "float16"], IMAGES)


class NHWC(Grid):
    """Channels last."""

    layout = "nhwc"
    params = (OPS, ["float32"], IMAGES)


class NC(Grid):
    """No places."""

    layout = "nc"
    params = (OPS, ["float32"], ROWS)


class Small(Grid):
    """So little that the call itself counts, and one thread does it."""

    layout = "nchw"
    params = (OPS, ["float32"], ["4x16x8x8"])


def arrays_of(case: Case) -> Arrays:
    """Draw a case's data, and touch its result's pages."""
    return make(replace(case, op=LIKE.get(case.op, case.op)))


def call_of(case: Case, arrays: Arrays, library: Any = numbabn) -> Callable[[], Any]:
    """Return the call that is timed."""
    if case.op == "statistics":
        return lambda: library.batch_stats(arrays.x, axis=case.axis)
    if case.op == "eval_backward":
        given = arrays.other, arrays.x, arrays.weight, arrays.mean, arrays.invstd
        options = {"axis": case.axis, "training": False, "out": arrays.out}
        return lambda: library.batch_norm_backward(*given, **options)
    return bench_call_of(case, arrays, library)


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Map over processes, as many as there are cores, which know what this one knows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(function, items))


def kernels() -> list[Case]:
    """List cases that between them call every kernel of the grid, the longest to compile first."""
    return [
        layout().case(op, dtype, layout.params[2][0])
        for op in ("backward", "forward", "statistics", "inference")
        for layout in (NHWC, NCHW, Small)
        for dtype in layout.params[1]
    ]


def compile_kernels() -> None:
    """Compile what all cases call; each kernel then comes from numba's cache.

    One after the other, as benchmarks come to them, it would take twice as long on two cores.
    """
    in_parallel(_compile, kernels())


def _compile(case: Case) -> None:
    call_of(case, arrays_of(case))()
