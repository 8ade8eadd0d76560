"""The process that works on the GPU for `gpu_report`: one request by line, one answer by line.

In a process of its own, so that whatever breaks the device's state costs one case, not the report.
"""

import json
import math
import os
import re
import sys
import time
import traceback
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import numbabn
from numbabn import backends, functional, layout
from numbabn.cli.bench.cases import DTYPES, TRAFFIC, Case

EPS, MOMENTUM = 1e-5, 0.1
# Largest error by the largest expected value.
TOLERANCES = {"float32": 4e-6, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1.6e-2}
CACHES = 3  # times the L2 cache that all sets of buffers fill together
MOST_SETS, MOST_CALLS = 128, 96  # a stream holds some 1000 launches before the host must wait
SAMPLE = 4e-4  # seconds on the device, by as many calls as that takes
LEAST, MOST = 7, 25  # samples
SECONDS = 0.25  # of samples for a case


class Buffers:
    """What a case reads and writes, several times over, all with the same values."""

    def __init__(self, case: Case) -> None:
        self.case = case
        dtype = getattr(torch, case.dtype)
        shape, C = case.shape, case.channels
        last = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
        self.column = (1, C, *[1] * (len(shape) - 2))
        self.dims = [k for k in range(len(shape)) if k != 1]
        generator = torch.Generator("cuda").manual_seed(0)

        def noise(*size: int) -> Any:
            return torch.randn(size, device="cuda", dtype=torch.float32, generator=generator)

        std = noise(C).abs_() + 0.5
        x = torch.randn(shape, device="cuda", dtype=dtype, generator=generator)
        x.mul_(std.to(dtype).view(self.column)).add_((noise(C) / 2).to(dtype).view(self.column))
        dy = torch.randn(shape, device="cuda", dtype=dtype, generator=generator)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size or 60 << 20
        each = case.nbytes * TRAFFIC[case.op].sweeps
        self.sets = min(MOST_SETS, max(1 if each > 1 << 30 else 2, math.ceil(CACHES * l2 / each)))
        lay = {"memory_format": last}
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


def numbabn_ways(data: Buffers) -> dict[str, Any]:
    """Give numbabn's calls by name: into a given result, and into a fresh one."""
    w, b, running = data.weight, data.bias, data.running["numbabn"]

    def forward(i: int, out: Any) -> Any:
        return numbabn.batch_norm_forward(data.x[i], w, b, *running, out=out)

    def inference(i: int, out: Any) -> Any:
        return numbabn.batch_norm_inference(data.x[i], *running, w, b, out=out)

    def backward(i: int, out: Any) -> Any:
        return numbabn.batch_norm_backward(
            data.dy[i], data.x[i], w, data.mean, data.invstd, out=out
        )

    call = {"forward": forward, "inference": inference, "backward": backward}[data.case.op]
    return {"numbabn": lambda i: call(i, data.out[i]), "numbabn fresh": lambda i: call(i, None)}


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


def compiled_way(data: Buffers) -> dict[str, Any]:
    """Give torch.compile's call."""
    torch._dynamo.reset()
    w, b, running = data.weight, data.bias, data.running["torch"]
    if data.case.op == "backward":
        mean, invstd = data.mean.float(), data.invstd.float()

        def backward(dy: Any, x: Any, w: Any, mean: Any, invstd: Any) -> Any:
            return torch.ops.aten.native_batch_norm_backward(
                dy, x, w, None, None, mean, invstd, True, EPS, [True, True, True]
            )

        run = torch.compile(backward, dynamic=False)
        return {"torch.compile": lambda i: run(data.dy[i], data.x[i], w, mean, invstd)}
    training = data.case.op == "forward"

    def forward(x: Any, mean: Any, var: Any, w: Any, b: Any) -> Any:
        return F.batch_norm(x, mean, var, w, b, training, MOMENTUM, EPS)

    run = torch.compile(forward, dynamic=False)
    return {"torch.compile": lambda i: run(data.x[i], *running, w, b)}


