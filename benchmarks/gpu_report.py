"""One call on a machine with a GPU: every GPU test, then the figures, in one report.

``python benchmarks/gpu_report.py --out DIR`` takes some seven minutes, less than eight, and needs
Python with numba, numba-cuda, PyTorch and pytest, CuPy for some of the tests; it installs nothing.
Whatever fails is told in the report and stops nothing else, and what is known so far is always
written: ``report.md`` to read, ``report.json`` with everything, ``tests.txt`` with pytest's words.

Device times are of CUDA events around many calls that the host has enqueued while the device
waited, over sets of buffers that together fill three L2 caches; medians of samples in turns.
Kernels, numbabn's and torch.compile's, are compiled ahead by many processes into folders on disk.
"""

import argparse
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_tables import readable, summary
from gpu_targets import BATCHES, FIELD, SMALL, compared, name_of
from gpu_targets import table as asked

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BUDGET = 430.0  # seconds for everything
# When a part ends at the latest; what ends early leaves its time to the rest, and the last one,
# torch.compile, takes what there is. Expected: 40, 140, 165, 310, 320, 335.
ENDS = {
    "compilation": 80.0, "tests": 185.0, "tests that time": 215.0, "figures": 345.0,
    "host": 360.0, "variants": 378.0,
}  # fmt: skip
SLOWEST = 60.0  # for one answer
SLOWEST_CASE = 25.0  # likewise, with the start of a process where the last one was lost
EVERY = 5.0  # the report of hundreds of cases takes a tenth of a second to write
INDUCTORS = 6  # processes for torch.compile, beside the tests
PACKAGES = (
    "numpy", "numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "nvidia-nvjitlink",
    "ml_dtypes", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "pytest",
)  # fmt: skip
# Tests in processes side by side, each compiling only what it needs.
SHARDS = {
    "functional, float16": ("test_functional.py", "float16 and not bfloat16"),
    "functional, bfloat16": ("test_functional.py", "bfloat16"),
    "functional, float32": ("test_functional.py", "float32 and not float16"),
    "functional, float64": ("test_functional.py", "float64"),
    "functional, rest": ("test_functional.py", "not float16 and not float32 and not float64"),
    "arrays": ("test_arrays.py", ""),
    "streams": ("test_streams.py", ""),
    "launches": ("test_launch.py", ""),
    "graphs": ("test_graphs.py", ""),
    "large": ("test_large.py", ""),
    "device": ("test_device.py", ""),
    **{
        f"sanitizer, {tool}": ("test_sanitizer.py", tool)
        for tool in ("memcheck", "racecheck", "synccheck")
    },
}
# By themselves, afterwards.
TIMING = {"bench": ("test_bench.py", "")}
OPS = ("forward", "inference", "backward")
FAILURES = 3  # of a kind of cases, after which no more are tried
LOST = 6  # processes, after which no more cases are: each costs seconds
# From less than the chip holds to far more, N, C, H, W.
GROWING = [
    (8, 64, 32, 32), (32, 512, 7, 7), (32, 256, 14, 14), (32, 512, 28, 28), (32, 256, 56, 56),
    (32, 64, 112, 112), (256, 1024, 14, 14), (256, 256, 56, 56),
]  # fmt: skip


def cases_of(quick: bool) -> list[dict[str, Any]]:
    """List what is timed, the most important first."""
    from numbabn.cli.bench.suites import SUITES

    images = SUITES["resnet50"].images
    if quick:
        shapes = [("nchw", "float16", (32, *images[5])), ("nhwc", "float32", (32, *images[8]))]
        return [_case(op, *each) for op in OPS for each in shapes]
    found = [_case("forward", "nchw", "float16", shape) for shape in FIELD]
    for dtype in ("float16", "float32"):
        for N in BATCHES:
            for layout in ("nchw", "nhwc"):
                found += [_case(op, layout, dtype, (N, *s)) for op in OPS for s in images]
    return found


