"""What `gpu_figures` times: the ways to do an operation, on buffers that no cache holds."""

import math
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

import numbabn
from numbabn.cli.bench.cases import TRAFFIC, Case

EPS, MOMENTUM = 1e-5, 0.1
CACHES = 3  # times the L2 cache that all sets of buffers fill together
MOST_SETS = 128


def l2_bytes() -> int:
    """Give the size of the device's L2 cache."""
    return torch.cuda.get_device_properties(0).L2_cache_size or 60 << 20


def memory_format(case: Case) -> Any:
    return torch.channels_last if case.layout == "nhwc" else torch.contiguous_format


class Buffers:
    """What a case reads and writes, several times over, all with the same values."""

    def __init__(self, case: Case) -> None:
        self.case = case
        dtype = getattr(torch, case.dtype)
        shape, C = case.shape, case.channels
        self.column = (1, C, *[1] * (len(shape) - 2))
        self.dims = [k for k in range(len(shape)) if k != 1]
        generator = torch.Generator("cuda").manual_seed(0)

        def noise(*size: int) -> Any:
            return torch.randn(size, device="cuda", dtype=torch.float32, generator=generator)

        std = noise(C).abs_() + 0.5
        x = torch.randn(shape, device="cuda", dtype=dtype, generator=generator)
        x.mul_(std.to(dtype).view(self.column)).add_((noise(C) / 2).to(dtype).view(self.column))
        dy = torch.randn(shape, device="cuda", dtype=dtype, generator=generator)
        each = case.nbytes * TRAFFIC[case.op].sweeps
        least = 1 if each > 1 << 30 else 2
        self.sets = min(MOST_SETS, max(least, math.ceil(CACHES * l2_bytes() / each)))
        lay = {"memory_format": memory_format(case)}
        self.x = [x.contiguous(**lay).clone() for _ in range(self.sets)]
        self.out = [torch.full_like(self.x[0], math.nan) for _ in range(self.sets)]
        times = self.sets if case.op == "backward" else 0
        self.dy = [dy.contiguous(**lay).clone() for _ in range(times)]
        self.weight, self.bias = noise(C).abs_() + 0.5, noise(C)
        self.running = {
            who: (torch.zeros(C, device="cuda"), torch.ones(C, device="cuda"))
            for who in ("numbabn", "torch")
        }
        wide = x.double()
        self.mean = wide.mean(self.dims)
        var = (wide - self.mean.view(self.column)).square_().mean(self.dims)
        self.var, self.invstd = var, (var + EPS).rsqrt()

    def expected(self) -> dict[str, Any]:
        """Compute it in float64, by formulas of its own."""
        wide = self.x[0].double()
        mean, var = self.mean, self.var
        weight, bias = self.weight.double(), self.bias.double()
        count = wide.numel() // self.case.channels
        if self.case.op == "inference":
            mean, var = torch.zeros_like(mean), torch.ones_like(var)
        invstd = (var + EPS).rsqrt()
        wide.sub_(mean.view(self.column)).mul_(invstd.view(self.column))
        if self.case.op == "backward":
            dy = self.dy[0].double()
            dbias, dweight = dy.sum(self.dims), (dy * wide).sum(self.dims)
            dy.sub_((dbias / count).view(self.column))
            dy.sub_(wide.mul_((dweight / count).view(self.column)))
            dx = dy.mul_((weight * invstd).view(self.column))
            return {"y": dx, "dweight": dweight, "dbias": dbias}
        y = wide.mul_(weight.view(self.column)).add_(bias.view(self.column))
        if self.case.op == "inference":
            return {"y": y}
        unbiased = var * count / (count - 1)
        return {
            "y": y, "mean": mean, "invstd": invstd,
            "running_mean": MOMENTUM * mean,
            "running_var": (1 - MOMENTUM) + MOMENTUM * unbiased,
        }  # fmt: skip


def numbabn_call(data: Buffers) -> Any:
    """Give numbabn's call on set i, into a given result or a fresh one."""
    w, b, running = data.weight, data.bias, data.running["numbabn"]

    def forward(i: int, out: Any) -> Any:
        return numbabn.batch_norm_forward(data.x[i], w, b, *running, out=out)

    def inference(i: int, out: Any) -> Any:
        return numbabn.batch_norm_inference(data.x[i], *running, w, b, out=out)

    def backward(i: int, out: Any) -> Any:
        return numbabn.batch_norm_backward(
            data.dy[i], data.x[i], w, data.mean, data.invstd, out=out
        )

    return {"forward": forward, "inference": inference, "backward": backward}[data.case.op]


def numbabn_ways(data: Buffers) -> dict[str, Any]:
    """Give the call into a given result."""
    call = numbabn_call(data)
    return {"numbabn": lambda i: call(i, data.out[i])}