def copy_ways(data: Buffers) -> dict[str, Any]:
    """Give a copy of x, by the driver and by a kernel: the limit."""
    return {
        "copy": lambda i: data.out[i].copy_(data.x[i]),
        "copy by a kernel": lambda i: torch.neg(data.x[i], out=data.out[i]),
    }


def errors_of(data: Buffers, expected: dict[str, Any], name: str, result: Any) -> dict[str, float]:
    """Compare all of a result to what was expected; NaN stays NaN."""
    ours = name.startswith("numbabn")
    if data.case.op == "backward":
        got = dict(zip(("y", "dweight", "dbias"), result[:3], strict=True))
    elif ours and data.case.op == "forward":
        mean, var = data.running["numbabn"]
        got = {
            "y": result.y, "mean": result.mean, "invstd": result.invstd,
            "running_mean": mean, "running_var": var,
        }  # fmt: skip
    else:
        got = {"y": result}
    errors = {}
    for key, array in got.items():
        off = array.double().sub_(expected[key]).abs_().max()
        errors[key] = (off / expected[key].abs().max()).item()
    return errors


def reset(data: Buffers) -> None:
    """Forget what earlier calls have left in results and running statistics."""
    for out in data.out:
        out.fill_(math.nan)
    for mean, var in data.running.values():
        mean.zero_()
        var.fill_(1)


def check(data: Buffers, ways: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[Any]]:
    """Call everything once; give errors, what is wrong, and numbabn's kernels with their grids."""
    from numbabn import cuda

    expected = data.expected()
    launch, launched = cuda.runner.launch, []

    def recorded(place: Any, kernel: str, view: str, form: str, width: int, *rest: Any) -> None:
        launched.append((kernel, view, form, width, rest[0]))
        launch(place, kernel, view, form, width, *rest)

    errors, wrong = {}, []
    for name in list(ways):
        reset(data)
        cuda.runner.launch = recorded if name == "numbabn" else launch
        try:
            errors[name] = errors_of(data, expected, name, ways[name](data.sets - 1))
            torch.cuda.synchronize()
        except Exception as error:
            torch.cuda.synchronize()  # raises where the device's state is lost
            errors[name] = f"{type(error).__name__}: {str(error)[:500]}"
            del ways[name]
            if name.startswith("numbabn"):
                wrong.append(f"{name} raised {errors[name]}")
                print(traceback.format_exc(), file=sys.stderr)
            continue
        finally:
            cuda.runner.launch = launch
        tolerance = TOLERANCES[data.case.dtype]
        off = {key: value for key, value in errors[name].items() if not value <= tolerance}
        if off and name.startswith("numbabn"):
            wrong.append(f"{name} is off by {off}")
    reset(data)
    return errors, wrong, launched


