"""Normalize a data set on disk that is never in memory as a whole, from one file into another.

The statistics of all images come from one pass over the file, the result from a second one. Both
files are plain ``.npy`` files, mapped into memory: the system reads and writes their pages.
"""

import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

import numbabn
from numbabn import reference

SHAPE = 256, 64, 56, 56  # 205 MB of float32
BATCH = 32


def slices():
    """Cut the images into batches."""
    return [slice(n, n + BATCH) for n in range(0, SHAPE[0], BATCH)]


def write(path):
    """Write what stands for a data set: channels with a mean and a spread of their own."""
    rng = np.random.default_rng(0)
    mean = rng.uniform(-100, 100, (64, 1, 1)).astype(np.float32)
    spread = rng.uniform(0.1, 10, (64, 1, 1)).astype(np.float32)
    file = open_memmap(path, "w+", np.float32, SHAPE)
    for batch in slices():
        file[batch] = rng.standard_normal(file[batch].shape, dtype=np.float32) * spread + mean
    file.flush()


def main(folder):
    """Write a data set, take its statistics, and normalize it by them into a second file."""
    write(folder / "x.npy")
    x = open_memmap(folder / "x.npy", "r")
    y = open_memmap(folder / "y.npy", "w+", x.dtype, x.shape)

    # Kernels are compiled, or read from disk, at their first call: not what is measured here.
    numbabn.batch_norm_inference(x[:BATCH], *np.ones((2, SHAPE[1]), x.dtype), out=y[:BATCH])
    numbabn.batch_stats(x[:BATCH])

    tracemalloc.start()
    begun = time.perf_counter()
    # An array on disk is a data set in one piece; a slice of a memmap is a batch.
    stats = numbabn.population_stats(x)
    by_batches = numbabn.population_stats(x[batch] for batch in slices())
    mean, var = stats.mean.astype(x.dtype), stats.unbiased_var.astype(x.dtype)
    for batch in slices():
        numbabn.batch_norm_inference(x[batch], mean, var, out=y[batch])
    y.flush()
    seconds = time.perf_counter() - begun
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{x.nbytes / 1e6:.0f} MB read three times and written once in {seconds:.1f} s")
    print(f"beside the files: {peak / 1e6:.1f} MB")
    assert peak < x.nbytes / 50

    # What is in the file now, against the same in float64 by NumPy.
    count, oracle_mean, oracle_m2 = reference.statistics(x)
    assert stats.count == by_batches.count == count
    np.testing.assert_allclose(stats.mean, oracle_mean, rtol=1e-12)
    np.testing.assert_allclose(stats.m2, oracle_m2, rtol=1e-12)
    np.testing.assert_allclose(by_batches.mean, oracle_mean, rtol=1e-12)
    np.testing.assert_allclose(by_batches.m2, oracle_m2, rtol=1e-12)
    written = np.load(folder / "y.npy", mmap_mode="r")
    expected = reference.inference(x[:4], mean, var)
    worst = np.abs(written[:4] - expected).max()
    after = numbabn.population_stats(written)
    print(f"furthest from the float64 oracle: {worst:.1e}")
    print(f"y: |mean| up to {abs(after.mean).max():.1e}, var {after.var.min():.4f} and up")
    assert worst < 4e-6
    np.testing.assert_allclose(after.mean, 0, atol=1e-5)
    np.testing.assert_allclose(after.var, 1, rtol=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
