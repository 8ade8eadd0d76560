"""How near a call comes to what memory allows.

A ratio of medians of samples taken in turns in one process, so that what else the machine does
strikes both alike.
"""

import contextlib

from . import grid
from .grid import OPS, Case

SAMPLES = 15

Fractions = dict[Case, float]


class _Fractions:
    """The time of a copy of as much memory (for two inputs: of a triad's traffic) by a call's."""

    unit = "of the limit"

    def setup(self, fractions: Fractions, op: str, dtype: str, shape: str) -> None:
        if self.case(op, dtype, shape) not in fractions:
            raise NotImplementedError

    def track_fraction(self, fractions: Fractions, op: str, dtype: str, shape: str) -> float:
        return fractions[self.case(op, dtype, shape)]


class NCHW(_Fractions, grid.NCHW):
    """Channels first."""

    params = (OPS, *grid.NCHW.params[1:])


class Float16(_Fractions, grid.Float16):
    """Channels first, two bytes each."""

    params = (*grid.Float16.params[:2], grid.IMAGES[:1])


class NHWC(_Fractions, grid.NHWC):
    """Channels last."""

    params = (OPS, *grid.NHWC.params[1:])


class NC(_Fractions, grid.NC):
    """No places."""

    params = (OPS, *grid.NC.params[1:])


def setup_cache() -> Fractions:
    """Measure all, in one process: each would compile its own copies and triads."""
    from yardstick.cli.bench.devices.cpu import CPU
    from yardstick.cli.bench.measurement import Budget, measure

    from .compilation import compile_kernels

    compile_kernels()
    fractions = {}
    for layout in (NCHW, Float16, NHWC, NC):
        for case in layout().cases():
            with contextlib.suppress(AttributeError):  # the commit has no such operation
                result = measure(case, Budget(repeats=SAMPLES), [], CPU())
                if result.fraction is not None:  # else it refuses it, or does it wrongly
                    fractions[case] = round(result.fraction, 4)
    return fractions
