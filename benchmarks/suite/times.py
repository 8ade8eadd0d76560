"""Seconds of one call, its result preallocated."""

from functools import lru_cache
from time import perf_counter
from typing import Any

from . import grid
from .calls import ABSENT, arrays_of, call_of
from .compilation import compile_kernels as setup_cache
from .grid import Case

__all__ = ["NC", "NCHW", "NHWC", "Float16", "Small", "setup_cache"]

SAMPLE = 5e-3  # seconds, about


@lru_cache(maxsize=1)
def _prepared(case: Case) -> tuple[Any, int]:
    """Give the call, compiled, on pages that were touched, and how many make a sample."""
    call = call_of(case, arrays_of(case))
    try:
        call()
    except ABSENT:
        raise NotImplementedError from None
    start = perf_counter()
    call()
    return call, max(1, round(SAMPLE / (perf_counter() - start)))


class _Times:
    warmup_time = 0.05
    repeat = (3, 20, 0.4)

    def setup(self, compiled: Any, op: str, dtype: str, shape: str) -> None:
        # Comes before every call, asv's way; after the first, nothing is left to do.
        self.call, self.number = _prepared(self.case(op, dtype, shape))

    def time_call(self, compiled: Any, op: str, dtype: str, shape: str) -> None:
        self.call()


class NCHW(_Times, grid.NCHW):
    """Channels first."""


class Float16(_Times, grid.Float16):
    """Channels first, two bytes each."""


class NHWC(_Times, grid.NHWC):
    """Channels last."""


class NC(_Times, grid.NC):
    """No places."""


class Small(_Times, grid.Small):
    """So little that the call itself counts, and one thread does it."""
