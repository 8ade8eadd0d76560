"""Normalize the bands of an xarray data set by name, whatever order its dimensions are in.

`xarray.apply_ufunc` takes numbabn's functions as they are. It gives them the named dimensions last,
as a view, which numbabn reads and writes without a copy. Needs ``pip install ".[dask,xarray]"``.
"""

import time

import numpy as np
import xarray as xr

import numbabn
from numbabn import reference

BANDS = ["blue", "green", "red", "nir", "swir1", "swir2", "thermal", "vv"]


def scenes():
    """Give what stands for a year of satellite images: 123 MB, bands of very different scale."""
    rng = np.random.default_rng(0)
    scale = np.geomspace(0.01, 30, len(BANDS)).astype(np.float32)[:, None, None]
    offset = np.linspace(0, 290, len(BANDS)).astype(np.float32)[:, None, None]
    values = rng.standard_normal((60, len(BANDS), 256, 250), dtype=np.float32)
    return xr.Dataset(
        {"radiance": (("time", "band", "y", "x"), values * scale + offset, {"sensor": "made up"})},
        coords={
            "time": np.datetime64("2024-01-03", "ns") + np.arange(60) * np.timedelta64(6, "D"),
            "band": BANDS,
        },
    )


def statistics(x):
    """Give mean and unbiased variance of the last dimension's channels, in float64."""
    stats = numbabn.batch_stats(x, axis=-1)
    return stats.mean, stats.unbiased_var


def main():
    """Take the statistics of each band, normalize by them, and do so again by Dask."""
    x = scenes()["radiance"]
    dims = ["time", "y", "x", "band"]

    mean, var = xr.apply_ufunc(
        statistics, x, input_core_dims=[dims], output_core_dims=[["band"], ["band"]]
    )
    for band in ("blue", "thermal"):
        at = {"band": band}
        print(f"{band}: mean {float(mean.sel(at)):.4f}, std {float(var.sel(at)) ** 0.5:.4f}")

    # Inference goes along the bands alone; all other dimensions are the batch, under any name.
    begun = time.perf_counter()
    y = xr.apply_ufunc(
        numbabn.batch_norm_inference,
        x, mean.astype(x.dtype), var.astype(x.dtype),
        input_core_dims=[["band"], ["band"], ["band"]],
        output_core_dims=[["band"]],
        kwargs={"axis": -1},
        keep_attrs=True,
    ).transpose(*x.dims)  # fmt: skip
    print(f"{x.nbytes / 1e6:.0f} MB normalized in {time.perf_counter() - begun:.2f} s")
    assert y.dims == x.dims
    assert y.attrs == x.attrs
    assert y.data.strides == x.data.strides  # a view went in, and one came out
    xr.testing.assert_equal(y.coords.to_dataset(), x.coords.to_dataset())

    count, oracle_mean, oracle_m2 = reference.statistics(x.data, axis=1)
    np.testing.assert_allclose(mean, oracle_mean, rtol=1e-12)
    np.testing.assert_allclose(var, oracle_m2 / (count - 1), rtol=1e-12)
    few = {"time": slice(0, 4)}
    expected = reference.inference(
        x.isel(few).data, mean.astype(x.dtype), var.astype(x.dtype), axis=1
    )
    worst = float(np.abs(y.isel(few) - expected).max())
    print(f"furthest from the float64 oracle: {worst:.1e}")
    assert worst < 5e-6

    # The same on chunks, when they are asked for. Bands are in one chunk, as the core dimension.
    lazy = xr.apply_ufunc(
        numbabn.batch_norm_inference,
        x.chunk(time=10), mean.astype(x.dtype), var.astype(x.dtype),
        input_core_dims=[["band"], ["band"], ["band"]],
        output_core_dims=[["band"]],
        kwargs={"axis": -1},
        keep_attrs=True,
        dask="parallelized",
        output_dtypes=[x.dtype],
    ).transpose(*x.dims)  # fmt: skip
    xr.testing.assert_identical(lazy.sel(band="nir").compute(), y.sel(band="nir"))
    print(f"the same by Dask, in {lazy.data.npartitions} chunks")


if __name__ == "__main__":
    main()