def fresh_ways(data: Buffers) -> dict[str, Any]:
    """Give the call into a fresh result."""
    call = numbabn_call(data)
    return {"numbabn fresh": lambda i: call(i, None)}


@contextmanager
def sweeping_twice() -> Any:
    """Let no call hold x on the chip; the other way round blocks would wait for ever."""
    from numbabn import cuda
    from numbabn.cuda import replay

    chosen = cuda.is_held
    cuda.is_held = lambda shape, capacity: False
    replay.forget()  # else calls are made again as before
    try:
        yield
    finally:
        cuda.is_held = chosen
        replay.forget()


def swept_ways(data: Buffers) -> dict[str, Any]:
    """Give the call that reads x twice, whatever the rule chooses."""
    call = numbabn_call(data)

    def swept(i: int) -> Any:
        with sweeping_twice():
            return call(i, data.out[i])

    return {"numbabn swept twice": swept}


def torch_ways(data: Buffers) -> dict[str, Any]:
    """Give PyTorch's own calls, through cuDNN and by its own kernels; results are fresh."""
    w, b, running = data.weight, data.bias, data.running["torch"]
    if data.case.op != "backward":
        training = data.case.op == "forward"

        def call(cudnn: bool) -> Any:
            return lambda i: torch.batch_norm(
                data.x[i], w, b, *running, training, MOMENTUM, EPS, cudnn
            )

        return {"cuDNN": call(True), "native": call(False)}
    aten = torch.ops.aten
    mean, invstd = data.mean.float(), data.invstd.float()
    ways: dict[str, Any] = {
        "native": lambda i: aten.native_batch_norm_backward(
            data.dy[i], data.x[i], w, *running, mean, invstd, True, EPS, [True, True, True]
        )
    }
    try:
        saved = [aten.cudnn_batch_norm(x, w, b, *running, True, MOMENTUM, EPS)[1:] for x in data.x]
    except RuntimeError as error:
        return ways | {"cuDNN": raising(error)}
    return ways | {
        "cuDNN": lambda i: aten.cudnn_batch_norm_backward(
            data.x[i], data.dy[i], w, *running, *saved[i][:2], EPS, saved[i][2]
        )
    }


def raising(error: Exception) -> Any:
    """Give a call that tells why there is none."""

    def call(i: int) -> Any:
        raise error

    return call


def compiled(op: str) -> Any:
    """Give what torch.compile makes of an operation."""
    from torch._inductor import config

    torch._dynamo.reset()
    # A choice that was timed on a busy device must not be kept for later.
    with suppress(AttributeError):
        config.autotune_local_cache = False
    if op == "backward":

        def backward(dy: Any, x: Any, w: Any, mean: Any, invstd: Any) -> Any:
            return torch.ops.aten.native_batch_norm_backward(
                dy, x, w, None, None, mean, invstd, True, EPS, [True, True, True]
            )

        return torch.compile(backward, dynamic=False)
    training = op == "forward"

    def forward(x: Any, mean: Any, var: Any, w: Any, b: Any) -> Any:
        return F.batch_norm(x, mean, var, w, b, training, MOMENTUM, EPS)

    return torch.compile(forward, dynamic=False)


def compiled_ways(data: Buffers) -> dict[str, Any]:
    """Give torch.compile's call."""
    run, w, b, running = compiled(data.case.op), data.weight, data.bias, data.running["torch"]
    if data.case.op == "backward":
        mean, invstd = data.mean.float(), data.invstd.float()
        return {"torch.compile": lambda i: run(data.dy[i], data.x[i], w, mean, invstd)}
    return {"torch.compile": lambda i: run(data.x[i], *running, w, b)}


def compile_ahead(case: Case) -> None:
    """Leave on disk what torch.compile makes for a case, by a call on no numbers in particular."""
    x = torch.empty(
        case.shape, dtype=getattr(torch, case.dtype), device="cuda",
        memory_format=memory_format(case),
    )  # fmt: skip
    a, b, c, d = (torch.ones(case.channels, device="cuda") for _ in range(4))
    run = compiled(case.op)
    run(torch.empty_like(x), x, a, b, c) if case.op == "backward" else run(x, a, b, c, d)


def copy_ways(data: Buffers) -> dict[str, Any]:
    """Give a copy of x, by the driver and by a kernel: the limit."""
    return {
        "copy": lambda i: data.out[i].copy_(data.x[i]),
        "copy by a kernel": lambda i: torch.neg(data.x[i], out=data.out[i]),
    }


WAYS = {
    "numbabn": numbabn_ways, "fresh": fresh_ways, "swept": swept_ways,
    "torch": torch_ways, "compile": compiled_ways, "copy": copy_ways,
}  # fmt: skip
