"""In the order of streams, from one Python thread and from many."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import cases
import numpy as np
import on_device
import pytest

import numbabn

pytestmark = pytest.mark.gpu

THREADS = 8
ROUNDS = 20
# One block for each channel, several, rows, several of them.
SHAPES = [((6, 33, 14, 14), 1), ((20, 5, 65, 67), 1), ((4, 7, 7, 40), -1), ((33, 23, 29, 40), -1)]
CYCLES = 600_000_000  # some 0.3 seconds


@pytest.fixture
def torch():
    return on_device.Torch()


def operands(library, k):
    shape, axis = SHAPES[k % len(SHAPES)]
    x, dy = (cases.normal(shape, np.float32, seed=2 * k + i) for i in range(2))
    weight = cases.normal(shape[axis], np.float32, seed=k)
    return axis, library.put(x), library.put(dy), library.put(weight)


def step(axis, x, dy, weight, stream=None):
    """Training forward and backward, inference: everything they give."""
    C = x.shape[axis]
    running = [x.new_full((C,), value) for value in (0.0, 1.0)]
    options = {"axis": axis, "stream": stream}
    y, mean, invstd, mask = numbabn.batch_norm_forward(
        x, weight, None, *running, activation="relu", **options
    )
    gradients = numbabn.batch_norm_backward(dy, x, weight, mean, invstd, mask=mask, **options)
    z = numbabn.batch_norm_inference(x, *running, weight, **options)
    return [y, mean, invstd, mask, *gradients[:3], z, *running]


def check_same(torch, got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.torch.equal(ours, theirs)


@pytest.mark.parametrize("how", ["current", "named", "by its handle"])
@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_a_side_stream_does_not_wait_for_the_default_one(torch, case, how):
    """It is done while the default stream is still busy, and it is right."""
    library = torch.torch
    given = operands(torch, case)
    expected = step(*given)
    side = library.cuda.Stream()
    named = {"current": None, "named": side, "by its handle": side.cuda_stream}[how]
    current = library.cuda.stream(side) if how == "current" else nullcontext()
    library.cuda.synchronize()
    with library.cuda.stream(side):
        fresh = [a if isinstance(a, int) else a.clone() for a in given]
        step(*fresh)  # allocates what is kept for the stream
    side.synchronize()

    library.cuda._sleep(CYCLES)
    busy = library.cuda.Event()
    busy.record()
    with current:
        # Memory for running statistics is not the stream's own when the stream is only named.
        axis, x, dy, weight = fresh
        y, mean, invstd, mask = numbabn.batch_norm_forward(
            x, weight, axis=axis, activation="relu", stream=named
        )
        gradients = numbabn.batch_norm_backward(
            dy, x, weight, mean, invstd, axis=axis, mask=mask, stream=named
        )
    side.synchronize()
    assert not busy.query(), "the side stream waited for the default one"
    with library.cuda.stream(side):
        check_same(torch, [y, mean, invstd, mask, *gradients[:3]], expected[:7])
    library.cuda.synchronize()


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_comes_after_what_its_stream_is_busy_with(torch, case):
    library = torch.torch
    axis, x, dy, weight = operands(torch, case)
    expected = step(axis, x, dy, weight)
    library.cuda.synchronize()
    side = library.cuda.Stream()
    with library.cuda.stream(side):
        late = library.zeros_like(x)
        library.cuda._sleep(CYCLES)
        late.copy_(x)
        got = step(axis, late, dy, weight)
        late.zero_()
        check_same(torch, got, expected)


@pytest.mark.parametrize("streams", ["one stream", "streams of their own"])
def test_eight_threads_at_once(torch, streams):
    library = torch.torch
    given = [operands(torch, k) for k in range(THREADS)]
    expected = [step(*each) for each in given]
    library.cuda.synchronize()
    shared = library.cuda.Stream()
    barrier = threading.Barrier(THREADS)

    def work(k):
        stream = shared if streams == "one stream" else library.cuda.Stream()
        barrier.wait(timeout=60)
        with library.cuda.stream(stream):
            results = [step(*given[k]) for _ in range(ROUNDS)]
            for got in results:
                check_same(torch, got, expected[k])

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, k) for k in range(THREADS)]:
            done.result(timeout=120)


def test_a_thread_that_has_used_no_gpu_yet(torch):
    """It has no context of its own, and takes memory from what PyTorch keeps."""
    given = operands(torch, 0)
    expected = step(*given)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(step, *given).result(timeout=120)
    check_same(torch, got, expected)


def test_cupy_on_a_side_stream():
    cupy = on_device.CuPy()
    x = cases.normal((20, 5, 65, 67), np.float32)
    expected = cupy.get(numbabn.batch_norm(cupy.put(x), training=True))
    values = cupy.put(x)
    side = cupy.cupy.cuda.Stream(non_blocking=True)
    cupy.cupy.cuda.Device().synchronize()
    with side:
        given = cupy.cupy.zeros_like(values)
        given[...] = values
        y = numbabn.batch_norm(given, training=True)
        given.fill(0)
        got = cupy.get(y)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("case", range(len(SHAPES)))
@pytest.mark.parametrize("handle", [0, 1], ids=["as PyTorch has it", "legacy"])
def test_the_default_stream_may_be_named(torch, case, handle):
    """All of a call is on it, so that nothing overtakes what it does."""
    given = operands(torch, case)
    axis, x, _, weight = given
    expected = numbabn.batch_norm_forward(x, weight, axis=axis, activation="relu")
    torch.torch.cuda.synchronize()
    for _ in range(20):
        got = numbabn.batch_norm_forward(x, weight, axis=axis, activation="relu", stream=handle)
        check_same(torch, got, expected)
