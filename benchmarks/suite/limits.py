"""How near a call comes to what memory allows, and how far it leaves NumPy behind.

Ratios of medians of samples taken in turns in one process, so that what else the machine does
strikes both alike.
"""

from typing import Any

from . import grid
from .yardstick import CPU, Budget, Case, Sampler, Timing, call_of, make, measure, numpy_peer

SECONDS = 0.3
TURNS = 7


def setup_cache() -> None:
    grid.compile_kernels()


class _Fractions:
    """The time of a copy of as much memory (for two inputs: of a triad's traffic) by a call's."""

    unit = "of the limit"

    def track_fraction(self, op: str, dtype: str, shape: str) -> float:
        result = measure(self.case(op, dtype, shape), Budget(SECONDS), [], CPU())
        if result.fraction is None:
            raise RuntimeError(result.check.problem)
        return result.fraction


class NCHW(_Fractions, grid.NCHW): ...


class NHWC(_Fractions, grid.NHWC): ...


class NC(_Fractions, grid.NC): ...


class NumPy:
    """How many times a call's time NumPy takes, done in as few sweeps as it can."""

    param_names = ("op", "case")
    params = (
        ["forward", "inference", "backward"],
        ["nchw 32x256x14x14", "nhwc 32x256x14x14", "nc 4096x1024"],
    )
    unit = "times faster"

    def track_ratio(self, op: str, case: str) -> float:
        layout, _, shape = case.partition(" ")
        case = Case(op, layout, "float32", tuple(map(int, shape.split("x"))))
        arrays = make(case)
        (numpy,) = numpy_peer.calls_of(case, arrays).values()
        ours, theirs = (Sampler(call, CPU().clock) for call in (call_of(case, arrays), numpy))
        for _ in range(TURNS):
            ours.sample()
            theirs.sample()
        return Timing.of(theirs.samples).median / Timing.of(ours.samples).median