def compiled_of(quick: bool) -> list[dict[str, Any]]:
    """List what is compared with torch.compile: a few images of all kinds before the next ones."""
    from numbabn.cli.bench.suites import SUITES

    if quick:
        return [_case("forward", "nchw", "float16", SMALL)]
    images = SUITES["resnet50"].images
    mixed = [images[5 * k % len(images)] for k in range(len(images))]
    return [_case("forward", "nchw", "float16", shape) for shape in FIELD] + [
        _case(op, layout, dtype, (N, *image))
        for image in mixed
        for dtype in ("float16", "float32")
        for N in BATCHES
        for layout in ("nchw", "nhwc")
        for op in ("forward", "backward")
    ]


def variants_of(quick: bool) -> list[dict[str, Any]]:
    """List what is timed held and swept twice, of both views."""
    return [
        _case(op, layout, "float16", shape)
        for shape in (GROWING[:1] if quick else GROWING)
        for layout in ("nchw", "nhwc")
        for op in ("forward", "backward")
    ]


def _case(op: str, layout: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"op": op, "layout": layout, "dtype": dtype, "shape": list(shape)}


class Worker:
    """`gpu_figures` in a process of its own, started again where it was lost."""

    def __init__(self, log: Any) -> None:
        self.log = log
        self.process: Any = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", ROOT / "benchmarks" / "gpu_figures.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT,
        )  # fmt: skip
        self.lines: queue.Queue[str] = queue.Queue()
        arguments = self.process, self.lines
        self.reader = threading.Thread(target=self._read, args=arguments, daemon=True)
        self.reader.start()

    @staticmethod
    def _read(process: Any, lines: Any) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def send(self, do: str, **request: Any) -> None:
        """Ask, without waiting for the answer."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        except OSError:
            self.lines.put("")

    def answer(self, timeout: float) -> dict[str, Any]:
        """Wait for the answer; a process that is lost, or late, is ended."""
        try:
            line = self.lines.get(timeout=max(timeout, 1.0))
            answer: dict[str, Any] = json.loads(line) if line else {"failed": "the process died"}
        except queue.Empty:
            line, answer = "", {"failed": f"no answer within {timeout:.0f} s"}
        if not line or answer.get("lost"):
            self.stop()
        return answer

    def ask(self, do: str, timeout: float, **request: Any) -> dict[str, Any]:
        self.send(do, **request)
        return self.answer(timeout)

    def kill(self) -> None:
        """End the process, of whatever thread; who waits for its answer learns that it died."""
        process = self.process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        if self.process is not None:
            self.kill()
            with suppress(subprocess.TimeoutExpired):  # who hangs in the driver is left behind
                self.process.wait(20)
            self.reader.join(10)
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):
                    pipe.close()
            self.process = None


class Crew:
    """Workers side by side, each of which takes the next request when it is done with the last.

    Attributes
    ----------
    answers : list of (request, answer)
        So far.
    """

    def __init__(self, log: Any, requests: list[dict[str, Any]], size: int) -> None:
        self.answers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.waiting = deque(requests)
        self.ended = False
        self.workers = [Worker(log) for _ in range(min(size, len(requests)))]
        self.threads = [
            threading.Thread(target=self._work, args=(each,), daemon=True) for each in self.workers
        ]
        for thread in self.threads:
            thread.start()

    def _work(self, worker: Worker) -> None:
        while self.waiting and not self.ended:
            with suppress(IndexError):  # another has taken the last one
                request = self.waiting.popleft()
                try:
                    answer = worker.ask(timeout=SLOWEST, **request)
                except Exception as error:
                    answer = {"failed": f"{type(error).__name__}: {error}"}
                if not self.ended:
                    self.answers.append((request, answer))
        worker.stop()

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def finish(self, seconds: float) -> None:
        """Wait for all, not longer than that; end what is not done."""
        end = time.perf_counter() + seconds
        while self.busy and time.perf_counter() < end:
            time.sleep(0.1)
        self.ended = True
        end = time.perf_counter() + 10
        while self.busy and time.perf_counter() < end:
            for worker in self.workers:
                worker.kill()
            time.sleep(0.1)

    def failures(self) -> list[str]:
        """Tell what failed, and how often."""
        failed = Counter(answer["failed"] for _, answer in self.answers if "failed" in answer)
        return [f"{times} times: {why}" for why, times in failed.items()]


class Report:
    """What is known so far, written after every part, and every few seconds of a long one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun = self.written = time.perf_counter()
        self.found: dict[str, Any] = {
            "environment": {}, "seconds": {}, "problems": [], "tests": {}, "cases": [],
            "compiled": [], "variants": [], "host": [], "kernels": {},
        }  # fmt: skip

    def until(self, part: str) -> float:
        """Seconds that are left to a part."""
        return ENDS[part] - (time.perf_counter() - self.begun)

    @property
    def left(self) -> float:
        """Seconds that are left to everything."""
        return BUDGET - (time.perf_counter() - self.begun)

    def problem(self, text: str) -> None:
        text = " ".join(text.split())
        self.found["problems"].append(text)
        self.say(f"PROBLEM {text[:200]}")

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self.begun:6.1f} s  {text}", flush=True)

    @contextmanager
    def part(self, name: str) -> Any:
        """Time a part; what it raises is a problem, and no more."""
        begin = time.perf_counter()
        self.say(name)
        try:
            yield
        except Exception as error:
            self.problem(f"{name}: {type(error).__name__}: {error}")
        self.found["seconds"][name] = time.perf_counter() - begin
        self.write()

    def write_if_due(self) -> None:
        if time.perf_counter() - self.written > EVERY:
            self.write()

    def write(self) -> None:
        self._write("report.json", json.dumps(clean(self.found), indent=1, default=str))
        try:
            text = readable(self.found)
        except Exception:
            text = f"Not readable, see report.json\n\n```\n{traceback.format_exc()}```\n"
        self._write("report.md", text)
        self.written = time.perf_counter()

    def _write(self, name: str, text: str) -> None:
        partial = self.folder / (name + ".partial")
        partial.write_text(text)
        partial.replace(self.folder / name)


