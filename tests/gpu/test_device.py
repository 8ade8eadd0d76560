"""Kernels of a caller's own on a GPU, by `numbabn.cuda.device`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from numbabn import reference

# Numba warns of grids that leave most of a GPU idle.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Grid size")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "cuda_epilogue.py"
EPS = 1e-5


@pytest.fixture(scope="module")
def normalize():
    """Give what normalizes ``x [C, M]`` by a block of so many threads for each channel."""
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("Numba sees no GPU")
    from numbabn.cuda import device as bn

    @cuda.jit
    def kernel(x, weight, bias, eps, y, mean, var):
        c, step = cuda.blockIdx.x, 4 * cuda.blockDim.x
        moments = bn.no_moments()
        for i in range(4 * cuda.threadIdx.x, x.shape[1], step):
            moments = bn.add4(moments, bn.load4(x[c], i), x.shape[1] - i)
        stats = bn.block_stats(moments)
        constants = bn.affine(stats.mean, stats.m2 / stats.count, weight[c], bias[c], eps)
        for i in range(4 * cuda.threadIdx.x, x.shape[1], step):
            bn.store4(y[c], i, bn.normalize4(bn.load4(x[c], i), constants))
        if cuda.threadIdx.x == 0:
            mean[c], var[c] = stats.mean, stats.m2 / stats.count

    def run(x, weight, bias, threads):
        y = cuda.to_device(np.full(x.shape, np.nan, np.float32))
        mean, var = (cuda.device_array(len(x), np.float64) for _ in range(2))
        inputs = map(cuda.to_device, (x, weight, bias))
        kernel[len(x), threads](*inputs, EPS, y, mean, var)
        return [each.copy_to_host() for each in (y, mean, var)]

    return run


@pytest.mark.parametrize("threads", [32, 256, 1024])
@pytest.mark.parametrize("offset", [0, 1e6])
@pytest.mark.parametrize("size", [1, 63, 1000, 4096, 1_000_003])
def test_the_oracle_agrees(normalize, size, offset, threads):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, size)) + offset).astype(np.float32)
    weight, bias = np.float32([1, 0.5, 2]), np.float32([0, 1, -1])
    y, mean, var = normalize(x, weight, bias, threads)
    _, true_mean, true_m2 = reference.statistics(x, axis=0)
    expected, _, _ = reference.forward(x, weight, bias, eps=EPS, axis=0)
    np.testing.assert_allclose(mean, true_mean, rtol=0, atol=2e-7)
    np.testing.assert_allclose(var, true_m2 / size, rtol=2e-7)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [np.inf, -np.inf]])
def test_what_is_not_finite_stays_in_its_channel(normalize, values):
    x = np.random.default_rng(0).standard_normal((3, 5000)).astype(np.float32)
    x[1, 2000 : 2000 + len(values)] = values
    y, mean, var = normalize(x, np.ones(3, np.float32), np.zeros(3, np.float32), 128)
    _, true_mean, true_m2 = reference.statistics(x, axis=0)
    np.testing.assert_allclose(mean, true_mean, rtol=0, atol=2e-7)
    np.testing.assert_allclose(var, true_m2 / 5000, rtol=2e-7)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_the_example(normalize):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, check=True, text=True
    )
    assert "agrees with float64" in done.stdout
