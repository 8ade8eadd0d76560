"""Memory for results: reused when they are gone, and never before."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading

import cases
import ml_dtypes
import numpy as np
import pytest

import numbabn
from numbabn import cpu
from numbabn.results import LINE, SMALLEST, Pool

LIMIT = 16 * SMALLEST
SHAPE = (8, 16, 32, 33)  # large in every dtype


@pytest.fixture
def pool():
    return Pool(LIMIT)


def large(nbytes=SMALLEST):
    return np.zeros(nbytes, np.uint8)


def address(array):
    return array.ctypes.data


def run(code, **environment):
    """Run a program that says nothing at all if all is well."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@cases.memory
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_like_numpy(pool, dtype, lay):
    x = lay(np.zeros(SHAPE, dtype))
    expected = np.empty_like(x, subok=False)
    for _ in range(2):  # in new memory, then in used
        y = pool.empty_like(x)
        assert type(y) is np.ndarray
        assert (y.shape, y.dtype, y.strides) == (expected.shape, expected.dtype, expected.strides)
        assert y.flags.writeable
        assert y.flags.aligned
        assert address(y) % LINE == 0
        y[...] = 1
        del y
    assert pool.kept == x.nbytes


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 5), (3, 4)])
def test_small_arrays_are_plain(pool, shape):
    y = pool.empty_like(np.zeros(shape))
    assert y.shape == shape
    assert y.flags.owndata


def test_a_subclass_gives_an_array(pool):
    class Special(np.ndarray):
        pass

    for x in (np.zeros(3), large()):
        assert type(pool.empty_like(x.view(Special))) is np.ndarray


def test_memory_is_reused(pool):
    y = pool.empty_like(large())
    at = address(y)
    del y
    assert pool.kept == SMALLEST
    y = pool.empty_like(large())
    assert (address(y), pool.kept) == (at, 0)


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y[5:],
        lambda y: y.reshape(2, -1)[1].view(np.uint16)[::3],
        lambda y: np.asarray(memoryview(y)[7:]),
        np.ndarray.__dlpack__,
        iter,
    ],
    ids=["slice", "view of a view", "memoryview", "DLPack", "iterator"],
)
def test_memory_is_not_reused_while_it_is_viewed(pool, view):
    y = pool.empty_like(large())
    kept = view(y)
    del y
    assert pool.kept == 0
    del kept
    assert pool.kept == SMALLEST


