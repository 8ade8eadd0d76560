"""Batch normalization of a Dask array that is larger than what should be in memory.

Statistics are taken one chunk at a time; inference is a step of Dask's own plan, which makes y when
it is asked for, and then only as much of it as is. Needs ``pip install ".[dask]"``.
"""

import time

import dask
import dask.array as da
import numpy as np

import numbabn
from numbabn import reference

C = 32


def features(chunks):
    """Plan what stands for a data set: 411 MB, channels with a mean and a spread of their own."""
    rng = da.random.default_rng(0)
    scale = np.linspace(0.5, 4, C, dtype=np.float32)[:, None, None]
    shift = np.linspace(-50, 50, C, dtype=np.float32)[:, None, None]
    normal = rng.standard_normal((1024, C, 56, 56), chunks=chunks, dtype=np.float32)
    return normal * scale + shift


def main():
    """Take statistics, normalize by them, and look at the result, all by chunks."""
    x = features(chunks=(64, C, 56, 56))
    print(f"x: {x.nbytes / 1e6:.0f} MB in {x.npartitions} chunks, {x.dtype}")

    begun = time.perf_counter()
    stats = numbabn.population_stats(x)  # holds one chunk at a time
    print(f"statistics of {stats.count} values per channel: {time.perf_counter() - begun:.1f} s")
    mean, var = stats.mean.astype(x.dtype), stats.unbiased_var.astype(x.dtype)

    # One call per chunk, which uses every core by itself: a thread of Dask's beside it would only
    # hold another chunk. Nothing is computed here yet.
    dask.config.set(scheduler="synchronous")
    y = x.map_blocks(numbabn.batch_norm_inference, mean, var, dtype=x.dtype)
    assert (y.shape, y.chunks, y.dtype) == (x.shape, x.chunks, x.dtype)

    begun = time.perf_counter()
    after = numbabn.population_stats(y)
    print(f"inference, and statistics of y: {time.perf_counter() - begun:.1f} s")
    print(f"y: |mean| up to {abs(after.mean).max():.1e}, var {after.var.min():.5f} and up")
    np.testing.assert_allclose(after.mean, 0, atol=1e-5)
    np.testing.assert_allclose(after.var, 1, rtol=1e-4)

    # A few images need one chunk; they are what the float64 oracle makes of the same ones.
    few, some = dask.compute(y[500:504], x[500:504])
    worst = np.abs(few - reference.inference(some, mean, var)).max()
    print(f"furthest from the float64 oracle: {worst:.1e}")
    assert worst < 2e-5

    # Channels in chunks of their own: the parameters are then cut as x is, by blockwise.
    cut = some[:, :, :7]
    by_channels = da.blockwise(
        numbabn.batch_norm_inference, "nchw",
        da.from_array(cut, chunks=(2, 8, 7, 56)), "nchw",
        da.from_array(mean, chunks=8), "c",
        da.from_array(var, chunks=8), "c",
        dtype=cut.dtype,
    )  # fmt: skip
    np.testing.assert_array_equal(by_channels.compute(), few[:, :, :7])
    chunked = da.from_array(some, chunks=(2, 8, 28, 56))
    np.testing.assert_allclose(
        numbabn.population_stats(chunked).mean, reference.statistics(some)[1], rtol=1e-12
    )
    print("the same with channels in chunks of their own")


if __name__ == "__main__":
    main()
