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
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_targets import COPIES
from gpu_ways import WAYS, Buffers, compile_ahead, l2_bytes

import numbabn
from numbabn.cli.bench.cases import DTYPES, Case

# Largest error by the largest expected value.
TOLERANCES = {"float32": 4e-6, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1.6e-2}
MOST_CALLS = 96  # of a sample: a stream holds some 1000 launches before the host must wait
SAMPLE = 4e-4  # seconds on the device, by as many calls as that takes
LEAST, MOST = 5, 25  # samples
SECONDS = 0.2  # of samples for a case
ROUNDS = 150  # of ten calls, of whose time on the host the median is taken


def case_of(request: dict[str, Any]) -> Case:
    return Case(request["op"], request["layout"], request["dtype"], tuple(request["shape"]))


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


@contextmanager
def recorded() -> Any:
    """List the kernels that numbabn launches meanwhile, and how."""
    from numbabn import cuda
    from numbabn.cuda import replay

    launch, launched = cuda.runner.launch, []

    def recording(
        place: Any, kernel: str, view: str, form: str, width: int, blocks: int, *arguments: Any,
        shared: int = 0, together: bool = False,
    ) -> None:  # fmt: skip
        launched.append({
            "kernel": kernel, "view": view, "format": form, "width": width, "blocks": blocks,
            "shared": shared, "together": together, "cut": arguments[-1]._asdict(),
        })  # fmt: skip
        launch(
            place, kernel, view, form, width, blocks, *arguments, shared=shared, together=together
        )

    cuda.runner.launch = recording
    replay.forget()  # what is made again goes past it
    try:
        yield launched
    finally:
        cuda.runner.launch = launch


def check(data: Buffers, ways: dict[str, Any]) -> dict[str, Any]:
    """Call everything once; tell errors, what is wrong, and the kernels of each of numbabn's ways.

    What has raised is taken from the ways.
    """
    begin = time.perf_counter()
    expected = data.expected()
    errors: dict[str, Any] = {}
    wrong: list[str] = []
    kernels: dict[str, Any] = {}
    for name in list(ways):
        ours = name.startswith("numbabn")
        reset(data)
        try:
            with recorded() as launched:
                result = ways[name](data.sets - 1)
            errors[name] = errors_of(data, expected, name, result)
            torch.cuda.synchronize()
        except Exception as error:
            torch.cuda.synchronize()  # raises where the device's state is lost
            errors[name] = f"{type(error).__name__}: {str(error)[:500]}"
            del ways[name]
            if ours:
                wrong.append(f"{name} raised {errors[name]}")
                print(traceback.format_exc(), file=sys.stderr)
            continue
        if ours:
            kernels[name] = launched
        tolerance = TOLERANCES[data.case.dtype]
        off = {key: value for key, value in errors[name].items() if not value <= tolerance}
        if off and ours:
            wrong.append(f"{name} is off by {off}")
    reset(data)
    return {
        "errors": errors, "wrong": wrong, "kernels": kernels,
        "check_s": time.perf_counter() - begin,
    }  # fmt: skip


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
    """Check some ways to do a case, then time all that are right, and copies, in turns."""
    case = case_of(request)
    torch.cuda.empty_cache()
    data = Buffers(case)
    ways: dict[str, Any] = {}
    for name in request["ways"]:
        if name != "copy":
            ways |= WAYS[name](data)
    answer = check(data, ways)
    if answer["wrong"]:
        ways = {name: call for name, call in ways.items() if not name.startswith("numbabn")}
    if "copy" in request["ways"]:
        ways |= WAYS["copy"](data)
    Subject.cycles_per_second = Subject.cycles_per_second or clock()
    subjects = {name: Subject(call, data.sets) for name, call in ways.items()}
    if request.get("hot") and case.traffic <= l2_bytes():
        for name in ("numbabn", *COPIES):
            if name in ways:
                subjects[f"{name}, hot"] = Subject(ways[name], 1)
    end = time.perf_counter() + request.get("seconds", SECONDS)
    for k in range(MOST):
        for subject in subjects.values():
            subject.sample()
        if k + 1 >= LEAST and time.perf_counter() > end:
            break
    times = {name: subject.document() for name, subject in subjects.items()}
    return answer | {
        "times": times, "sets": data.sets, "traffic": case.traffic, "bytes": case.nbytes,
        "hot_fits": case.traffic <= l2_bytes(),
    }  # fmt: skip


def compile_for(request: dict[str, Any]) -> dict[str, Any]:
    """Let torch.compile leave on disk what it makes for a case."""
    begin = time.perf_counter()
    compile_ahead(case_of(request))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return {"seconds": time.perf_counter() - begin}


def host(request: dict[str, Any]) -> dict[str, Any]:
    """Take the host's time of all calls on a small array, and of their pieces."""
    import host_path

    return {"calls": list(host_path.measured(tuple(request["shape"]), ROUNDS, "cuda"))}


def variants(request: dict[str, Any]) -> dict[str, Any]:
    """List the kernels that can be compiled, what takes longest first."""
    from numbabn.cuda import compilation

    found = compilation.variants()
    found.sort(key=lambda each: each.kernel not in ("forward", "backward"))
    return {"variants": found}


def assemble(request: dict[str, Any]) -> dict[str, Any]:
    """Compile a kernel, on the host alone, and leave it on disk."""
    from numbabn.cuda import compilation

    begin = time.perf_counter()
    compilation.compiled(compilation.Variant(*request["variant"]), tuple(request["capability"]))
    return {"seconds": time.perf_counter() - begin}


def kernels(request: dict[str, Any]) -> dict[str, Any]:
    """Say what the assembler gave each kernel."""
    from numbabn.cuda import compilation

    found = {}
    for each in request["variants"]:
        variant = compilation.Variant(*each)
        code = compilation.compiled(variant, torch.cuda.get_device_capability())
        numbers = {
            key: sum(map(int, re.findall(pattern, code.report)))
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "spilled": r"(\d+) bytes spill",
                "stack": r"(\d+) bytes stack",
            }.items()
        }
        found[str(variant)] = numbers | {"resident": code.resident}
    return {"kernels": found}


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Say what device this is."""
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": l2_bytes(),
        "memory_bytes": device.total_memory,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "wait_cycles_per_second": clock(),
        "numbabn": numbabn.__version__,
        "dtypes": list(DTYPES),
    }


REQUESTS = {f.__name__: f for f in (facts, variants, assemble, compile_for, measure, host, kernels)}


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
