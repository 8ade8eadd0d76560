"""The transformer: scikit-learn's own checks, the float64 oracle, and ``StandardScaler``."""

import os
import pickle
import subprocess
import sys

import cases
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("sklearn")

from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import numbabn
from numbabn import reference
from numbabn.sklearn import BatchNormScaler

TOLERANCES = {"float16": cases.NARROW["float16"], **cases.TOLERANCES}
dtypes = pytest.mark.parametrize(("dtype", "ulp"), TOLERANCES.values(), ids=TOLERANCES)
# Options, and the shape that rows were flattened from, with its channels.
LAYOUTS = {
    "columns": ({}, (12,), 0),
    "channels first": ({"channels": 3}, (3, 2, 2), 0),
    "channels last": ({"channels": 3, "axis": -1}, (2, 2, 3), 2),
    "one channel": ({"channels": 1}, (1, 12), 0),
}
layouts = pytest.mark.parametrize(("options", "shape", "axis"), LAYOUTS.values(), ids=LAYOUTS)


def data(shape=(12,), dtype=np.float64, rows=50, seed=0, offset=3.0):
    return (2 * cases.normal((rows, *shape), seed=seed) + offset).astype(dtype)


def flat(x):
    return x.reshape(len(x), -1)


def error(got, expected):
    return np.abs(np.asarray(got, np.longdouble) - expected).max()


def test_scikit_learns_checks():
    """All of them, in a process that lets the one for array API inputs run; none may be skipped."""
    code = (
        "from sklearn.utils.estimator_checks import check_estimator\n"
        "from numbabn.sklearn import BatchNormScaler\n"
        "for options in ({}, dict(eps=1e-5, momentum=0.1), dict(channels=1), "
        "dict(channels=1, axis=-1), dict(correction=1)):\n"
        "    checks = check_estimator(BatchNormScaler(**options), on_skip=None)\n"
        "    assert len(checks) > 40\n"
        "    for check in checks: assert check['status'] == 'passed', check\n"
    )
    run_with_array_api(code)


def test_tensors_give_numpys_arrays():
    """Where scikit-learn would compute with them, too."""
    pytest.importorskip("torch")
    code = (
        "import numpy, sklearn, torch\n"
        "from numbabn.sklearn import BatchNormScaler\n"
        "X = torch.rand(20, 3)\n"
        "expected = BatchNormScaler().fit_transform(X)\n"
        "with sklearn.config_context(array_api_dispatch=True):\n"
        "    Z = BatchNormScaler().fit_transform(X)\n"
        "assert type(Z) is numpy.ndarray\n"
        "numpy.testing.assert_array_equal(Z, expected)\n"
    )
    run_with_array_api(code)


