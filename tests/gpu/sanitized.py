"""What the sanitizer watches: each kernel once or twice, on arrays that end where they end.

Numba's arrays are allocations of their own, so that an access beside one is seen.
"""

import sys
import warnings

import numpy as np

warnings.simplefilter("ignore")

from numba import cuda  # noqa: E402

import numbabn  # noqa: E402

# One block for each channel, several; 16 bytes at a time, and one number.
SHAPES = [
    ((3, 5, 16, 16), 1, np.float32),
    ((3, 5, 7, 7), 1, np.float16),
    ((9, 2, 64, 64), 1, np.float32),
    ((90, 2, 17, 17), 1, np.float16),
    ((3, 9, 40), -1, np.float32),
    ((3, 9, 33), -1, np.float16),
    ((900, 40), 1, np.float32),
    ((1700, 33), 1, np.float16),
]


def main():
    rng = np.random.default_rng(0)
    for shape, axis, dtype in SHAPES:
        x, dy, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
        weight, bias = (rng.standard_normal(shape[axis]).astype(np.float32) for _ in range(2))
        given = [cuda.to_device(a) for a in (x, dy, residual, weight, bias)]
        running = [cuda.to_device(np.ones_like(weight)) for _ in range(2)]
        x, dy, residual, weight, bias = given
        result = numbabn.batch_norm_forward(
            x, weight, bias, *running, axis=axis, residual=residual, activation="relu"
        )
        gradients = numbabn.batch_norm_backward(
            dy, x, weight, result.mean, result.invstd,
            axis=axis, mask=result.mask, with_residual=True,
        )  # fmt: skip
        stats = numbabn.batch_stats(x, axis=axis)
        y = numbabn.batch_norm_inference(x, *running, weight, bias, axis=axis)
        for array in (*result, *gradients, stats.mean, stats.m2, y):
            host = array.copy_to_host()
            assert host.dtype == np.uint8 or np.isfinite(host).all()
    print("done")


if __name__ == "__main__":
    sys.exit(main())
