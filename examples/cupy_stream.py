"""Normalize batches on a GPU in CuPy's streams: one is copied while another is computed on.

Needs a GPU of NVIDIA's, and ``pip install ".[cuda13]" cupy-cuda13x`` (or both of 12, as the driver
is).
"""

import sys
from importlib.util import find_spec

import numpy as np

import numbabn
from numbabn import reference

SHAPE, BATCHES, STREAMS = (64, 64, 56, 56), 12, 2


def what_is_missing():
    """Say what this machine lacks to run the example; None if it has all."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy (pip install cupy-cuda13x): {error}"
    if not cupy.cuda.is_available():
        return "a GPU that CuPy sees"
    if find_spec("numba_cuda") is None:
        return 'numba-cuda (pip install ".[cuda13]")'
    return None


def main():
    """Send batches there, normalize them, and bring the results back, in order of each stream."""
    import cupy

    rng = np.random.default_rng(0)
    pinned = cupy.cuda.alloc_pinned_memory(BATCHES * int(np.prod(SHAPE)) * 2)
    x = np.frombuffer(pinned, np.float16, BATCHES * int(np.prod(SHAPE))).reshape(BATCHES, *SHAPE)
    x[...] = rng.standard_normal(SHAPE, dtype=np.float32)
    x *= np.arange(1, BATCHES + 1, dtype=np.float16).reshape(-1, 1, 1, 1, 1)
    weight, bias = (cupy.asarray(rng.uniform(0.5, 1.5, 64).astype(np.float32)) for _ in range(2))

    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(STREAMS)]
    cupy.cuda.Device().synchronize()  # weight and bias are there before any stream reads them
    results, statistics = [], []
    for i in range(BATCHES):
        with streams[i % STREAMS]:  # CuPy's current stream, on which numbabn puts the call
            given = cupy.empty(SHAPE, np.float16)
            given.set(x[i])
            y, mean, invstd, _ = numbabn.batch_norm_forward(given, weight, bias, activation="relu")
            results.append(y)
            statistics.append((mean, invstd))
    for stream in streams:
        stream.synchronize()

    for i in (0, BATCHES - 1):
        expected, mean, invstd = reference.forward(
            x[i], cupy.asnumpy(weight), cupy.asnumpy(bias), activation="relu"
        )
        np.testing.assert_allclose(cupy.asnumpy(results[i]), expected, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(cupy.asnumpy(statistics[i][0]), mean, atol=1e-5)
        np.testing.assert_allclose(cupy.asnumpy(statistics[i][1]), invstd, rtol=1e-5)
    print(f"{BATCHES} batches {SHAPE} in {STREAMS} streams agree with the float64 oracle")
    print("results are", type(results[0]), "on device", results[0].device.id)


if __name__ == "__main__":
    missing = what_is_missing()
    if missing:
        print(f"Not run: this example needs {missing}.")
        sys.exit(0)
    main()
