"""The worst error of a result in units in its last place, against the oracle in float64."""

import numpy as np

from .grid import arrays_of, call_of
from .grid import compile_kernels as setup_cache
from .yardstick import Case, expected, parse_shape

__all__ = ["Accuracy", "setup_cache"]

RESULTS = {"forward": "y", "inference": "y", "backward": "dx"}


class Accuracy:
    """Of y, or of dx; where that is below 1, in units in the last place of 1.

    Both are differences of numbers of about 1 there, whose errors stay.
    """

    param_names = ("op", "case")
    params = (
        [*RESULTS],
        [
            "nchw 8x64x56x56 float32",
            "nchw 8x64x56x56 float32 around 1000",
            "nchw 8x64x56x56 float16",
            "nchw 8x256x14x14 float32",
            "nchw 8x256x14x14 float16",
            "nhwc 8x64x56x56 float32",
            "nhwc 8x64x56x56 float32 around 1000",
            "nc 4096x256 float32",
            "nc 4096x256 float32 around 1000",
        ],
    )
    unit = "ULP"

    def track_error(self, op: str, case: str) -> float:
        layout, shape, dtype, *around = case.split()
        case = Case(op, layout, dtype, parse_shape(shape))
        arrays = arrays_of(case)
        for array in (arrays.x, arrays.mean, arrays.running_mean) if around else ():
            array += array.dtype.type(around[-1])
        running = arrays.running_mean.copy(), arrays.running_var.copy()
        exact = dict(expected(case, arrays, running, np.arange(case.channels)))[RESULTS[op]]
        call_of(case, arrays)()
        last_place = np.spacing(np.maximum(np.abs(exact), 1).astype(arrays.out.dtype))
        return round(float((np.abs(arrays.out - exact) / last_place).max()), 3)
