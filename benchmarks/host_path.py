"""Where the host's time goes in a call on PyTorch's CUDA tensors, piece by piece.

Without a GPU, tensors on the CPU stand for them, and a driver that does nothing for CUDA's: what is
left out is the driver's own time and the allocator's. ::

    python benchmarks/host_path.py
"""

import argparse
import statistics
import warnings
from time import perf_counter_ns
from types import SimpleNamespace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

from cuda.bindings import driver as bindings

import numbabn
from numbabn import backends, cuda, functional
from numbabn.cuda import adapters, arrays, compilation, driver, launch

SHAPES = [(8, 64, 32, 32), (8, 64, 7, 7)]
# What is timed by itself, without the pieces inside it.
PIECES = {
    "borrow": [(functional, "borrow")],
    "check": [
        (functional, "_check_forward"),
        (functional, "_check_inference"),
        (functional, "_check_backward"),
        (functional.checks, "writable"),
    ],
    "arrange": [(functional, "arrange")],
    "results": [(cuda, "empty"), (cuda, "empty_like"), (cuda, "allocate_mask"), (cuda, "give")],
    "the library's": [(adapters._Torch, "empty"), (adapters._Torch, "clear")],
    "describe": [(cuda, "_Call")],
    "context": [(launch.on_device, "__enter__"), (launch.on_device, "__exit__")],
    "launch": [(launch, "launch")],
}
OK = bindings.CUresult.CUDA_SUCCESS


class _Driver:
    """What a call asks of the driver."""

    def __getattr__(self, name):
        return getattr(bindings, name)

    def cuInit(self, flags):  # noqa: N802
        return (OK,)

    def cuDeviceGet(self, ordinal):  # noqa: N802
        return OK, ordinal

    def cuDevicePrimaryCtxRetain(self, device):  # noqa: N802
        return OK, bindings.CUcontext(1)

    def cuCtxGetCurrent(self, context=(OK, bindings.CUcontext(1))):  # noqa: B008, N802
        return context

    def cuStreamIsCapturing(self, stream):  # noqa: N802
        return OK, bindings.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function, threads, shared):  # noqa: N802
        return OK, 2

    def cuLaunchKernelEx(self, config, function, pointers, extra):  # noqa: N802
        return (OK,)


class _Device:
    """What a call asks of a device: an H200's answers."""

    properties = SimpleNamespace(multiprocessor_count=132, l2_cache_size=60 << 20)

    def __init__(self, ordinal):
        pass


class _Kernel(launch._Kernel):
    def __init__(self, variant, ordinal):
        self.function = bindings.CUfunction(1)
        self.pack = launch.struct.Struct(compilation.codes(variant)).pack_into
        self.shared = self._most_shared = 200 << 10


class _Torch(adapters._Torch):
    """PyTorch, whose tensors on the CPU pass for the device's."""

    def __init__(self):
        super().__init__()
        self._handle = lambda ordinal: 7

    def _device(self, place):
        return "cpu"


def _pretend():
    """Put in the place of what needs a driver what needs none."""
    fake = _Driver()
    driver.driver = launch.driver = fake
    launch._Kernel, launch.Device = _Kernel, _Device
    adapters._LIBRARIES["torch"] = _Torch
    backends.cuda_backend = lambda: cuda
    for module in (backends, arrays):
        host_of = module.host_of
        module.host_of = lambda array, host_of=host_of: host_of(array) and None


class _Clock:
    """Time spent in each piece, and not in another inside it."""

    def __init__(self):
        self.spent = dict.fromkeys(PIECES, 0)
        self._inner = [0]

    def wrap(self, piece, function):
        def timed(*args, **kwargs):
            self._inner.append(0)
            begun = perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                whole = perf_counter_ns() - begun
                self.spent[piece] += whole - self._inner.pop()
                self._inner[-1] += whole

        return timed


def _median(call, rounds):
    """Microseconds of a call."""
    seconds = []
    for _ in range(rounds):
        begun = perf_counter_ns()
        for _ in range(10):
            call()
        seconds.append((perf_counter_ns() - begun) / 10e3)
    return statistics.median(seconds)


def _pieces(call, rounds):
    """Microseconds of each piece of a call; clocks take some 0.2 of each."""
    clock = _Clock()
    kept = []
    for piece, places in PIECES.items():
        for owner, name in places:
            if hasattr(owner, name):
                kept.append((owner, name, getattr(owner, name)))
                setattr(owner, name, clock.wrap(piece, getattr(owner, name)))
    samples = {piece: [] for piece in PIECES}
    for _ in range(rounds):
        clock.spent = dict.fromkeys(PIECES, 0)
        for _ in range(10):
            call()
        for piece, spent in clock.spent.items():
            samples[piece].append(spent / 10e3)
    for owner, name, function in kept:
        setattr(owner, name, function)
    return {piece: statistics.median(times) for piece, times in samples.items()}


def _calls(shape, device):
    x, dy, y = (torch.randn(shape, device=device).half() for _ in range(3))
    C = shape[1]
    weight, bias, mean = (torch.randn(C, device=device) for _ in range(3))
    var = torch.ones(C, device=device)
    batch, invstd = (torch.ones(C, device=device, dtype=torch.float64) for _ in range(2))
    native = torch.nn.functional.batch_norm
    return {
        "forward": lambda: numbabn.batch_norm(x, mean, var, weight, bias, True),
        "forward, out=": lambda: numbabn.batch_norm(x, mean, var, weight, bias, True, out=y),
        "inference": lambda: numbabn.batch_norm(x, mean, var, weight, bias),
        "backward": lambda: numbabn.batch_norm_backward(dy, x, weight, batch, invstd),
        "PyTorch's training": lambda: native(x, mean, var, weight, bias, True),
        "PyTorch's inference": lambda: native(x, mean, var, weight, bias),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=500)
    rounds = parser.parse_args().rounds
    real = torch.cuda.is_available()
    if not real:
        _pretend()
    torch.set_num_threads(1)
    print(f"Microseconds of the host, {'on a GPU' if real else 'without a GPU'}")
    print(f"{'':<38}{'whole':>7}", *(f"{piece:>14}" for piece in PIECES))
    for shape in SHAPES:
        for name, call in _calls(shape, "cuda" if real else "cpu").items():
            for _ in range(50):
                call()
            whole = _median(call, rounds)
            pieces = {} if "PyTorch" in name else _pieces(call, rounds)
            title = f"{'x'.join(map(str, shape))} {name}"
            print(f"{title:<38}{whole:>7.1f}", *(f"{each:>14.1f}" for each in pieces.values()))
            if real:
                torch.cuda.synchronize()


if __name__ == "__main__":
    main()