def clean(value: Any) -> Any:
    """Write what is not finite as text, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [clean(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# Tests.


def start_tests(shards: dict[str, tuple[str, str]], folder: Path) -> dict[str, tuple[Any, Path]]:
    """Start pytest for each shard."""
    running = {}
    for name, (file, keyword) in shards.items():
        path = folder / f"{name}.txt"
        command = [
            sys.executable, "-m", "pytest", f"tests/gpu/{file}", "-m", "gpu", "-k", keyword,
            "-p", "no:cacheprovider", "-W", "default", "-rfEs", "--tb=short", "--durations=5",
        ]  # fmt: skip
        with path.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "4"},
            )  # fmt: skip
        running[name] = process, path
    return running


def finish_tests(report: Report, running: dict[str, tuple[Any, Path]], seconds: float) -> None:
    """Wait for all shards, not longer than that; sum up what each of them said."""
    end = time.perf_counter() + seconds
    while any(process.poll() is None for process, _ in running.values()):
        if time.perf_counter() > end:
            break
        time.sleep(0.2)
    for process, _ in running.values():
        if process.poll() is None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
    for name, (process, path) in running.items():
        ended = process.returncode
        if ended is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
        text = path.read_text(errors="replace")
        with (report.folder / "tests.txt").open("a") as file:
            file.write(f"===== {name}\n{text}\n")
        lines = text.splitlines()
        kept = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
        last = lines[-1] if lines else "said nothing"
        if ended is None:
            last = f"stopped after {seconds:.0f} s, at {last[-60:]!r}"
        # 5: nothing is selected, where a keyword fits no test.
        good = ended in (0, 5)
        report.found["tests"][name] = {"good": good, "exit": ended, "last": last, "lines": kept}
        if not good:
            report.problem(f"tests, {name}: {last}")


# Figures.


def time_cases(
    report: Report, worker: Worker, key: str, cases: list[dict[str, Any]], end: float, **how: Any
) -> None:
    """Measure until so many seconds are left; of what fails again and again, no more."""
    failures: Counter[str] = Counter()
    lost = 0
    for k, case in enumerate(cases):
        if report.left < end:
            report.problem(f"{key}: no time for {len(cases) - k} of {len(cases)}")
            return
        kind = f"{case['op']} {case['layout']} {case['dtype']}"
        if failures[kind] == FAILURES:
            continue
        answer = worker.ask("measure", min(SLOWEST_CASE, report.left - 3), **how, **case)
        add(report, key, case, answer)
        lost += worker.process is None
        if lost == LOST:
            report.problem(f"{key}: no more of {len(cases) - k - 1} after {LOST} lost processes")
            return
        failures[kind] += "failed" in answer
        if "failed" in answer and failures[kind] == FAILURES:
            report.problem(f"{key}, {kind}: no more of these after {FAILURES} failures")


def time_compiled(report: Report, worker: Worker, cases: list[dict[str, Any]]) -> None:
    """Measure torch.compile while there is time."""
    failed = 0
    for k, case in enumerate(cases):
        if report.left < 8 or failed == FAILURES:
            report.problem(f"torch.compile: {len(cases) - k} of {len(cases)} cases left out")
            return
        seconds = min(SLOWEST_CASE, report.left - 3)
        answer = worker.ask("measure", seconds, ways=["numbabn", "compile"], seconds=0.1, **case)
        if "torch.compile" not in answer.get("times", {}):
            failed += 1
            report.problem(f"torch.compile: {answer.get('errors', {}).get('torch.compile', '-')}")
        add(report, "compiled", case, answer)


def add(report: Report, key: str, case: dict[str, Any], answer: dict[str, Any]) -> None:
    """Add a case's answer, with what follows from it."""
    row = case | answer
    report.found[key].append(row)
    row |= compared(row)
    for text in [answer.get("failed"), *answer.get("wrong", [])]:
        if text:
            report.problem(f"{name_of(case)}: {text}")
    if "numbabn" in answer.get("times", {}):
        ms = answer["times"]["numbabn"]["ms"]
        report.say(
            f"{name_of(case)}: {ms:.4f} ms, {row.get('of_copy', 0):.2f} of a copy, "
            f"{row.get('times_as_fast', 0):.2f} times {row.get('best')}"
        )
    report.write_if_due()