class Subject:
    """One thing to time, on the device, by events around calls that the host has all enqueued."""

    cycles_per_second = 0.0

    def __init__(self, call: Any, sets: int) -> None:
        self.call, self.sets, self.position = call, sets, 0
        self.kept: list[Any] = [None] * sets  # so that fresh results rotate too
        self.samples: list[float] = []
        self.exposed = 0
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):
            self._enqueue(2)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.start.record()
        self._enqueue(5)
        self.end.record()
        self.host = (time.perf_counter() - begin) / 5
        self.end.synchronize()
        device = self.start.elapsed_time(self.end) / 5e3
        self.calls = max(1, min(MOST_CALLS, math.ceil(SAMPLE / max(device, 1e-7))))
        self.wait = 1.5 * self.host * self.calls + 2e-5
        for _ in range(3):  # an estimate that holds the host's time was too long
            if self.calls == MOST_CALLS:
                break
            estimate = self.sample()
            calls = max(1, min(MOST_CALLS, math.ceil(SAMPLE / max(estimate, 1e-7))))
            if calls < 1.5 * self.calls:
                break
            self.calls, self.wait = calls, 1.5 * self.host * calls + 2e-5
        self.samples.clear()
        self.exposed = 0

    def _enqueue(self, calls: int) -> None:
        for _ in range(calls):
            i = self.position % self.sets
            self.kept[i] = self.call(i)
            self.position += 1

    def sample(self) -> float:
        """Take the seconds of one call; again, behind a longer wait, if the device ran dry."""
        for attempt in range(4):
            torch.cuda._sleep(int(self.wait * self.cycles_per_second) + 1)
            self.start.record()
            self._enqueue(self.calls)
            self.end.record()
            dry = self.start.query()
            self.end.synchronize()
            if not dry:
                break
            self.wait = min(2 * self.wait, max(self.wait, 0.05))
            self.exposed += attempt == 3
        seconds = self.start.elapsed_time(self.end) / 1e3 / self.calls
        self.samples.append(seconds)
        return seconds

    def document(self) -> dict[str, Any]:
        lower, _, upper = quantiles(self.samples, method="inclusive")
        return {
            "ms": 1e3 * median(self.samples), "lower": 1e3 * lower, "upper": 1e3 * upper,
            "samples": len(self.samples), "exposed": self.exposed, "calls": self.calls,
            "host_us": 1e6 * self.host,
        }  # fmt: skip


def clock() -> float:
    """How many cycles the device waits in a second."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        start.record()
        torch.cuda._sleep(20_000_000)
        end.record()
        end.synchronize()
    return 20_000_000 / (start.elapsed_time(end) / 1e3)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Check a case, then time everything that can do it, in turns."""
    case = Case(request["op"], request["layout"], request["dtype"], tuple(request["shape"]))
    torch.cuda.empty_cache()
    data = Buffers(case)
    ways = numbabn_ways(data)
    ways |= compiled_way(data) if request.get("compile") else torch_ways(data)
    begin = time.perf_counter()
    errors, wrong, launched = check(data, ways)
    checked = time.perf_counter() - begin
    answer = {
        "errors": errors, "wrong": wrong, "kernels": launched,
        "sets": data.sets, "check_s": checked,
    }  # fmt: skip
    if wrong:
        for name in ("numbabn", "numbabn fresh"):
            ways.pop(name, None)
    Subject.cycles_per_second = Subject.cycles_per_second or clock()
    subjects = {name: Subject(call, data.sets) for name, call in (ways | copy_ways(data)).items()}
    end = time.perf_counter() + SECONDS
    for k in range(MOST):
        for subject in subjects.values():
            subject.sample()
        if k + 1 >= LEAST and time.perf_counter() > end:
            break
    times = {name: subject.document() for name, subject in subjects.items()}
    return answer | {"times": times, "traffic": case.traffic, "bytes": case.nbytes}


def per_call(call: Any, calls: int = 300, repeats: int = 7) -> float:
    """Microseconds of the host for one call; it never waits for the device in between."""
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return 1e6 * median(found)


def host(request: dict[str, Any]) -> dict[str, Any]:
    """Take the host's time of each way to do an operation on a small array."""
    case = Case(request["op"], "nchw", "float16", tuple(request["shape"]))
    if request["pieces"]:
        return pieces(Buffers(case))
    data = Buffers(case)
    return {
        f"{case.op}, {name}": attempt(lambda call=call: per_call(lambda: call(0)))
        for name, call in (numbabn_ways(data) | torch_ways(data)).items()
    }