def run_with_array_api(code):
    """Run a program that may ask scikit-learn for it, which is settled when SciPy is imported."""
    environment = {**os.environ, "SCIPY_ARRAY_API": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


class TestAgainstTheOracle:
    @layouts
    @dtypes
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_transform_and_back(self, options, shape, axis, dtype, ulp, order):
        x = data(shape, dtype)
        X = np.asarray(flat(x), order=order)
        before = X.copy()
        scaler = BatchNormScaler(eps=1e-3, **options).fit(X)
        y, mean, invstd = reference.forward(x, eps=1e-3, axis=1 + axis)
        np.testing.assert_allclose(scaler.mean_, mean, rtol=1e-12)
        np.testing.assert_allclose(1 / scaler.scale_, invstd, rtol=1e-12)
        assert scaler.mean_.dtype == scaler.var_.dtype == np.float64
        Z = scaler.transform(X)
        assert (Z.dtype, Z.shape) == (X.dtype, X.shape)
        assert error(Z, flat(y)) < 8 * ulp
        back = scaler.inverse_transform(Z)
        assert (back.dtype, back.shape) == (X.dtype, X.shape)
        assert error(back, X.astype(np.longdouble)) < 32 * ulp
        np.testing.assert_array_equal(X, before)

    @layouts
    def test_a_layer_in_eval_mode(self, options, shape, axis):
        """Trained on the same batches, it does the same."""
        layer = numbabn.BatchNorm(shape[axis], axis=1 + axis, momentum=0.3, dtype=np.float64)
        scaler = BatchNormScaler(eps=1e-5, momentum=0.3, correction=1, **options)
        first = numbabn.batch_stats(data(shape), axis=1 + axis)
        layer.running_mean[:], layer.running_var[:] = first.mean, first.unbiased_var
        scaler.partial_fit(flat(data(shape)))
        for seed in range(1, 5):
            x = data(shape, seed=seed, offset=seed)
            layer(x)
            scaler.partial_fit(flat(x))
        np.testing.assert_allclose(scaler.mean_, layer.running_mean, rtol=1e-13)
        np.testing.assert_allclose(scaler.var_, layer.running_var, rtol=1e-13)
        x = data(shape, seed=9)
        np.testing.assert_allclose(scaler.transform(flat(x)), flat(layer.eval()(x)), atol=1e-13)
        assert scaler.n_samples_seen_ == 5 * 50


class TestBatches:
    @layouts
    @pytest.mark.parametrize("offset", [0, 1e6])
    def test_as_if_in_one(self, options, shape, axis, offset):
        x = data(shape, rows=60, offset=offset)
        whole = BatchNormScaler(**options).fit(flat(x))
        parts = BatchNormScaler(**options)
        for part in np.split(x, [1, 2, 30, 59]):
            parts.partial_fit(flat(part))
        assert parts.n_samples_seen_ == whole.n_samples_seen_ == 60
        count, mean, m2 = reference.statistics(x, axis=1 + axis)
        for scaler in (whole, parts):
            np.testing.assert_allclose(scaler.mean_, mean, rtol=1e-14, atol=1e-14)
            np.testing.assert_allclose(scaler.var_, m2 / count, rtol=1e-9 if offset else 1e-13)

    def test_a_batch_of_one_row(self):
        scaler = BatchNormScaler(correction=1).partial_fit(data()[:20])
        for start in (20, 21, 22):
            scaler.partial_fit(data()[start : start + 1])
        np.testing.assert_allclose(scaler.var_, data()[:23].var(axis=0, ddof=1), rtol=1e-13)

    def test_fit_forgets(self):
        scaler = BatchNormScaler().fit(data(seed=1)).partial_fit(data(seed=2))
        again = scaler.fit(data())
        np.testing.assert_array_equal(again.var_, BatchNormScaler().fit(data()).var_)
        assert again.n_samples_seen_ == 50

    def test_a_memmap(self, tmp_path):
        """Larger than what is looked at: whole in pieces, and whole at once, without a change."""
        path = tmp_path / "X.npy"
        shape = (40_000, 30)
        X = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        for start in range(0, len(X), 10_000):
            X[start : start + 10_000] = cases.normal((10_000, 30), seed=start, offset=start)
        X.flush()
        X = np.load(path, mmap_mode="r")
        parts = BatchNormScaler()
        for start in range(0, len(X), 7_000):
            parts.partial_fit(X[start : start + 7_000])
        _, mean, m2 = reference.statistics(X)
        for scaler in (parts, BatchNormScaler().fit(X)):
            np.testing.assert_allclose(scaler.mean_, mean, rtol=1e-12)
            np.testing.assert_allclose(scaler.var_, m2 / len(X), rtol=1e-12)
        Z = parts.transform(X)
        assert type(Z) is np.ndarray
        assert error(Z.mean(axis=0, dtype=np.float64), 0) < 1e-6

    def test_earlier_statistics_are_left_alone(self):
        """So that a copy of a fitted transformer stays as it is."""
        for momentum in (None, 0.1):
            scaler = BatchNormScaler(momentum=momentum).fit(data())
            mean, before = scaler.mean_, scaler.mean_.copy()
            scaler.partial_fit(data(seed=1))
            np.testing.assert_array_equal(mean, before)
            assert not np.array_equal(scaler.mean_, before)


class TestDTypes:
    def test_float32_near_its_smallest(self):
        """1 over their deviation is beyond float32."""
        X = np.ldexp(data().astype(np.float32), -130)
        scaler = BatchNormScaler().fit(X)
        Z = scaler.transform(X)
        assert Z.dtype == np.float32
        y, _, _ = reference.forward(X.astype(np.float64), eps=0)
        assert error(Z, y) < 1e-6
        np.testing.assert_array_equal(scaler.inverse_transform(Z), X)


class TestAgainstStandardScaler:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6])
    def test_at_least_as_exact(self, dtype, offset):
        X = (cases.normal((5000, 20)) + offset).astype(dtype)
        count, mean, m2 = reference.statistics(X)
        expected = (X.astype(np.longdouble) - mean) / np.sqrt(m2 / count)
        ours, theirs = (
            error(scaler.fit(X).transform(X), expected)
            for scaler in (BatchNormScaler(), StandardScaler())
        )
        one = np.finfo(dtype).eps * 4  # the largest deviations
        assert ours <= max(theirs, one)
        if dtype is np.float32:
            assert ours < one

    def test_alike_on_digits(self):
        """Whose constant columns are left as they are by both."""
        X = load_digits().data
        np.testing.assert_allclose(
            BatchNormScaler().fit_transform(X), StandardScaler().fit_transform(X), atol=1e-11
        )
        scaler = BatchNormScaler().fit(X)
        assert (scaler.scale_[scaler.var_ == 0] == 1).all()
        assert (scaler.var_ == 0).sum() == 3