# Environment.


def environment() -> dict[str, Any]:
    """Versions, and what the driver's own tool says, which changes nothing."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found | {"nvidia-smi": driver()}


def driver() -> str:
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    return done.stdout.strip().replace("\n", "; ") or done.stderr.strip()[:200]


def lacking() -> str | None:
    """Say what keeps the report from being made here."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--quick", action="store_true", help="a few of everything, for a smoke test"
    )
    parser.add_argument("--no-tests", action="store_true", help="only the figures")
    args = parser.parse_args()
    if why := lacking():
        print(f"gpu_report: expected a machine with a CUDA device, but {why}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tests.txt").unlink(missing_ok=True)
    report = Report(args.out)
    schedule = ", ".join(f"{name} {end:.0f}" for name, end in ENDS.items())
    report.say(f"seconds at which parts end at the latest: {schedule}, everything {BUDGET:.0f}")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        (Path(folder) / "worker.txt").open("w+") as log,
    ):
        os.environ |= {
            "NUMBA_CACHE_DIR": f"{folder}/numba",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in the process itself: there are several
        }
        worker = Worker(log)
        try:
            work(report, worker, args, Path(folder))
        finally:
            worker.stop()
        log.seek(0)
        report.found["worker_log"] = log.read()[-20000:]
    report.write()
    print("\n" + asked(report.found) + "\n" + summary(report.found))
    return 1 if report.found["problems"] else 0


