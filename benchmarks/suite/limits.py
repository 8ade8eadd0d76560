"""How near a call comes to what memory allows, and how far it leaves NumPy behind.

Ratios of medians of samples taken in turns in one process, so that what else the machine does
strikes both alike.
"""

from . import grid
from .grid import arrays_of, call_of
from .grid import compile_kernels as setup_cache
from .yardstick import CPU, Budget, Case, Sampler, Timing, measure, numpy_peer, parse_shape

__all__ = ["NC", "NCHW", "NHWC", "NumPy", "setup_cache"]

SECONDS = 0.3
TURNS = 7


class _Fractions:
    """The time of a copy of as much memory (for two inputs: of a triad's traffic) by a call's."""

    unit = "of the limit"

    def track_fraction(self, op: str, dtype: str, shape: str) -> float:
        result = measure(self.case(op, dtype, shape), Budget(SECONDS), [], CPU())
        if result.fraction is None:
            raise RuntimeError(result.check.problem)
        return round(result.fraction, 4)


class NCHW(_Fractions, grid.NCHW):
    """Channels first."""


class NHWC(_Fractions, grid.NHWC):
    """Channels last."""


class NC(_Fractions, grid.NC):
    """No places."""


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
        case = Case(op, layout, "float32", parse_shape(shape))
        arrays = arrays_of(case)
        (numpy,) = numpy_peer.calls_of(case, arrays).values()
        ours, theirs = (Sampler(call, CPU().clock) for call in (call_of(case, arrays), numpy))
        for _ in range(TURNS):
            ours.sample()
            theirs.sample()
        return round(Timing.of(theirs.samples).median / Timing.of(ours.samples).median, 4)
