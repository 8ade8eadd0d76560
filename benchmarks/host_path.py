"""Where the host's time goes in a call on PyTorch's CUDA tensors, piece by piece.

Without a GPU, tensors on the CPU stand for them, and a driver that does nothing for CUDA's: what is
left out is the driver's own time and the allocator's. ::

    python benchmarks/host_path.py
"""

import argparse
import statistics
import warnings
from functools import partial
from time import perf_counter_ns
from types import SimpleNamespace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

from cuda.bindings import driver as bindings

import numbabn
from numbabn import backends, cuda
from numbabn.cuda import adapters, arrays, compilation, driver, launch, replay
from numbabn.libraries import library_of

SHAPE = 8, 64, 32, 32
# What is timed by itself, without the pieces inside it.
PIECES = {
    "see arrays": [(adapters._Torch, "traits")],
    "tell the kind": [(replay, "_kind_of")],
    "results": [(adapters._Torch, "empty"), (adapters._Torch, "clear")],
    "context": [(launch.on_device, "__enter__"), (launch.on_device, "__exit__")],
    "launch": [(launch.Launches, "__call__")],
    "again": [(replay._Replay, "__call__")],
    "run": [(replay, "run"), (cuda, "run")],
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


def _host_of(array):
    """Ask what is asked of a tensor on a device, and take it for one."""
    return None if library_of(array) == "torch" and not array.is_cuda else "a GPU"


def _pretend():
    """Put in the place of what needs a driver what needs none."""
    fake = _Driver()
    driver.driver = launch.driver = fake
    launch._Kernel, launch.Device = _Kernel, _Device
    adapters._LIBRARIES["torch"] = _Torch
    backends.cuda_backend = lambda: cuda
    backends.host_of = arrays.host_of = _host_of


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


def _settle():
    """Let the device be done, so that no call waits for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _medians(calls, rounds):
    """Microseconds of each call, all taking turns, since the machine may change its pace."""
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _settle()
            for _ in range(10):
                begun = perf_counter_ns()
                call()
                samples[name].append((perf_counter_ns() - begun) / 1e3)
    return {name: statistics.median(times) for name, times in samples.items()}


def _pieces(call, rounds):
    """Microseconds of each piece of a call; clocks take some 0.2 of each."""
    clock = _Clock()
    kept = []
    for piece, places in PIECES.items():
        for owner, name in places:
            kept.append((owner, name, getattr(owner, name)))
            setattr(owner, name, clock.wrap(piece, getattr(owner, name)))
    samples = {piece: [] for piece in PIECES}
    for _ in range(rounds):
        _settle()
        clock.spent = dict.fromkeys(PIECES, 0)
        call()
        for piece, spent in clock.spent.items():
            samples[piece].append(spent / 1e3)
    for owner, name, function in kept:
        setattr(owner, name, function)
    return {piece: statistics.median(times) for piece, times in samples.items()}


def _calls(shape, device):
    x, dy, y = (torch.randn(shape, device=device).half() for _ in range(3))
    # PyTorch computes on what it is given: on a CPU, on little, which takes no time to speak of.
    own = x if device == "cuda" else x[:2, :, :1, :1].clone()
    C = shape[1]
    weight, bias, mean = (torch.randn(C, device=device) for _ in range(3))
    var = torch.ones(C, device=device)
    batch, invstd = (torch.ones(C, device=device, dtype=torch.float64) for _ in range(2))
    narrow, ones = torch.zeros(C, device=device), torch.ones(C, device=device)
    native = torch.nn.functional.batch_norm
    forward = partial(numbabn.batch_norm, x, mean, var, weight, bias, True)
    kept = partial(numbabn.batch_norm_forward, x, weight, bias, mean, var)

    def anew():
        replay.forget()
        forward(out=y)

    return {
        "forward, out=": partial(forward, out=y),
        "forward": forward,
        "forward, for a backward pass": kept,
        "forward with ReLU, for a backward pass": partial(kept, activation="relu"),
        "inference": partial(numbabn.batch_norm, x, mean, var, weight, bias),
        "backward": partial(numbabn.batch_norm_backward, dy, x, weight, batch, invstd),
        "forward, out=, the first of its kind": anew,
        "PyTorch's forward": partial(native, own, mean, var, weight, bias, True),
        "PyTorch's inference": partial(native, own, mean, var, weight, bias),
        "PyTorch's backward": partial(
            torch.ops.aten.native_batch_norm_backward.default,
            own, own, weight, mean, var, narrow, ones, True, 1e-5, [True, True, True],
        ),
    }  # fmt: skip


def measured(shape, rounds, device):
    """Give, for each call, microseconds of the whole and of its pieces."""
    calls = _calls(shape, device)
    for call in calls.values():
        for _ in range(20):
            call()
    whole = _medians(calls, rounds)
    for name, call in calls.items():
        ours = "PyTorch" not in name and "first" not in name
        pieces = _pieces(call, rounds) if ours else {}
        yield {"call": name, "shape": shape, "whole": whole[name], "pieces": pieces}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=500)
    rounds = parser.parse_args().rounds
    real = torch.cuda.is_available()
    if not real:
        _pretend()
    torch.set_num_threads(1)
    print(f"Microseconds of the host, {'on a GPU' if real else 'without a GPU'}")
    print(f"{'':<40}{'whole':>7}", *(f"{piece:>14}" for piece in PIECES))
    for row in measured(SHAPE, rounds, "cuda" if real else "cpu"):
        pieces = row["pieces"].values()
        print(f"{row['call']:<40}{row['whole']:>7.1f}", *(f"{each:>14.1f}" for each in pieces))


if __name__ == "__main__":
    main()
