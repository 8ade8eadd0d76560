"""How kernels are launched, with a driver that does nothing but remember what it was asked."""

import ctypes
import os
import struct
from types import SimpleNamespace

import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("numba simulates a GPU", allow_module_level=True)
pytest.importorskip("cuda.core", reason="numba-cuda is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import double_driver
from cuda.bindings import driver as real
from numba.cuda import types

from numbabn.cuda import compilation, driver, launch
from numbabn.cuda.arguments import Forward, Map, Numbers, Parameters, Settings, Shape
from numbabn.cuda.compilation import Code
from numbabn.libraries import Place

PLACE = Place(None, 0, 7, False)
KERNEL = "normalize", "planes", "float16", 8
MAP, NUMBERS = Map(11, 12, 13, 14), Numbers(21, 22, 23)
SIZES = Shape(*range(31, 31 + len(Shape._fields)))
ARGUMENTS = (
    Forward(MAP, MAP, MAP, MAP),
    Parameters(*[NUMBERS] * len(Parameters._fields)),
    Settings(0.5, 0.25, 1.0, 1),
    SIZES,
)
SHARED, OWN, OPT_IN = 100_000, 1024, 200_000


class Driver(double_driver.Driver):
    """Keeps all numbers that a kernel might take."""

    def cuLaunchKernelEx(self, config, function, pointers, extra):  # noqa: N802
        addresses = (ctypes.c_void_p * launch._MOST_NUMBERS).from_address(pointers)
        numbers = [ctypes.string_at(address, 8) for address in addresses]
        self.launches.append((config, numbers))
        return (self.error,)


class Device:
    compute_capability = (9, 0)
    properties = SimpleNamespace(
        multiprocessor_count=132, max_shared_memory_per_block_optin=OPT_IN, l2_cache_size=60 << 20
    )

    def __init__(self, ordinal):
        assert ordinal == 0


class ObjectCode:
    @staticmethod
    def from_cubin(cubin):
        attributes = {0: SimpleNamespace(shared_size_bytes=OWN)}
        kernel = SimpleNamespace(handle=real.CUkernel(5), attributes=attributes)
        return SimpleNamespace(get_kernel=lambda name: kernel)


@pytest.fixture
def asked(monkeypatch):
    fake = Driver()
    driver._primary.cache_clear()
    launch._capacity.cache_clear()
    launch._l2_bytes.cache_clear()
    monkeypatch.setattr(launch, "_kernels", {})
    for module in (driver, launch):
        monkeypatch.setattr(module, "driver", fake)
    monkeypatch.setattr(launch, "Device", Device)
    monkeypatch.setattr(launch, "ObjectCode", ObjectCode)
    monkeypatch.setattr(launch, "compiled", lambda *_: Code(b"", "kernel", "", 2))
    yield fake
    driver._primary.cache_clear()
    launch._capacity.cache_clear()
    launch._l2_bytes.cache_clear()


def test_numbers_arrive_as_the_kernel_takes_them(asked):
    launch.launch(PLACE, *KERNEL, 5, *ARGUMENTS)
    ((config, numbers),) = asked.launches
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (5, 1, 1)
    assert (config.blockDimX, config.sharedMemBytes, config.numAttrs) == (launch.THREADS, 0, 0)
    assert int(config.hStream) == 7
    parameters = [*NUMBERS] * len(Parameters._fields)
    expected = [*[*MAP] * 4, *parameters, 0.5, 0.25, 1.0, 1, *SIZES]
    packed = [struct.pack("d" if isinstance(n, float) else "q", n) for n in expected]
    assert numbers[: len(packed)] == packed


def test_tuples_are_flattened_as_deep_as_kernels_take_them():
    def depth(kind):
        return 1 + max(map(depth, kind)) if isinstance(kind, types.BaseTuple) else 0

    for variant in compilation.variants():
        assert max(map(depth, compilation._signature(variant).args)) <= 2
    assert launch.flatten([1, (2, 3.0), ((4, 5), (6,)), 7.0]) == [1, 2, 3.0, 4, 5, 6, 7.0]


def test_every_variant_says_what_numbers_it_takes():
    for variant in compilation.variants():
        codes = compilation.codes(variant)
        assert set(codes) <= {"d", "q"}
        assert len(codes) <= launch._MOST_NUMBERS


@pytest.mark.parametrize("stream", [0, 1])
def test_the_default_stream_is_the_legacy_one(asked, stream):
    launch.launch(PLACE._replace(stream=stream), *KERNEL, 5, *ARGUMENTS)
    assert int(asked.launches[0][0].hStream) == 1


def test_a_cooperative_launch_with_shared_memory(asked):
    for shared in (0, 16, SHARED, SHARED + 16, 16):
        launch.launch(PLACE, *KERNEL, 5, *ARGUMENTS, shared=shared, together=True)
        config, _ = asked.launches[-1]
        assert config.sharedMemBytes == shared
        assert config.numAttrs == 1
        assert config.attrs[0].id == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        assert config.attrs[0].value.cooperative == 1
    assert asked.attributes == [OPT_IN - OWN]  # once, when more than 48 KB was asked for


def test_capacity(asked):
    assert launch.capacity(PLACE, *KERNEL, 0) == 2 * 132
    assert asked.attributes == []
    assert launch.capacity(PLACE, *KERNEL, OPT_IN - OWN) == 2 * 132
    assert asked.attributes == [OPT_IN - OWN]
    assert launch.capacity(PLACE, *KERNEL, OPT_IN - OWN + 1) == 0
    assert launch.l2_bytes(PLACE) == 60 << 20


def test_an_error_is_named(asked):
    asked.error = real.CUresult.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
    with pytest.raises(
        RuntimeError,
        match="launch of normalize_planes: expected success, got CUDA_ERROR_COOPERATIVE_LAUNCH_TOO",
    ):
        launch.launch(PLACE, *KERNEL, 5, *ARGUMENTS)


@pytest.mark.parametrize("before", [None, 100, 200], ids=["none", "its own", "another"])
def test_the_callers_context_is_current_again(asked, before):
    contexts = [] if before is None else [real.CUcontext(before)]
    asked.contexts = [*contexts]
    with launch.on_device(0):
        assert int(asked.contexts[-1]) == 100
    assert asked.contexts == contexts
    with pytest.raises(ZeroDivisionError), launch.on_device(0):
        raise ZeroDivisionError
    assert asked.contexts == contexts


def test_no_kernel_is_loaded_while_a_graph_is_captured(asked):
    asked.capturing = {7}
    with pytest.raises(RuntimeError, match="'normalize planes float16 x8' loaded by an earlier"):
        launch.launch(PLACE, *KERNEL, 5, *ARGUMENTS)
    assert asked.launches == []
    launch.prepare(PLACE._replace(stream=8), *KERNEL)
    launch.launch(PLACE, *KERNEL, 5, *ARGUMENTS)
    assert len(asked.launches) == 1
