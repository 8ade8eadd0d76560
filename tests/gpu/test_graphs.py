"""Calls captured into CUDA graphs, and replayed on other data: the bits of calls as they are."""

import cases
import numpy as np
import on_device
import pytest

import numbabn

pytestmark = pytest.mark.gpu

# One block for each channel, several; planes and rows.
SHAPES = {
    "planes": ((6, 33, 14, 14), 1),
    "planes, several blocks": ((20, 5, 65, 67), 1),
    "rows": ((4, 7, 7, 40), -1),
    "rows, several blocks": ((33, 23, 29, 40), -1),
}
every_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)


def operands(shape, axis, seed):
    """Give x, dy, residual, weight and running statistics."""
    wide = [cases.normal(shape, np.float32, seed=10 * seed + k) for k in range(3)]
    weight, mean = (cases.normal(shape[axis], np.float32, seed=10 * seed + k) for k in (3, 4))
    return [*wide, weight, mean, np.abs(mean) + 1]


def step(arrays, axis):
    """Training forward and backward, inference: everything they give."""
    x, dy, residual, weight, mean, var = arrays
    y, batch, invstd, mask = numbabn.batch_norm_forward(
        x, weight, None, mean, var, axis=axis, residual=residual, activation="relu"
    )
    gradients = numbabn.batch_norm_backward(
        dy, x, weight, batch, invstd, axis=axis, mask=mask, with_residual=True
    )
    z = numbabn.batch_norm_inference(x, mean, var, weight, axis=axis)
    return [y, batch, invstd, mask, *gradients, z, mean, var]


def expected_of(library, shape, axis, seeds):
    """What calls give that nobody captures, for each seed."""
    results = []
    for seed in seeds:
        given = [library.put(a) for a in operands(shape, axis, seed)]
        results.append([library.get(a) for a in step(given, axis)])
    return results


def check_same(library, got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(library.get(ours), theirs)


class OfTorch:
    def __init__(self):
        self.library = on_device.Torch()
        self.torch = self.library.torch

    def captured(self, work, *, warm=True):
        """As PyTorch's manual says: warmed up on one side stream, captured on another."""
        if warm:
            side = self.torch.cuda.Stream()
            side.wait_stream(self.torch.cuda.current_stream())
            with self.torch.cuda.stream(side):
                work()
            self.torch.cuda.current_stream().wait_stream(side)
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            results = work()
        return graph.replay, results

    def fill(self, target, values):
        target.copy_(self.library.put(values))


class OfCuPy:
    def __init__(self):
        self.library = on_device.CuPy()
        self.cupy = self.library.cupy
        self.stream = self.cupy.cuda.Stream(non_blocking=True)

    def captured(self, work, *, warm=True):
        """On the stream of the warm-up, whose results have gone back to CuPy's pool."""
        self.cupy.cuda.Device().synchronize()
        with self.stream:
            if warm:
                work()
            self.stream.begin_capture()
            try:
                results = work()
            finally:
                graph = self.stream.end_capture()

        def replay():
            self.cupy.cuda.Device().synchronize()
            graph.launch(self.stream)
            self.stream.synchronize()

        return replay, results

    def fill(self, target, values):
        target[...] = self.library.put(values)


@pytest.fixture(params=[OfTorch, OfCuPy], ids=["PyTorch", "CuPy"])
def graphs(request):
    return request.param()


@every_shape
def test_replayed_on_new_data(graphs, shape, axis):
    library = graphs.library
    expected = expected_of(library, shape, axis, range(1, 4))
    given = [library.put(a) for a in operands(shape, axis, 0)]
    replay, results = graphs.captured(lambda: step(given, axis))
    for seed in range(1, 4):
        for target, values in zip(given, operands(shape, axis, seed), strict=True):
            graphs.fill(target, values)
        replay()
        check_same(library, results, expected[seed - 1])


@every_shape
def test_calls_in_between_change_nothing(graphs, shape, axis):
    """Neither of the graph's shape, nor larger ones that outgrow what the stream has."""
    library = graphs.library
    (expected,) = expected_of(library, shape, axis, [1])
    given = [library.put(a) for a in operands(shape, axis, 1)]
    replay, results = graphs.captured(lambda: step(given, axis))
    larger = [library.put(a) for a in operands((70, 130, 33, 31), 1, 2)]
    with graphs.stream if isinstance(graphs, OfCuPy) else graphs.torch.cuda.stream(None):
        for _ in range(2):
            step(larger, 1)
        step([library.put(a) for a in operands(shape, axis, 3)], axis)
    for target, values in zip(given, operands(shape, axis, 1), strict=True):
        graphs.fill(target, values)
    replay()
    check_same(library, results, expected)


def test_two_graphs_of_pytorch_at_once():
    """Each has its memory, so that they may be replayed on streams of their own."""
    graphs = OfTorch()
    library, torch = graphs.library, graphs.torch
    shape, axis = SHAPES["planes, several blocks"]
    expected = expected_of(library, shape, axis, [1, 2])
    given = [[library.put(a) for a in operands(shape, axis, seed)] for seed in (1, 2)]
    captured = [graphs.captured(lambda each=each: step(each, axis)) for each in given]
    streams = [torch.cuda.Stream() for _ in captured]
    for each, seed in zip(given, (1, 2), strict=True):
        for target, values in zip(each[4:], operands(shape, axis, seed)[4:], strict=True):
            graphs.fill(target, values)
    torch.cuda.synchronize()
    for (replay, _), stream in zip(captured, streams, strict=True):
        with torch.cuda.stream(stream):
            replay()
    torch.cuda.synchronize()
    for (_, results), bits in zip(captured, expected, strict=True):
        check_same(library, results, bits)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_without_a_call_before(graphs, monkeypatch):
    from numbabn.cuda import launch

    monkeypatch.setattr(launch, "_kernels", {})
    library = graphs.library
    x, y = (library.put(cases.normal((20, 5, 65, 67), np.float32)) for _ in range(2))
    weight = library.put(np.ones(5, np.float32))
    with pytest.raises(RuntimeError, match=r"CUDA graph: expected .* by an earlier call, got none"):
        graphs.captured(lambda: numbabn.batch_norm_inference(x, weight, weight, out=y), warm=False)
    # Afterwards all is as before.
    expected = library.get(numbabn.batch_norm_inference(x, weight, weight))
    numbabn.batch_norm_inference(x, weight, weight, out=y)
    np.testing.assert_array_equal(library.get(y), expected)
