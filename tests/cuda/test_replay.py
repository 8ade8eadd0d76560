"""Calls made again launch what calls made anew launch, and are refused where those are.

The library is the test's own, its arrays are memory of the host, and the driver does nothing but
remember what it was asked to launch.
"""

import ctypes
import gc
import os
import struct
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("numba simulates a GPU", allow_module_level=True)
pytest.importorskip("cuda.core", reason="numba-cuda is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from cuda.bindings import driver as real
from double_driver import Driver

import numbabn
from numbabn import backends, cuda
from numbabn.cuda import adapters, arrays, compilation, driver, launch, replay, workspace
from numbabn.libraries import DeviceArray, form_of

STREAM = 7


class Launch(NamedTuple):
    variant: str
    blocks: int
    shared: int
    stream: int
    together: bool
    numbers: list


class Recorder(Driver):
    """Knows each kernel, and so how many numbers it takes."""

    def __init__(self):
        super().__init__()
        self.variants = []

    def cuLaunchKernelEx(self, config, function, pointers, extra):  # noqa: N802
        variant = self.variants[int(function) - 1]
        codes = compilation.codes(variant)
        addresses = (ctypes.c_void_p * len(codes)).from_address(pointers)
        numbers = [
            struct.unpack(code, ctypes.string_at(address, 8))[0]
            for code, address in zip(codes, addresses, strict=True)
        ]
        self.launches.append(
            Launch(
                str(variant), config.gridDimX, config.sharedMemBytes, int(config.hStream),
                config.numAttrs == 1, numbers,
            )
        )  # fmt: skip
        return (self.error,)


class ndarray:  # noqa: N801
    """An array of a library that numbabn takes for CuPy."""

    __module__ = "cupy.double"

    def __init__(self, values, device=0):
        self.values = values
        self.place = device

    @property
    def shape(self):
        return self.values.shape

    def __getitem__(self, index):
        return ndarray(self.values[index], self.place)


class Library(adapters.Library):
    name = "double"

    def __init__(self):
        self.current = STREAM
        self.allocated = []

    def device(self, array):
        return array.place

    def stream(self, array):
        return self.current

    def view(self, name, array, place):
        values = array.values
        form = form_of(values.shape, values.strides, values.dtype)
        return DeviceArray(array, place, self.address(array), form, values.flags.writeable)

    def is_beside(self, array, place):
        return type(array) is ndarray and array.place == place.device

    def empty(self, form, place):
        memory = np.full(form.nbytes + 64, 0xFF, np.uint8)
        start = -memory.ctypes.data % 64
        array = ndarray(np.ndarray(form.shape, form.dtype, memory, start, form.strides))
        self.allocated.append(self.address(array))
        return array

    def address(self, array):
        return array.values.__array_interface__["data"][0]

    def clear(self, array):
        array.owner.values.fill(0)

    def copy(self, target, source):
        target.owner.values[...] = source.owner.values

    def upload(self, values, place):
        return ndarray(values)

    def download(self, array):
        return array.owner.values.copy()


class World:
    """What the tests look at."""

    def __init__(self, recorder, library):
        self.driver = recorder
        self.library = library
        self.anew = 0  # calls that went the ordinary way

    def launched(self, call):
        """Give what a call launches, what it allocates, and whether it was made again."""
        begin, made, anew = len(self.driver.launches), len(self.library.allocated), self.anew
        self.results = call()
        self.made = self.library.allocated[made:]
        return self.driver.launches[begin:], self.made, self.anew == anew


@pytest.fixture
def world(monkeypatch):
    recorder = Recorder()

    class Kernel(launch._Kernel):
        def __init__(self, variant, ordinal):
            recorder.variants.append(variant)
            self.function = real.CUfunction(len(recorder.variants))
            self.pack = struct.Struct(compilation.codes(variant)).pack_into
            self.shared = self._most_shared = 200 << 10

    for module in (driver, launch):
        monkeypatch.setattr(module, "driver", recorder)
    monkeypatch.setattr(launch, "_Kernel", Kernel)
    monkeypatch.setattr(launch, "_kernels", {})
    properties = SimpleNamespace(multiprocessor_count=40, l2_cache_size=1 << 16)
    monkeypatch.setattr(launch, "Device", lambda ordinal: SimpleNamespace(properties=properties))
    monkeypatch.setattr(backends, "cuda_backend", lambda: cuda)
    monkeypatch.setitem(adapters._LIBRARIES, "cupy", Library)
    monkeypatch.setattr(replay, "_replays", {})
    caches = driver._primary, launch._capacity, launch._l2_bytes, adapters.library
    for cache in (*caches, workspace._workspace):
        cache.cache_clear()
    world = World(recorder, adapters.library("cupy"))
    borrow = replay.borrow

    def counted(*arguments):
        world.anew += 1
        return borrow(*arguments)

    monkeypatch.setattr(replay, "borrow", counted)
    yield world
    for cache in (*caches, workspace._workspace):
        cache.cache_clear()


SHAPES = {
    "planes, one block": ((6, 33, 14, 14), 1),
    "planes, held by several": ((20, 5, 65, 67), 1),
    "planes, two sweeps": ((128, 2, 224, 224), 1),
    "rows, several blocks": ((9, 23, 29, 40), -1),
    "rows, two sweeps": ((300_000, 24), 1),
}
every_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)


