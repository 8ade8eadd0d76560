"""Calls on CuPy's arrays go on CuPy's current stream, and read and write its memory in place.

The module is the test's own, with as much of CuPy as is asked of it; its arrays are memory of the
host, and the driver does nothing but remember what it was asked to launch. What needs a GPU is in
``tests/gpu/test_streams.py``.
"""

import ctypes
import os
import struct
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

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
from numbabn.cuda import adapters, compilation, driver, launch, replay, workspace

DEFAULT, LEGACY = 0, 1


class Recorder(Driver):
    def __init__(self):
        super().__init__()
        self.variants = []

    def cuLaunchKernelEx(self, config, function, pointers, extra):  # noqa: N802
        codes = compilation.codes(self.variants[int(function) - 1])
        addresses = (ctypes.c_void_p * len(codes)).from_address(pointers)
        numbers = [
            struct.unpack(code, ctypes.string_at(address, 8))[0]
            for code, address in zip(codes, addresses, strict=True)
        ]
        self.launches.append((int(config.hStream), numbers))
        return (self.error,)


class Double(ModuleType):
    """CuPy as far as it is used: arrays, devices and streams."""

    def __init__(self):
        super().__init__("cupy")
        self.current = DEFAULT
        self.allocated_on = []
        double = self

        class ndarray:  # noqa: N801
            __module__ = "cupy"

            def __init__(self, shape, dtype, memory, strides=None):
                self.values = np.ndarray(shape, dtype, memory.buffer, strides=strides)
                self.data = memory
                self.device = SimpleNamespace(id=0)
                self.shape, self.strides, self.dtype = shape, self.values.strides, self.values.dtype

            def __getitem__(self, index):  # from the first element on
                return ndarray(self.values[index].shape, self.dtype, self.data)

            def fill(self, value):
                double.allocated_on.append(double.current)
                self.values.fill(value)

        self.ndarray = ndarray
        self.cuda = SimpleNamespace(
            Device=lambda ordinal: self._within(self.current),
            ExternalStream=lambda handle, ordinal: self._within(handle),
            get_current_stream=lambda ordinal: SimpleNamespace(ptr=self.current),
        )

    @contextmanager
    def _within(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def stream(self, handle):
        """Make a stream current, as ``with cupy.cuda.Stream()`` does."""
        return self._within(handle)

    def empty(self, shape, dtype):
        self.allocated_on.append(self.current)
        buffer = np.empty(int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8)
        return self.ndarray(shape, dtype, SimpleNamespace(buffer=buffer, ptr=buffer.ctypes.data))


@pytest.fixture
def cupy(monkeypatch):
    double, recorder = Double(), Recorder()

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
    monkeypatch.setattr(replay, "_replays", {})
    monkeypatch.setitem(sys.modules, "cupy", double)
    caches = driver._primary, launch._capacity, launch._l2_bytes, adapters.library
    for cache in (*caches, workspace._workspace):
        cache.cache_clear()
    double.launches = recorder.launches
    yield double
    for cache in (*caches, workspace._workspace):
        cache.cache_clear()


def step(x, weight, **stream):
    y, mean, invstd, mask = numbabn.batch_norm_forward(x, weight, activation="relu", **stream)
    gradients = numbabn.batch_norm_backward(y, x, weight, mean, invstd, mask=mask, **stream)
    return y, gradients.dx


@pytest.mark.parametrize("shape", [(6, 33, 14, 14), (9, 24), (128, 2, 224, 224)])
def test_on_the_current_stream(cupy, shape):
    x, weight = cupy.empty(shape, np.float32), cupy.empty(shape[1:2], np.float32)
    for handle in (DEFAULT, 70, 80, 70):  # the last two are calls made again
        cupy.launches.clear()
        cupy.allocated_on.clear()
        with cupy.stream(handle):
            results = step(x, weight)
        assert {stream for stream, _ in cupy.launches} == {handle or LEGACY}
        assert set(cupy.allocated_on) == {handle}
        assert all(type(each) is cupy.ndarray for each in results)
        addresses = {number for _, numbers in cupy.launches for number in numbers}
        assert {each.data.ptr for each in (x, weight, *results)} <= addresses


@pytest.mark.parametrize("name", ["handle", "stream"])
def test_on_a_stream_that_is_named(cupy, name):
    x, weight = cupy.empty((6, 33, 14, 14), np.float32), cupy.empty((33,), np.float32)
    cupy.allocated_on.clear()
    with cupy.stream(70):
        step(x, weight, stream=90 if name == "handle" else SimpleNamespace(ptr=90))
        assert cupy.current == 70
    assert {stream for stream, _ in cupy.launches} == {90}
    assert set(cupy.allocated_on) == {90}
