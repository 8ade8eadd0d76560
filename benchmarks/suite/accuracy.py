"""The worst error of a result in units in its last place, against the oracle in float64."""

from itertools import product

import numpy as np

from .grid import Case, parse_shape

RESULTS = {"forward": "y", "inference": "y", "backward": "dx"}

Errors = dict[tuple[str, str], float]


class Accuracy:
    """Of y, or of dx; where that is below 1, in units in the last place of 1.

    Both are differences of numbers of about 1 there, whose errors stay.
    """

    param_names = ("op", "case")
    params = (
        [*RESULTS],
        [
            "nchw 8x64x56x56",
            "nchw 8x64x56x56 around 1000",
            "nhwc 8x64x56x56",
            "nhwc 8x64x56x56 around 1000",
            "nc 4096x256",
            "nc 4096x256 around 1000",
        ],
    )
    unit = "ULP"

    def setup_cache(self) -> Errors:
        from .compilation import compile_kernels

        able = compile_kernels()["seconds"]
        return {each: _error(*each) for each in product(*self.params) if each[0] in able}

    def setup(self, errors: Errors, op: str, case: str) -> None:
        if (op, case) not in errors:
            raise NotImplementedError

    def track_error(self, errors: Errors, op: str, case: str) -> float:
        return errors[op, case]


def _error(op: str, case: str) -> float:
    from yardstick.cli.bench.oracle import expected

    from .calls import arrays_of, call_of

    layout, shape, *around = case.split()
    of = Case(op, layout, "float32", parse_shape(shape))
    arrays = arrays_of(of)
    for array in (arrays.x, arrays.mean, arrays.running_mean) if around else ():
        array += array.dtype.type(around[-1])
    running = arrays.running_mean.copy(), arrays.running_var.copy()
    exact = dict(expected(of, arrays, running, np.arange(of.channels)))[RESULTS[op]]
    call_of(of, arrays)()
    last_place = np.spacing(np.maximum(np.abs(exact), 1).astype(arrays.out.dtype))
    return round(float((np.abs(arrays.out - exact) / last_place).max()), 3)