def test_live_results_share_no_memory(pool):
    live = []
    for i in range(40):
        live.append(pool.empty_like(large(SMALLEST + i)))
        if i % 3 == 0:
            del live[i // 3]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(live) for b in live[:i])


def test_garbage_in_cycles_comes_back(pool):
    cycle = [pool.empty_like(large())]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.kept == SMALLEST


def test_the_oldest_memory_goes_first(pool):
    sizes = [LIMIT // 2, LIMIT // 4, LIMIT // 2 + 1]
    live = [pool.empty_like(large(size)) for size in sizes]
    while live:
        del live[0]
        assert pool.kept <= LIMIT
    assert pool.kept == sizes[1] + sizes[2]


def test_the_waste_is_bounded(pool):
    pool.empty_like(large(2 * SMALLEST))  # and gone
    small = pool.empty_like(large(3 * SMALLEST // 2))
    assert pool.kept == 2 * SMALLEST
    near = pool.empty_like(large(2 * SMALLEST - 999))
    assert pool.kept == 0
    del small, near
    assert pool.kept == 3 * SMALLEST // 2 + 2 * SMALLEST


def test_larger_than_the_limit_is_plain(pool):
    assert pool.empty_like(large(LIMIT + 1)).flags.owndata
    assert pool.empty_like(large(LIMIT)).base is not None
    assert pool.kept == LIMIT
    assert Pool(0).empty_like(large()).flags.owndata


@pytest.mark.parametrize(("limit", "plain"), [("0", True), (str(LIMIT), False), (None, False)])
def test_the_environment_sets_the_limit(limit, plain):
    run(
        "import numpy as np\n"
        "from numbabn import results\n"
        f"y = results.empty_like(np.zeros({SMALLEST}, np.uint8))\n"
        f"assert y.flags.owndata is {plain}\n",
        **({} if limit is None else {"NUMBABN_POOL_BYTES": limit}),
    )


def test_results_are_ordinary_arrays(pool):
    y = pool.empty_like(large())
    y[:] = np.arange(SMALLEST, dtype=np.uint8)
    for twin in (y.copy(), copy.copy(y), copy.deepcopy(y), pickle.loads(pickle.dumps(y, 5))):
        np.testing.assert_array_equal(twin, y)
        assert not np.shares_memory(twin, y)
    assert np.resize(y, 2 * SMALLEST).size == 2 * SMALLEST


def test_a_busy_pool_is_done_without(pool):
    """As in a child that was forked while another thread was in the pool."""
    first = pool.empty_like(large())
    pool._visits.add("another's")
    second = pool.empty_like(large())
    assert not np.shares_memory(first, second)
    del second
    assert pool.kept == 0
    pool._visits.clear()
    del first
    assert pool.kept == SMALLEST


def test_threads_get_memory_of_their_own(pool):
    wrong = []

    def work(number):
        for i in range(300):
            y = pool.empty_like(large(SMALLEST + 64 * (i % 3)))
            y[:: 1 << 12] = number
            z = pool.empty_like(y)
            z[:: 1 << 12] = number + 100
            if (y[:: 1 << 12] != number).any() or (z[:: 1 << 12] != number + 100).any():
                wrong.append(number)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not wrong
    assert 0 < pool.kept == sum(block.nbytes for block in pool._blocks) <= LIMIT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_memory_of_its_own():
    run(
        "import os, warnings\n"
        "import numpy as np\n"
        "from numbabn import results\n"
        "warnings.simplefilter('ignore', DeprecationWarning)  # of forking beside threads\n"
        f"x = np.zeros({SMALLEST}, np.uint8)\n"
        "live, gone = results.empty_like(x), results.empty_like(x)\n"
        "live[:] = 1\n"
        "del gone\n"
        "child = os.fork()\n"
        "y = results.empty_like(x)\n"
        "y[:] = 2 if child else 3\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    assert (live == 1).all() and (y == 2).all()\n"
        "else:\n"
        "    live[:] = 4\n"
        "    del live, y\n"
        "    assert results.empty_like(x).size == x.size\n"
    )


def test_results_outlive_the_program_in_silence():
    run(
        "import sys, threading, time\n"
        "import numpy as np\n"
        "from numbabn import results\n"
        f"x = np.zeros({SMALLEST}, np.uint8)\n"
        "y = results.empty_like(x)\n"
        "np.kept_to_the_end = sys.kept_to_the_end = results.empty_like(x)\n"
        "class Late:\n"
        "    def __init__(self): self.me, self.y = self, results.empty_like(x)\n"
        "    def __del__(self): self.z = self.y[1:]\n"
        "late = Late()\n"
        "def forever():\n"
        "    while True: z = results.empty_like(x)\n"
        "threading.Thread(target=forever, daemon=True).start()\n"
        "time.sleep(0.05)\n"
    )


@pytest.mark.parametrize("activation", [None, "relu"])
def test_every_fresh_result_comes_from_the_pool(pool, monkeypatch, activation):
    monkeypatch.setattr(cpu, "empty_like", pool.empty_like)
    x = cases.normal((16, 64, 12, 12), np.float32)
    C = np.ones(64, np.float32)

    y, mean, invstd, mask = numbabn.batch_norm_forward(x, activation=activation)
    gradients = numbabn.batch_norm_backward(y, x, C, mean, invstd, mask=mask, with_residual=True)
    z = numbabn.batch_norm(x, C, C, residual=x, activation=activation)
    assert pool.kept == 0
    expected = [array.copy() for array in (y, gradients.dx, gradients.dresidual, z)]
    del y, gradients, z
    assert pool.kept == 4 * x.nbytes

    y = numbabn.batch_norm_forward(x, activation=activation).y
    gradients = numbabn.batch_norm_backward(y, x, C, mean, invstd, mask=mask, with_residual=True)
    z = numbabn.batch_norm(x, C, C, residual=x, activation=activation)
    assert pool.kept == 0
    for got, first in zip((y, gradients.dx, gradients.dresidual, z), expected, strict=True):
        np.testing.assert_array_equal(got, first)
    out = np.empty_like(x)
    numbabn.batch_norm(x, C, C, out=out)
    assert out.flags.owndata