def work(report: Report, worker: Worker, args: argparse.Namespace, folder: Path) -> None:
    """Do all parts."""
    found, log = report.found, worker.log
    compiled = compiled_of(args.quick)
    with report.part("environment"):
        found["environment"] = environment()
        facts = worker.ask("facts", SLOWEST)
        if "failed" in facts:
            report.problem(f"device: {facts['failed']}")
        found["environment"] |= facts
    with report.part("compilation"):
        compile_kernels(report, worker, args.quick)
    with report.part("tests"):
        requests = [{"do": "compile_for", **case} for case in compiled]
        inductors = Crew(log, requests, INDUCTORS)
        try:
            if not args.no_tests:
                shards = {"arrays": ("test_arrays.py", "statistics")} if args.quick else SHARDS
                finish_tests(report, start_tests(shards, folder), report.until("tests"))
        finally:
            inductors.finish(report.until("tests"))
            found["compiled_ahead"] = inductors.answers
        for text in inductors.failures():
            report.problem(f"torch.compile, ahead: {text}")
    with report.part("tests that time"):
        if not (args.no_tests or args.quick):
            finish_tests(report, start_tests(TIMING, folder), report.until("tests that time"))
    with report.part("figures"):
        ways = ["numbabn", "fresh", "torch", "copy"]
        end = BUDGET - ENDS["figures"]
        time_cases(report, worker, "cases", cases_of(args.quick), end, ways=ways, hot=True)
    with report.part("host"):
        answer = worker.ask("host", max(5.0, report.until("host")), shape=SMALL)
        if "failed" in answer:
            report.problem(f"host: {answer['failed']}")
        found["host"] = answer.get("calls", [])
    with report.part("variants"):
        ways = ["numbabn", "swept", "copy"]
        end = BUDGET - ENDS["variants"]
        time_cases(report, worker, "variants", variants_of(args.quick), end, ways=ways, seconds=0.1)
    with report.part("kernels"):
        found["environment"]["nvidia-smi, after the figures"] = driver()
        used = {
            tuple(each[key] for key in ("kernel", "view", "format", "width"))
            for row in found["cases"] + found["variants"]
            for launched in row.get("kernels", {}).values()
            for each in launched
        }
        answer = worker.ask("kernels", SLOWEST, variants=sorted(used))
        found["kernels"] = answer.get("kernels", {})
        if "failed" in answer:
            report.problem(f"kernels: {answer['failed']}")
    with report.part("torch.compile"):
        ahead = [request["shape"] for request, _ in found.get("compiled_ahead", [])]
        report.say(f"{len(ahead)} of {len(compiled)} cases compiled ahead")
        time_compiled(report, worker, compiled)


def compile_kernels(report: Report, worker: Worker, quick: bool) -> None:
    """Compile all of numbabn's kernels, on all cores, for the tests and the figures to find."""
    capability = report.found["environment"].get("capability", [9, 0])
    answer = worker.ask("variants", SLOWEST)
    if "failed" in answer:
        raise RuntimeError(answer["failed"])
    requests = [
        {"do": "assemble", "variant": variant, "capability": capability}
        for variant in answer["variants"][: 24 if quick else None]
    ]
    crew = Crew(worker.log, requests, len(os.sched_getaffinity(0)))
    crew.finish(report.until("compilation"))
    done = [given["seconds"] for _, given in crew.answers if "seconds" in given]
    report.say(f"{len(done)} of {len(requests)} kernels compiled, {sum(done):.0f} s of cores")
    report.found["compilation"] = {"compiled": len(done), "seconds": sum(done)}
    for text in crew.failures():
        report.problem(f"compilation: {text}")


if __name__ == "__main__":
    sys.exit(main())
