"""What docs/arrays.md says of arrays that other libraries hand to numbabn, or that are files."""

import cases
import numpy as np
import pytest

import numbabn
from numbabn import reference

SHAPE = (12, 5, 6, 7)


def operands(dtype=np.float32):
    x = cases.normal(SHAPE, dtype, seed=1, offset=3)
    mean, var = cases.normal(5, dtype, seed=2), np.abs(cases.normal(5, dtype, seed=3)) + dtype(0.5)
    return x, mean, var


def close(y, x, mean, var, axis=1):
    expected = reference.inference(x, mean, var, axis=axis)
    np.testing.assert_allclose(y, expected, rtol=0, atol=8 * 2**-23 * np.abs(expected).max())


class TestMemmap:
    @pytest.fixture
    def on_disk(self, tmp_path):
        def write(name, array, mode="r+", offset=0):
            path = tmp_path / name
            path.write_bytes(bytes(offset) + array.tobytes())
            return np.memmap(path, array.dtype, mode, offset, array.shape)

        return write

    @staticmethod
    def contents(memmap):
        return np.fromfile(memmap.filename, memmap.dtype, offset=memmap.offset).reshape(
            memmap.shape
        )

    def test_from_one_file_into_another(self, on_disk):
        x, mean, var = operands()
        source, out = on_disk("x", x, "r"), on_disk("y", np.zeros_like(x))
        given = on_disk("mean", mean, "r"), on_disk("var", var, "r")
        assert numbabn.batch_norm_inference(source, *given, out=out) is out
        out.flush()
        close(self.contents(out), x, mean, var)

    def test_in_place(self, on_disk):
        x, _, _ = operands()
        file = on_disk("x", x)
        result = numbabn.batch_norm_forward(file, out=file)
        assert result.y is file
        file.flush()
        np.testing.assert_array_equal(self.contents(file), numbabn.batch_norm(x, training=True))

    def test_running_statistics_on_disk(self, on_disk):
        x, mean, var = operands()
        files = on_disk("mean", mean), on_disk("var", var)
        numbabn.batch_norm(x, *files, training=True)
        numbabn.batch_norm(x, mean, var, training=True)
        for file, expected in zip(files, (mean, var), strict=True):
            file.flush()
            np.testing.assert_array_equal(self.contents(file), expected)

    @pytest.mark.parametrize("offset", [0, 1, 4, 128, 4096 + 2])
    def test_data_anywhere_in_a_file(self, on_disk, offset):
        x, mean, var = operands()
        source, out = on_disk("x", x, "r", offset), on_disk("y", np.zeros_like(x), "r+", offset)
        numbabn.batch_norm_inference(source, mean, var, out=out)
        out.flush()
        close(self.contents(out), x, mean, var)

    def test_copy_on_write_leaves_the_file(self, on_disk):
        x, mean, var = operands()
        file = on_disk("x", x, "c")
        numbabn.batch_norm_inference(file, mean, var, out=file)
        close(file, x, mean, var)
        np.testing.assert_array_equal(self.contents(file), x)

    def test_errors_write_nothing(self, on_disk):
        x, mean, var = operands()
        read_only, out = on_disk("r", np.zeros_like(x), "r"), on_disk("y", np.zeros_like(x))
        with pytest.raises(ValueError, match="out: expected a writeable array, got a read-only"):
            numbabn.batch_norm_inference(x, mean, var, out=read_only)
        with pytest.raises(ValueError, match="running_var: expected a writeable array"):
            numbabn.batch_norm(
                x, mean, on_disk("var", var, "r"), training=True, out=out
            )  # fmt: skip
        with pytest.raises(ValueError, match="out: expected memory of its own"):
            numbabn.batch_norm_inference(out[1:], mean, var, out=out[:-1])
        assert not self.contents(read_only).any()
        assert not self.contents(out).any()