def attempt(call: Any) -> Any:
    """Give a result, or why there is none."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


def pieces(data: Buffers) -> dict[str, Any]:
    """Take the host's time of the steps of a forward call, each by itself."""
    from numbabn import cuda

    x, out, w, b = data.x[0], data.out[0], data.weight, data.bias
    mean, var = data.running["numbabn"]
    arrays = {
        "x": x, "weight": w, "bias": b, "running_mean": mean, "running_var": var,
        "residual": None, "out": out,
    }  # fmt: skip
    found: dict[str, Any] = {}

    def take(name: str, call: Any) -> None:
        found[name] = attempt(lambda: per_call(call))

    take("borrow 6 arrays", lambda: backends.borrow(None, **arrays))
    seen = dict(zip(arrays, backends.borrow(None, **arrays), strict=True))
    given = [seen[name] for name in ("x", "weight", "bias", "running_mean", "running_var")]
    take(
        "check",
        lambda: functional._check_forward(*given, MOMENTUM, EPS, 1, None, None, 1, seen["out"]),
    )
    backend = backends.backend_of("x", seen["x"])
    take("allocate y", lambda: backend.empty_like(seen["x"]))
    take(
        "allocate one number per channel",
        lambda: backend.empty((x.shape[1],), np.float64, seen["x"]),
    )
    take("arrange", lambda: layout.arrange(backend, 1, (seen["x"], None), (seen["out"],)))
    laid = layout.arrange(backend, 1, (seen["x"], None), (seen["out"],))
    *maps, mask = laid.views
    take("describe the call", lambda: cuda._Call(laid, tuple(maps), mask))
    call = attempt(lambda: cuda._Call(laid, tuple(maps), mask))

    def alone() -> None:
        with call.alone():
            pass

    take("make the device current, take the lock", alone)
    launch, launched = cuda.runner.launch, []
    cuda.runner.launch = lambda *arguments: (launched.append(arguments), launch(*arguments))[1]
    try:
        attempt(lambda: numbabn.batch_norm_forward(x, w, b, mean, var, out=out))
    finally:
        cuda.runner.launch = launch
    for arguments in launched:
        take(f"launch {arguments[1]}", lambda arguments=arguments: launch(*arguments))
    take(
        "backend.forward, whole",
        lambda: backend.forward(laid, tuple(given[1:]), EPS, 0.1, 1, False),
    )
    return found


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Compile kernels, on the host alone."""
    from numbabn.cuda import compilation

    begin, done = time.perf_counter(), 0
    failed: dict[str, list[str]] = {}
    wanted = {tuple(each) for each in request["variants"]}
    for variant in compilation.variants():
        if (variant.view, variant.format, variant.width) in wanted:
            try:
                compilation.compiled(variant, tuple(request["capability"]))
                done += 1
            except Exception as error:
                failed.setdefault(f"{type(error).__name__}: {error}", []).append(str(variant))
    problems = [f"{', '.join(those[:3])} ({len(those)}): {why}" for why, those in failed.items()]
    return {"compiled": done, "seconds": time.perf_counter() - begin, "problems": problems}


def kernels(request: dict[str, Any]) -> dict[str, Any]:
    """Say what the assembler gave each kernel."""
    from numbabn.cuda import compilation

    found = {}
    for kernel, view, form, width in request["variants"]:
        variant = compilation.Variant(kernel, view, form, width)
        report = compilation.compiled(variant, torch.cuda.get_device_capability()).report
        numbers = {
            key: sum(map(int, re.findall(pattern, report)))
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "spilled": r"(\d+) bytes spill",
                "stack": r"(\d+) bytes stack",
            }.items()
        }
        found[str(variant)] = numbers
    return {"kernels": found}


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Say what device this is."""
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "memory_bytes": device.total_memory,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "wait_cycles_per_second": clock(),
        "numbabn": numbabn.__version__,
        "dtypes": list(DTYPES),
    }


REQUESTS = {f.__name__: f for f in (facts, prepare, measure, host, kernels)}


def main() -> None:
    """Answer until there are no more requests."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    with torch.no_grad():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = REQUESTS[request["do"]](request)
            except Exception as error:
                print(traceback.format_exc(), file=sys.stderr, flush=True)
                answer = {"failed": f"{type(error).__name__}: {str(error)[:1000]}"}
                try:
                    torch.cuda.synchronize()
                except Exception:
                    answer["lost"] = True
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