def put(values):
    """Copy to memory that begins at a multiple of 64 bytes."""
    memory = np.empty(values.nbytes + 64, np.uint8)
    array = np.ndarray(values.shape, values.dtype, memory, -memory.ctypes.data % 64)
    array[...] = values
    return ndarray(array)


def operands(shape, axis, dtype=np.float32):
    """Give fresh arrays under their names."""
    C = shape[axis]
    wide = {name: put(np.empty(shape, dtype)) for name in ("x", "dy", "residual", "out")}
    names = ("weight", "bias", "running_mean", "running_var")
    thin = {name: put(np.empty(C, np.float32)) for name in names}
    saved = {name: put(np.empty(C)) for name in ("mean", "invstd")}
    mask = put(np.empty(-(-wide["x"].values.size // 8), np.uint8))
    return SimpleNamespace(**wide, **thin, **saved, mask=mask, axis=axis)


def running(a):
    return {"running_mean": a.running_mean, "running_var": a.running_var}


CALLS = {
    "training": lambda a: numbabn.batch_norm(
        a.x, a.running_mean, a.running_var, a.weight, a.bias, True, axis=a.axis, out=a.out
    ),
    "training in place": lambda a: numbabn.batch_norm(
        a.x, a.running_mean, a.running_var, training=True, axis=a.axis, out=a.x
    ),
    "training in place of the residual": lambda a: numbabn.batch_norm(
        a.x, training=True, residual=a.residual, axis=a.axis, out=a.residual
    ),
    "training, no statistics": lambda a: numbabn.batch_norm(a.x, training=True, axis=a.axis),
    "forward": lambda a: numbabn.batch_norm_forward(
        a.x, a.weight, a.bias, **running(a), axis=a.axis, residual=a.residual, activation="relu"
    ),
    "inference": lambda a: numbabn.batch_norm_inference(
        a.x, a.running_mean, a.running_var, None, a.bias, axis=a.axis, activation="relu"
    ),
    "inference, one array twice": lambda a: numbabn.batch_norm_inference(
        a.x, a.running_mean, a.running_var, a.bias, a.bias, axis=a.axis, residual=a.x
    ),
    "backward": lambda a: numbabn.batch_norm_backward(
        a.dy, a.x, a.weight, a.mean, a.invstd, axis=a.axis, mask=a.mask, with_residual=True
    ),
    "backward in place": lambda a: numbabn.batch_norm_backward(
        a.dy, a.x, None, a.mean, a.invstd, axis=a.axis, training=False, out=a.dy
    ),
    "statistics": lambda a: numbabn.batch_stats(a.x, axis=a.axis),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def by_name(launches, made, a):
    """Put names in the place of addresses that differ from call to call."""
    names = {each.values.ctypes.data: name for name, each in vars(a).items() if name != "axis"}
    names |= {address: f"made {k}" for k, address in enumerate(made)}
    return [
        each._replace(numbers=[names.get(n, n) for n in each.numbers]) for each in launches
    ]  # fmt: skip


def flat(results):
    if isinstance(results, numbabn.BatchStats):
        results = results.count, results.mean, results.m2
    return results if isinstance(results, tuple) else (results,)


def described(result, a):
    """What can be told of a result but its numbers."""
    if not isinstance(result, ndarray):
        return result
    names = [name for name, each in vars(a).items() if each is result]
    return names or (result.values.shape, result.values.strides, result.values.dtype)


@every_call
@every_shape
def test_launches_what_a_call_made_anew_launches(world, call, shape, axis):
    first, second = operands(shape, axis), operands(shape, axis)
    _, _, again = world.launched(lambda: call(first))
    assert not again
    launches, made, again = world.launched(lambda: call(second))
    assert again
    results = flat(world.results)
    replay._replays.clear()
    expected, made_anew, again = world.launched(lambda: call(second))
    assert not again
    assert expected
    assert len(made) == len(made_anew)
    assert by_name(launches, made, second) == by_name(expected, made_anew, second)
    assert [described(each, second) for each in results] == [
        described(each, second) for each in flat(world.results)
    ]
    named = {name for each in by_name(launches, made, second) for name in each.numbers}
    assert {"x", "dy"} & named
    addresses = {each.values.ctypes.data for name, each in vars(first).items() if name != "axis"}
    assert not addresses & {number for each in launches for number in each.numbers}


def test_the_shapes_take_every_variant(world):
    found = {}
    for name, (shape, axis) in SHAPES.items():
        launches, _, _ = world.launched(lambda: CALLS["training"](operands(shape, axis)))  # noqa: B023
        found[name] = [each.variant.partition(" float32")[0] for each in launches]
    assert found["planes, one block"] == found["planes, held by several"] == ["forward planes"]
    assert found["rows, several blocks"] == ["forward rows"]
    for view in ("planes", "rows"):
        sweeps = [f"statistics {view}", "statistics channels", f"normalize {view}"]
        assert found[f"{view}, two sweeps"] == sweeps


def test_settings_streams_and_presence_are_told_apart(world):
    a = operands((6, 33, 14, 14), 1)
    calls = [
        lambda: numbabn.batch_norm(a.x, a.running_mean, a.running_var, training=True),
        lambda: numbabn.batch_norm(a.x, a.running_mean, a.running_var, training=True, eps=1.0),
        lambda: numbabn.batch_norm(a.x, a.running_mean, a.running_var, training=True, momentum=1),
        lambda: numbabn.batch_norm(a.x, a.running_mean, a.running_var, training=True, momentum=1.0),
        lambda: numbabn.batch_norm(a.x, a.running_mean, None, training=True),
        lambda: numbabn.batch_norm(a.x, None, a.running_var, training=True),
        lambda: numbabn.batch_norm(a.x, training=True, activation="relu"),
        lambda: numbabn.batch_norm(a.x, training=True, stream=STREAM),
        lambda: numbabn.batch_norm(a.x, training=True, stream=STREAM + 1),
        lambda: numbabn.batch_norm(a.x, a.running_mean, a.running_var),
    ]
    kinds = []
    for call in calls:
        launches, _, again = world.launched(call)
        assert not again
        kinds.append([(each.numbers, each.stream) for each in launches])
        assert world.launched(call)[2]
    assert all(kinds.count(kind) == 1 for kind in kinds)
    world.library.current = STREAM + 2
    launches, _, again = world.launched(calls[0])
    assert not again
    assert launches[0].stream == STREAM + 2


def shifted(array, nbytes):
    """Give a copy so many bytes behind an aligned address."""
    values = array.values
    memory = np.empty(values.nbytes + 64 + nbytes, np.uint8)
    start = -memory.ctypes.data % 64 + nbytes
    return ndarray(np.ndarray(values.shape, values.dtype, memory, start))


def read_only(array):
    values = array.values.view()
    values.flags.writeable = False
    return ndarray(values)


ERRORS = {
    "overlap of out": ("out", lambda a: ndarray(a.memory[1:]), ValueError, "overlap with x"),
    "out over running_mean": (
        "running_mean",
        lambda a: ndarray(a.out.values.reshape(-1)[:33]),
        ValueError,
        "out: expected memory of its own, got an overlap with running_mean",
    ),
    "running arrays are one": (
        "running_var",
        lambda a: a.running_mean,
        ValueError,
        "running_mean: .*overlap with running_var",
    ),
    "running_mean is weight": ("weight", lambda a: a.running_mean, ValueError, "with weight"),
    "running arrays overlap": (
        "running_var",
        lambda a: ndarray(a.both[4:37]),
        ValueError,
        "overlap with running_var",
    ),
    "read-only out": ("out", lambda a: read_only(a.out), ValueError, "out: .*read-only"),
    "read-only": ("running_var", lambda a: read_only(a.running_var), ValueError, "read-only"),
    "off its alignment": (
        "running_mean",
        lambda a: shifted(a.running_mean, 2),
        ValueError,
        "running_mean: expected an address and strides that are multiples",
    ),
    "another device": (
        "bias",
        lambda a: ndarray(a.bias.values, 1),
        ValueError,
        "bias: .*got one on CUDA device 1",
    ),
    "another library": ("bias", lambda a: a.bias.values, TypeError, "bias: .*got ndarray"),
    "no array": ("bias", lambda a: "bias", TypeError, "bias: .*got str"),
    "dtype": ("weight", lambda a: put(np.empty(33)), TypeError, "weight: expected float32"),
    "shape": ("weight", lambda a: put(np.empty(32, np.float32)), ValueError, "weight: "),
    "not there": ("x", lambda a: None, TypeError, "x: expected an array on the CPU or a CUDA"),
    "momentum": ("momentum", lambda a: True, TypeError, "momentum: expected a real number"),
    "eps": ("eps", lambda a: -1e-5, ValueError, "eps: "),
    "axis": ("axis", lambda a: 4, ValueError, "axis: "),
    "stream": ("stream", lambda a: 7.0, TypeError, "stream: "),
}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), ERRORS.values(), ids=ERRORS
)  # fmt: skip
def test_refuses_what_a_call_made_anew_refuses(world, name, value, error, message):
    shape = 6, 33, 14, 14
    a = operands(shape, 1)
    a.memory = put(np.empty((7, *shape[1:]), np.float32)).values
    a.x = ndarray(a.memory[:6])
    a.both = put(np.empty(40, np.float32)).values
    a.running_mean = ndarray(a.both[:33])
    names = "x", "running_mean", "running_var", "weight", "bias", "out"
    given = {each: getattr(a, each) for each in names} | {"momentum": 0.1, "eps": 1e-5, "axis": 1}

    def call():
        return numbabn.batch_norm(**given, training=True)

    call()
    assert world.launched(call)[2]
    given[name] = value(a)
    for _ in range(2):
        before = len(world.driver.launches)
        with pytest.raises(error, match=message):
            call()
        assert len(world.driver.launches) == before
    given[name] = getattr(a, name, {"momentum": 0.1, "eps": 1e-5, "axis": 1}.get(name))
    assert world.launched(call)[2]


def test_in_place_is_a_kind_of_its_own(world):
    memory = put(np.empty((8, 33, 14, 14), np.float32)).values
    x, behind, apart = (ndarray(memory[k : k + 4]) for k in (0, 2, 4))
    call = lambda out: numbabn.batch_norm(x, training=True, out=out)  # noqa: E731
    agains = [world.launched(lambda: call(out))[2] for out in (x, x, apart, apart, x)]  # noqa: B023
    assert agains == [False, True, False, True, True]
    before = len(world.driver.launches)
    with pytest.raises(ValueError, match="out: expected memory of its own, got an overlap with x"):
        call(behind)
    assert len(world.driver.launches) == before


def test_an_error_of_the_driver_is_named(world):
    a = operands((6, 33, 14, 14), 1)
    CALLS["training"](a)
    world.driver.error = real.CUresult.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(RuntimeError, match=r"launch of forward_planes: .*CUDA_ERROR_LAUNCH_FAILED"):
        CALLS["training"](a)
    assert world.anew == 1


ANEW = {
    "steps backwards": lambda a, world: numbabn.batch_stats(ndarray(a.x.values[:, ::-1])),
    "a copy": lambda a, world: numbabn.batch_stats(ndarray(a.x.values[::2, :, ::3, ::2])),
    "an empty batch": lambda a, world: numbabn.batch_norm(ndarray(a.x.values[:0]), training=True),
    "nothing to do": lambda a, world: numbabn.batch_norm(
        ndarray(a.x.values[:0]), a.running_mean, a.running_var
    ),
    "dy copied": lambda a, world: numbabn.batch_norm_backward(
        a.dy, a.x, None, a.mean, a.invstd, with_residual=True
    ),
    "a number of NumPy's": lambda a, world: numbabn.batch_norm(
        a.x, training=True, eps=np.float64(1)
    ),
    "a stream that each thread has": lambda a, world: numbabn.batch_stats(a.x, stream=2),
    "overlapping inputs": lambda a, world: numbabn.batch_norm(
        a.x, a.running_mean, a.running_var, ndarray(a.x.values.reshape(-1)[:33])
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", ANEW.values(), ids=ANEW)
def test_what_is_made_anew_each_time(world, call):
    a = operands((6, 33, 14, 14), 1)
    for _ in range(3):
        assert not world.launched(lambda: call(a, world))[2]


def test_in_a_graph_that_is_captured(world):
    a = operands((6, 33, 14, 14), 1)
    call = lambda: CALLS["training"](a)  # noqa: E731
    call()
    world.driver.capturing = {STREAM}
    assert not world.launched(call)[2]
    world.driver.capturing = set()
    assert world.launched(call)[2]


def test_the_workspace_may_have_grown(world):
    small, large = operands((20, 5, 65, 67), 1), operands((64, 6, 112, 112), 1)
    before, _, _ = world.launched(lambda: CALLS["training"](small))
    old = workspace.workspace_of(0, STREAM).addresses
    CALLS["training"](large)
    new = workspace.workspace_of(0, STREAM).addresses
    assert not set(old) & set(new)
    launches, _, again = world.launched(lambda: CALLS["training"](small))
    assert again
    numbers = {number for each in launches for number in each.numbers}
    assert set(new) <= numbers
    assert not set(old) & numbers
    assert set(old) <= {number for each in before for number in each.numbers}


def test_alignments_are_told_apart(world):
    a = operands((6, 33, 14, 14), 1)
    call = lambda x: numbabn.batch_norm(x, training=True)  # noqa: E731
    variants = []
    for nbytes in (0, 4, 8, 0, 4, 8, 24):
        launches, _, again = world.launched(lambda: call(shifted(a.x, nbytes)))  # noqa: B023
        assert again == (len(variants) >= 3)
        variants.append(launches[0].variant.rpartition(" ")[2])
    assert variants == ["x4", "x1", "x2", "x4", "x1", "x2", "x2"]


def test_results_off_their_alignment(world, monkeypatch):
    a = operands((6, 33, 14, 14), 1)
    call = lambda: CALLS["inference"](a)  # noqa: E731
    call()
    assert world.launched(call)[2]
    empty = Library.empty
    monkeypatch.setattr(Library, "empty", lambda *these: shifted(empty(*these), 4))
    launches, _, again = world.launched(call)
    assert not again
    assert launches[0].variant == "normalize planes float32 x1"


def test_no_more_are_kept_than_a_number(world, monkeypatch):
    monkeypatch.setattr(replay, "REMEMBERED", 3)
    a = operands((6, 33, 14, 14), 1)
    for k in range(10):
        numbabn.batch_norm(a.x, training=True, eps=float(k))
        assert len(replay._replays) <= 3
    assert world.launched(lambda: numbabn.batch_norm(a.x, training=True, eps=9.0))[2]


@every_call
def test_no_array_is_kept(world, call):
    a = operands((6, 33, 14, 14), 1)
    for _ in range(2):
        results = flat(call(a))
        alive = [weakref.ref(each) for each in vars(a).values() if isinstance(each, ndarray)]
        alive += [weakref.ref(each) for each in results if isinstance(each, ndarray)]
        a = results = None
        gc.collect()
        assert [each() for each in alive] == [None] * len(alive)
        a = operands((6, 33, 14, 14), 1)


def test_threads(world):
    """Each launch has the addresses of one call."""
    shape = 20, 5, 65, 67
    sets = [operands(shape, 1) for _ in range(8)]
    CALLS["training"](sets[0])
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda k: CALLS["training"](sets[k % 8]), range(400)):
            pass
    names = ("out", "x", "weight", "bias", "running_mean", "running_var")
    sets = [{getattr(a, name).values.ctypes.data for name in names} for a in sets]
    every = set().union(*sets)
    assert len(world.driver.launches) == 401
    for each in world.driver.launches:
        assert every & set(each.numbers) in sets
    assert world.anew <= 9  # threads that come at once go the ordinary way


@pytest.fixture
def torch(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing it says is not ours to mend
        torch = pytest.importorskip("torch")

    class OnTheHost(adapters._Torch):
        def __init__(self):
            super().__init__()
            self._handle = lambda ordinal: STREAM

        def _device(self, place):
            return "cpu"

    monkeypatch.setitem(adapters._LIBRARIES, "torch", OnTheHost)
    for module in (backends, arrays):
        monkeypatch.setattr(module, "host_of", lambda array: None)
    return torch


class TestTorch:
    """Real tensors, on the CPU, where its adapter is told that they belong."""

    def test_made_again(self, world, torch):
        for k in range(3):
            x, y = torch.ones(2, 6, 33, 14, 14)
            weight = torch.nn.Parameter(torch.ones(33))
            assert world.launched(lambda: numbabn.batch_norm(
                x, None, None, weight, training=True, out=y  # noqa: B023
            ))[2] == (k > 0)  # fmt: skip
            assert world.results is y

    def test_lazily_negated(self, world, torch):
        x = torch.ones(6, 33, 14, 14)
        weight, negated = torch.ones(33, 2).unbind(1)[1], torch.ones(33, dtype=torch.complex64)
        negated = negated.conj().imag
        assert weight.stride() == negated.stride()
        assert weight.data_ptr() % 16 == negated.data_ptr() % 16
        for _ in range(2):
            numbabn.batch_norm(x, None, None, weight, training=True)
        assert world.anew == 1
        with pytest.raises(TypeError, match="weight: expected numbers as they are"):
            numbabn.batch_norm(x, None, None, negated, training=True)

    def test_traits_tell_apart(self, torch):
        adapter = adapters._Torch()
        x = torch.ones(4, 6)
        others = [
            torch.nn.Parameter(x), x.half(), x[:3], x.T, torch.ones(4, 12)[:, ::2],
            torch.ones(4, 6, dtype=torch.complex64).conj().imag,
        ]  # fmt: skip
        kinds = {tuple(adapter.traits([each])[0]) for each in (x, x.clone(), *others)}
        assert len(kinds) == 1 + len(others)
        assert adapter.traits([x, None])[1] == [x.data_ptr()]