class TestDask:
    @pytest.fixture
    def da(self):
        return pytest.importorskip("dask.array")

    @pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
    @pytest.mark.parametrize("settings", [{}, {"dtype": np.float32}], ids=["inferred", "dtype"])
    def test_map_blocks(self, da, settings, scheduler):
        x, mean, var = operands()
        plan = da.from_array(x, chunks=(5, -1, 4, 6))
        y = plan.map_blocks(numbabn.batch_norm_inference, mean, var, **settings)
        assert (y.shape, y.chunks, y.dtype) == (plan.shape, plan.chunks, plan.dtype)
        close(y.compute(scheduler=scheduler), x, mean, var)

    def test_map_blocks_of_two_arrays(self, da):
        x, mean, var = operands()
        residual = cases.normal(SHAPE, np.float32, seed=4)
        chunks = (5, -1, 4, 6)

        def normalize(x, residual):
            return numbabn.batch_norm_inference(x, mean, var, residual=residual, activation="relu")

        y = da.map_blocks(
            normalize, da.from_array(x, chunks=chunks), da.from_array(residual, chunks=chunks),
            dtype=x.dtype,
        )  # fmt: skip
        expected = reference.inference(x, mean, var, residual=residual, activation="relu")
        np.testing.assert_allclose(y.compute(), expected, atol=1e-5)

    def test_channels_in_chunks(self, da):
        x, mean, var = operands()
        y = da.blockwise(
            numbabn.batch_norm_inference, "nchw",
            da.from_array(x, chunks=(5, (2, 3), 4, 6)), "nchw",
            da.from_array(mean, chunks=((2, 3),)), "c",
            da.from_array(var, chunks=((2, 3),)), "c",
            dtype=x.dtype,
        )  # fmt: skip
        close(y.compute(), x, mean, var)

    def test_a_plan_is_no_array(self, da):
        x, mean, var = operands()
        plan = da.from_array(x)
        hint = "got Array, which is not computed yet; its map_blocks takes numbabn's functions"
        with pytest.raises(TypeError, match=f"x: expected an array on .*{hint}"):
            numbabn.batch_norm_inference(plan, mean, var)
        with pytest.raises(TypeError, match=f"x: expected an array on .*{hint}"):
            numbabn.batch_stats(plan)
        with pytest.raises(TypeError, match=f"residual: expected a NumPy array, {hint}"):
            numbabn.batch_norm_inference(x, mean, var, residual=plan)


class TestXarray:
    CORE = (["band"],) * 3

    @pytest.fixture
    def xr(self):
        return pytest.importorskip("xarray")

    def named(self, xr, array, dims):
        return xr.DataArray(array, dims=dims, name="x", attrs={"unit": "K"})

    @pytest.mark.parametrize("axis", [0, 1, 2, 3])
    def test_inference_by_name(self, xr, axis):
        x, mean, var = operands()
        dims = ["time", "y", "x"]
        dims.insert(axis, "band")
        array = self.named(xr, np.ascontiguousarray(np.moveaxis(x, 1, axis)), dims)
        y = xr.apply_ufunc(
            numbabn.batch_norm_inference, array,
            *(xr.DataArray(a, dims="band") for a in (mean, var)),
            input_core_dims=self.CORE, output_core_dims=[["band"]], kwargs={"axis": -1},
            keep_attrs=True,
        ).transpose(*dims)  # fmt: skip
        assert y.attrs == array.attrs
        assert y.data.strides == array.data.strides
        close(y.data, array.data, mean, var, axis=axis)

    def test_training_gives_several_results(self, xr):
        x, weight, _ = operands()
        dims = ["time", "y", "x", "band"]

        def train(x, weight):
            return numbabn.batch_norm_forward(x, weight, axis=-1)[:3]

        y, mean, invstd = xr.apply_ufunc(
            train, self.named(xr, x, ["time", "band", "y", "x"]), xr.DataArray(weight, dims="band"),
            input_core_dims=[dims, ["band"]], output_core_dims=[dims, ["band"], ["band"]],
        )  # fmt: skip
        expected = reference.forward(x, weight)
        np.testing.assert_allclose(y.transpose("time", "band", "y", "x"), expected[0], atol=1e-5)
        assert mean.dims == invstd.dims == ("band",)
        np.testing.assert_allclose(mean, expected[1], rtol=1e-12)
        np.testing.assert_allclose(invstd, expected[2], rtol=1e-12)

    def test_in_chunks(self, xr):
        pytest.importorskip("dask")
        x, mean, var = operands()
        array = self.named(xr, x, ["time", "band", "y", "x"])
        y = xr.apply_ufunc(
            numbabn.batch_norm_inference, array.chunk(time=5, x=4),
            *(xr.DataArray(a, dims="band") for a in (mean, var)),
            input_core_dims=self.CORE, output_core_dims=[["band"]], kwargs={"axis": -1},
            dask="parallelized", output_dtypes=[x.dtype],
        ).transpose(*array.dims)  # fmt: skip
        assert y.chunks is not None
        close(y.compute().data, x, mean, var)
        stats = numbabn.population_stats(array.chunk(time=5, x=4).data)
        np.testing.assert_allclose(stats.mean, reference.statistics(x)[1], rtol=1e-12)

    def test_a_named_array_is_none(self, xr):
        x, mean, var = operands()
        array = self.named(xr, x, ["time", "band", "y", "x"])
        for call in (
            lambda: numbabn.batch_norm_inference(array, mean, var),
            lambda: numbabn.batch_stats(array),
            lambda: numbabn.population_stats(array),
            lambda: numbabn.BatchNorm(5)(array),
        ):
            with pytest.raises(TypeError, match=r"got DataArray, whose array xarray\.apply_ufunc"):
                call()
