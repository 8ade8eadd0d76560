"""Seconds of one call, its result preallocated."""

from functools import lru_cache
from time import perf_counter
from typing import Any

from . import grid
from .grid import MORE_OPS, OPS
from .grid import compile_kernels as setup_cache
from .yardstick import Case

__all__ = ["NC", "NCHW", "NHWC", "Small", "setup_cache"]

SAMPLE = 5e-3  # seconds, about


@lru_cache(maxsize=1)
def _prepared(case: Case) -> tuple[Any, int]:
    """Give the call, compiled, on pages that were touched, and how many make a sample."""
    call = grid.call_of(case, grid.arrays_of(case))
    call()
    start = perf_counter()
    call()
    return call, max(1, round(SAMPLE / (perf_counter() - start)))


class _Times:
    warmup_time = 0.05
    repeat = (3, 20, 0.4)

    def setup(self, op: str, dtype: str, shape: str) -> None:
        # Comes before every call, asv's way; after the first, nothing is left to do.
        self.call, self.number = _prepared(self.case(op, dtype, shape))

    def time_call(self, op: str, dtype: str, shape: str) -> None:
        self.call()


class NCHW(_Times, grid.NCHW):
    """Channels first."""

    params = (OPS + MORE_OPS, *grid.NCHW.params[1:])


class NHWC(_Times, grid.NHWC):
    """Channels last."""

    params = (OPS + MORE_OPS, *grid.NHWC.params[1:])


class NC(_Times, grid.NC):
    """No places."""

    params = (OPS + MORE_OPS, *grid.NC.params[1:])


class Small(_Times, grid.Small):
    """So little that the call itself counts, and one thread does it."""

    params = (OPS + MORE_OPS, *grid.Small.params[1:])
