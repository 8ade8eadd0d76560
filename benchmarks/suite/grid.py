"""The cases that are measured: operations and dtypes on the shapes of ``numbabn bench quick``."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from .yardstick import BATCH, SUITES, Case, call_of, make, parse_shape

OPS = ["forward", "inference", "backward", "add_relu"]
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


# Of the operations that have kernels of their own, those that take longest to compile first.
KERNELS = [
    (layout, op, dtype, layout.params[2][0])
    for op in ("backward", "forward", "inference")
    for layout in (NHWC, NCHW, Small)
    for dtype in layout.params[1]
]


def compile_kernels() -> None:
    """Compile what all cases call, on all cores; each kernel then comes from numba's cache.

    One after the other, as benchmarks come to them, it would take twice as long on two cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        list(pool.map(_compile, KERNELS))


def _compile(kernel: tuple[type[Grid], str, str, str]) -> None:
    layout, *names = kernel
    case = layout().case(*names)
    call_of(case, make(case))()
