"""Seconds of one call, its result preallocated."""

from functools import lru_cache
from time import perf_counter
from typing import Any

from . import grid
from .yardstick import Case, call_of, make

SAMPLE = 5e-3  # seconds, about


@lru_cache(maxsize=1)
def _prepared(case: Case) -> tuple[Any, int]:
    """Give the call, compiled, on pages that were touched, and how many make a sample."""
    call = call_of(case, make(case))
    call()
    start = perf_counter()
    call()
    return call, max(1, round(SAMPLE / (perf_counter() - start)))


def setup_cache() -> None:
    grid.compile_kernels()


class _Times:
    warmup_time = 0.05
    repeat = (3, 20, 0.4)

    def setup(self, op: str, dtype: str, shape: str) -> None:
        # Before every sample; but for the first time nothing is left to do.
        self.call, self.number = _prepared(self.case(op, dtype, shape))

    def time_call(self, op: str, dtype: str, shape: str) -> None:
        self.call()


class NCHW(_Times, grid.NCHW): ...


class NHWC(_Times, grid.NHWC): ...


class NC(_Times, grid.NC): ...


class Small(_Times, grid.Small): ...
