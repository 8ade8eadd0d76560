"""Batch normalization inside a CUDA kernel of your own, with your own steps before and after it.

One kernel adds a residual, normalizes the sum by its own batch statistics, applies a GELU and
quantizes to int8: what would be four sweeps over memory is two reads of the inputs and a write of a
quarter of their size. ``numbabn.cuda.device`` has the part of it that is batch normalization.

Needs ``pip install ".[cuda13]"`` (or ``[cuda12]``) and a GPU. Without the GPU the kernel is
compiled for three of them, and what it takes of each is printed.
"""

import math
import sys
from statistics import median
from time import perf_counter

import numpy as np

try:
    from numba import cuda

    from numbabn.cuda import device as bn
except ImportError as error:
    print(f"Nothing was run: {error}")
    sys.exit(0)

N, C, S = 32, 256, 56 * 56  # a stage of ResNet-50
THREADS = 512  # of a block, a multiple of 32; a block takes a channel
EPS = 1e-5
TIMES = 20
RATE = np.float32(32)  # steps of int8 to one of y
SLOPE = np.float32(math.sqrt(2 / math.pi))
# Added to a small float32 and subtracted again, it leaves the nearest whole number.
WHOLE = np.float32(3 << 22)


@cuda.jit(device=True)
def add(a, b):
    """Add four numbers to four."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@cuda.jit(device=True)
def gelu_int8(v):
    """GELU, by the tanh, in steps of int8; all in float32, as Python's numbers would be float64."""
    cubic = v + np.float32(0.044715) * v * v * v
    steps = RATE * np.float32(0.5) * v * (np.float32(1) + math.tanh(SLOPE * cubic))
    steps = max(np.float32(-127), min(np.float32(127), steps))
    return np.int8((steps + WHOLE) - WHOLE)


@cuda.jit
def residual_norm_gelu_int8(x, residual, weight, bias, eps, y, mean, var):
    """Write ``y = int8(gelu(norm(x + residual)) * RATE)``, and the statistics of the sum.

    x, residual: float32 [N, C, S]; y: int8 [N, C, S]; mean, var: float64 [C]; else float32 [C].
    """
    c = cuda.blockIdx.x
    first, stride = 4 * cuda.threadIdx.x, 4 * cuda.blockDim.x
    planes, places = x.shape[0], x.shape[2]

    moments = bn.no_moments()
    for n in range(planes):
        for i in range(first, places, stride):
            values = add(bn.load4(x[n, c], i), bn.load4(residual[n, c], i))
            moments = bn.add4(moments, values, places - i)
    stats = bn.block_stats(moments)
    constants = bn.affine(stats.mean, stats.m2 / stats.count, weight[c], bias[c], eps)
    if cuda.threadIdx.x == 0:
        mean[c], var[c] = stats.mean, stats.m2 / stats.count

    # Backwards, to begin with what the caches still hold.
    for n in range(planes - 1, -1, -1):
        for i in range(first, places, stride):
            values = add(bn.load4(x[n, c], i), bn.load4(residual[n, c], i))
            p, q, r, s = bn.normalize4(values, constants)
            bn.store4(y[n, c], i, (gelu_int8(p), gelu_int8(q), gelu_int8(r), gelu_int8(s)))


def compile_only() -> None:
    """Compile as a GPU would need it, which takes none, and print what the kernel takes there."""
    from numba.cuda import types

    # numba-cuda by itself asks the driver before it compiles device functions.
    from numbabn.cuda.compilation import assemble

    data, channels = types.float32[:, :, ::1], types.float32[::1]
    signature = types.void(
        data, data, channels, channels, types.float64,
        types.int8[:, :, ::1], types.float64[::1], types.float64[::1],
    )  # fmt: skip
    for capability in (8, 0), (9, 0), (10, 0):
        start = perf_counter()
        kernel = residual_norm_gelu_int8.py_func
        code = assemble(kernel, signature, capability, resident=2)
        assert not code.spills
        print(
            "  sm_{}{}: {} registers of a thread, {} bytes of shared memory, nothing spilled "
            "({:.1f} s)".format(*capability, code.registers, code.shared, perf_counter() - start)
        )


def expected(x, residual, weight, bias):
    """Compute the same in NumPy: y in steps, not yet rounded, mean and variance, in float64."""
    total = (x + residual).astype(np.float64)
    mean, var = total.mean(axis=(0, 2)), total.var(axis=(0, 2))
    scale = weight / np.sqrt(var + EPS)
    v = (total - mean[:, None]) * scale[:, None] + bias[:, None]
    v = 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    return np.clip(v * RATE, -127, 127), mean, var


def run_on_gpu() -> None:
    """Run the kernel, hold it against NumPy in float64, and time it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, C, S), dtype=np.float32) + np.float32(100)
    residual = rng.standard_normal((N, C, S), dtype=np.float32)
    weight = rng.uniform(0.5, 1.5, C).astype(np.float32)
    bias = rng.standard_normal(C, dtype=np.float32)

    inputs = [cuda.to_device(each) for each in (x, residual, weight, bias)]
    y = cuda.device_array((N, C, S), np.int8)
    mean, var = (cuda.device_array(C, np.float64) for _ in range(2))

    def launch() -> None:
        residual_norm_gelu_int8[C, THREADS](*inputs, EPS, y, mean, var)

    launch()
    steps, true_mean, true_var = expected(x, residual, weight, bias)
    np.testing.assert_allclose(mean.copy_to_host(), true_mean, atol=1e-6)
    np.testing.assert_allclose(var.copy_to_host(), true_var, rtol=1e-6)
    off = np.abs(y.copy_to_host() - steps).max()
    assert off <= 0.501, off
    print(f"  agrees with float64: y is at most {off:.4f} steps from what was rounded")

    times = []
    for _ in range(TIMES):
        start, end = cuda.event(), cuda.event()
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(cuda.event_elapsed_time(start, end) / 1e3)
    moved = 2 * (x.nbytes + residual.nbytes) + y.size
    print(f"  {median(times) * 1e6:.0f} us, {moved / median(times) / 1e9:.0f} GB/s")


if __name__ == "__main__":
    if cuda.is_available():
        print(f"x + residual, norm, GELU, int8 of {N}x{C}x{S}, on the GPU:")
        run_on_gpu()
    else:
        print("No GPU, or no driver, was found: the kernel was not run, only compiled for")
        compile_only()