class TestInPipelines:
    def test_search_over_its_parameters(self):
        X, y = load_digits(return_X_y=True)
        pipeline = make_pipeline(BatchNormScaler(), RidgeClassifier())
        grid = {"batchnormscaler__channels": [None, 1], "batchnormscaler__eps": [0.0, 1e-2]}
        search = GridSearchCV(pipeline, grid, cv=2).fit(X[:600], y[:600])
        assert search.score(X[600:], y[600:]) > 0.8

    def test_pandas_in_and_out(self):
        pd = pytest.importorskip("pandas")
        frame = pd.DataFrame(data(dtype=np.float32), columns=[f"c{i}" for i in range(12)])
        scaler = BatchNormScaler().set_output(transform="pandas").fit(frame)
        Z = scaler.transform(frame)
        assert list(Z.columns) == list(scaler.get_feature_names_out()) == list(frame.columns)
        assert list(scaler.feature_names_in_) == list(frame.columns)
        assert (Z.dtypes == np.float32).all()
        assert error(scaler.inverse_transform(Z), frame.to_numpy(np.longdouble)) < 1e-5
        with pytest.raises(ValueError, match="feature names should match"):
            scaler.transform(frame.rename(columns={"c0": "other"}))

    def test_clone_and_pickle(self):
        scaler = BatchNormScaler(eps=0.1, channels=4, axis=-1).fit(data())
        twin = pickle.loads(pickle.dumps(scaler))
        np.testing.assert_array_equal(twin.transform(data()), scaler.transform(data()))
        twin.partial_fit(data(seed=1))
        assert twin.n_samples_seen_ == 2 * scaler.n_samples_seen_
        fresh = clone(scaler)
        assert fresh.get_params() == scaler.get_params()
        with pytest.raises(NotFittedError):
            fresh.transform(data())

    def test_other_numbers_become_float64(self):
        X = np.arange(12).reshape(4, 3)
        assert BatchNormScaler().fit_transform(X).dtype == np.float64
        assert BatchNormScaler().fit(X).transform(X.astype(np.float32)).dtype == np.float32
        wide = BatchNormScaler().fit_transform(X.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_allclose(wide, BatchNormScaler().fit_transform(X), atol=1e-6)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"eps": -1}, ValueError, "eps: expected 0 or more, got -1"),
            ({"eps": None}, TypeError, "eps: expected a real number, got NoneType"),
            ({"momentum": "0.1"}, TypeError, "momentum: expected a real number, got str"),
            ({"correction": 50}, ValueError, "correction: expected less than the 50 values"),
            ({"channels": 5}, ValueError, "channels: expected a divisor of the 12 columns of X, g"),
            ({"channels": 0}, ValueError, "channels: expected 1 or more, got 0"),
            ({"channels": 2.0}, TypeError, "channels: expected an integer, got float"),
            ({"channels": 3, "axis": 2}, ValueError, "axis: expected 1 or -1, got 2"),
        ],
    )
    def test_parameters(self, options, error, message):
        with pytest.raises(error, match=message):
            BatchNormScaler(**options).fit(data())

    def test_sparse(self):
        for X in (sparse.csr_matrix(data()), sparse.csr_array(data())):
            with pytest.raises(TypeError, match="Sparse data was passed"):
                BatchNormScaler().fit(X)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, value):
        X = data()
        scaler = BatchNormScaler().fit(X)
        X[3, 4] = value
        for method in (scaler.fit, scaler.partial_fit, scaler.transform, scaler.inverse_transform):
            with pytest.raises(ValueError, match=r"Input X contains (NaN|infinity)"):
                method(X)
        assert scaler.n_samples_seen_ == 50

    def test_other_channels_than_were_fitted(self):
        for options, channels in (({}, 4), ({"channels": 4}, 3), ({"channels": 4}, None)):
            scaler = BatchNormScaler(**options).fit(data()).set_params(channels=channels)
            for method in (scaler.partial_fit, scaler.transform, scaler.inverse_transform):
                with pytest.raises(
                    ValueError, match=r"^channels: expected \d+, .* statistics, got"
                ):
                    method(data())

    def test_a_failing_fit_changes_nothing(self):
        scaler = BatchNormScaler(channels=3).fit(data())
        before = pickle.dumps(scaler)
        with pytest.raises(ValueError, match="channels: expected a divisor of the 11 columns"):
            scaler.fit(data((11,)))
        assert pickle.dumps(scaler) == before

    def test_a_failing_batch_changes_nothing(self):
        scaler = BatchNormScaler().fit(data())
        before = pickle.dumps(scaler)
        for X in (data((11,)), np.full((2, 12), np.nan), sparse.csr_array(data())):
            with pytest.raises((ValueError, TypeError)):
                scaler.partial_fit(X)
        assert pickle.dumps(scaler) == before
