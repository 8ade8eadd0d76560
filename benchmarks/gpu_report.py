"""One call on a machine with a GPU: every GPU test, then the figures, in one report.

``python benchmarks/gpu_report.py --out DIR`` takes less than eight minutes and needs Python with
numba, numba-cuda, PyTorch and pytest, CuPy for some of the tests; it installs nothing. Whatever
fails is told in the report and stops nothing else, and what is known so far is always written:
``report.md`` to read, ``report.json`` with everything, ``tests.txt`` with what pytest said.

Device times are of CUDA events around many calls that the host has enqueued while the device
waited, over sets of buffers that together fill three L2 caches; medians of samples in turns.
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
from collections import Counter
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BUDGET = 450.0  # seconds for everything
TESTS = 150.0  # of them for the tests, at most
RESERVE = 110.0  # of them kept from the figures for torch.compile
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
    **{
        f"sanitizer, {tool}": ("test_sanitizer.py", tool)
        for tool in ("memcheck", "racecheck", "synccheck")
    },
}
FIELD = [(4, 128, 1024, 1024), (8, 64, 32, 32), (4, 256, 28, 28)]  # float16, as others report
OPS = ("forward", "inference", "backward")
SMALL = (8, 64, 32, 32)
# Compiled ahead, while the tests run: what the figures' shapes take.
VARIANTS = [
    ("planes", "float16", 8), ("rows", "float16", 8), ("planes", "float32", 4),
    ("rows", "float32", 4), ("planes", "float16", 1), ("planes", "float32", 1),
    ("planes", "float16", 4), ("planes", "float16", 2),
]  # fmt: skip
FAILURES = 3  # cases of a kind that the process may die of
PYTORCH = ("cuDNN", "native", "torch.compile")
COPIES = ("copy", "copy by a kernel")


def cases_of(quick: bool) -> list[dict[str, Any]]:
    """List what is timed, the most important first."""
    from numbabn.cli.bench.suites import SUITES

    images = SUITES["resnet50"].images
    if quick:
        shapes = [("nchw", "float16", (32, *images[5])), ("nhwc", "float32", (32, *images[8]))]
        return [_case(op, *each) for op in OPS for each in shapes]
    found = [_case("forward", "nchw", "float16", shape) for shape in FIELD]
    for dtype in ("float16", "float32"):
        for N in (256, 32):
            for layout in ("nchw", "nhwc"):
                found += [_case(op, layout, dtype, (N, *s)) for op in OPS for s in images]
    return found


def compiled_of(quick: bool) -> list[dict[str, Any]]:
    """List what is compared with torch.compile, which takes long to begin, likewise."""
    if quick:
        return [_case("forward", "nchw", "float16", SMALL)]
    large, middle = (256, 64, 112, 112), (256, 1024, 14, 14)
    return [
        *(_case("forward", "nchw", "float16", shape) for shape in FIELD),
        _case("backward", "nchw", "float16", large),
        _case("forward", "nhwc", "float16", large),
        _case("forward", "nchw", "float16", middle),
        _case("backward", "nhwc", "float16", large),
        _case("backward", "nchw", "float16", middle),
        _case("forward", "nchw", "float32", large),
        _case("inference", "nchw", "float16", large),
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

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.reader.join(10)
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):
                    pipe.close()
            self.process = None


class Report:
    """What is known so far, written after every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun = time.perf_counter()
        self.found: dict[str, Any] = {
            "environment": {}, "seconds": {}, "problems": [],
            "tests": {}, "cases": [], "compiled": [], "host": {}, "kernels": {},
        }  # fmt: skip

    @property
    def left(self) -> float:
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

    def write(self) -> None:
        for name, text in (
            ("report.json", json.dumps(clean(self.found), indent=1)),
            ("report.md", readable(self.found)),
        ):
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


def start_tests(quick: bool, folder: Path) -> dict[str, tuple[Any, Path]]:
    """Start pytest for each shard."""
    shards = {"arrays": ("test_arrays.py", "statistics")} if quick else SHARDS
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


def finish_tests(report: Report, running: dict[str, tuple[Any, Path]]) -> None:
    """Wait for all shards, not for long; sum up what each of them said."""
    begin = report.begun
    while any(process.poll() is None for process, _ in running.values()):
        if time.perf_counter() - begin > TESTS:
            break
        time.sleep(0.2)
    texts = []
    for name, (process, path) in running.items():
        ended = process.poll()
        if ended is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        text = path.read_text(errors="replace")
        texts.append(f"===== {name}\n{text}")
        lines = text.splitlines()
        kept = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
        last = lines[-1] if lines else "said nothing"
        if ended is None:
            last = f"stopped after {TESTS:.0f} s, at {last[-60:]!r}"
        # 5: nothing is selected, where a keyword fits no test.
        good = ended in (0, 5)
        report.found["tests"][name] = {"good": good, "exit": ended, "last": last, "lines": kept}
        if not good:
            report.problem(f"tests, {name}: {last}")
    (report.folder / "tests.txt").write_text("\n".join(texts))


# Figures.


def time_cases(report: Report, worker: Worker, cases: list[dict[str, Any]], until: float) -> None:
    """Measure until so many seconds are left; of what fails again and again, no more."""
    failures: Counter[str] = Counter()
    for k, case in enumerate(cases):
        if report.left < until:
            report.problem(f"no time for {len(cases) - k} of {len(cases)} cases")
            return
        kind = f"{case['op']} {case['layout']} {case['dtype']}"
        if failures[kind] == FAILURES:
            continue
        answer = worker.ask("measure", min(60.0, report.left), **case)
        add(report, "cases", case, answer)
        failures[kind] += "failed" in answer
        if "failed" in answer and failures[kind] == FAILURES:
            report.problem(f"{kind}: no more of these after {FAILURES} failures")


def time_compiled(report: Report, worker: Worker, cases: list[dict[str, Any]]) -> None:
    """Measure torch.compile while there is time."""
    failed = 0
    for k, case in enumerate(cases):
        if report.left < 30 or failed == 2:
            report.problem(f"torch.compile: {len(cases) - k} of {len(cases)} cases left out")
            return
        answer = worker.ask("measure", report.left - 10, compile=True, **case)
        if "torch.compile" not in answer.get("times", {}):
            failed += 1
            report.problem(f"torch.compile: {answer.get('errors', {}).get('torch.compile')}")
        add(report, "compiled", case, answer)


def add(report: Report, key: str, case: dict[str, Any], answer: dict[str, Any]) -> None:
    """Add a case's answer, with what follows from it."""
    name = f"{case['op']} {case['layout']} {case['dtype']} {shape_of(case)}"
    times = answer.get("times", {})
    row = case | answer
    ours = times.get("numbabn")
    copies = [times[way]["ms"] for way in COPIES if way in times]
    theirs = {way: times[way]["ms"] for way in PYTORCH if way in times}
    if ours and copies:
        row["gb_s"] = answer["traffic"] / ours["ms"] / 1e6
        row["copy_gb_s"] = 2 * answer["bytes"] / min(copies) / 1e6
        row["of_copy"] = row["gb_s"] / row["copy_gb_s"]
    if ours and theirs:
        row["best"] = min(theirs, key=lambda way: theirs[way])
        row["times_as_fast"] = theirs[row["best"]] / ours["ms"]
    report.found[key].append(row)
    for text in [answer.get("failed"), *answer.get("wrong", [])]:
        if text:
            report.problem(f"{name}: {text}")
    if ours:
        report.say(f"{name}: {ours['ms']:.4f} ms, {row.get('of_copy', 0):.2f} of a copy")
    report.write()


def shape_of(case: dict[str, Any]) -> str:
    return "x".join(map(str, case["shape"]))


# What is read.


def readable(found: dict[str, Any]) -> str:
    """Write the report in Markdown, the summary first."""
    parts = [
        summary(found),
        table("Against PyTorch in eager mode", found["cases"]),
        table("Against torch.compile", found["compiled"]),
        "## Host\n\nMicroseconds for one call on "
        f"{'x'.join(map(str, SMALL))} float16, nothing waited for.\n",
        listing(found["host"].get("us", {})),
        "Of a forward call into a given result:\n",
        listing(found["host"].get("pieces_us", {})),
        "## Kernels\n\nRegisters of a thread, bytes of shared memory of a block, bytes spilled.\n",
        listing({
            name: f"{each['registers']}, {each['shared']}, {each['spilled']}"
            for name, each in found["kernels"].items()
        }),
        "## Seconds\n",
        listing({name: f"{each:.1f}" for name, each in found["seconds"].items()}),
    ]  # fmt: skip
    return "\n".join(parts)


def summary(found: dict[str, Any]) -> str:
    """Sum up the machine, the tests, the problems, and the means of the figures."""
    lines = ["# numbabn on a GPU\n", listing(found["environment"]), "## Tests\n"]
    for name, each in found["tests"].items():
        lines.append(f"- {name}: {each['last'].strip('= ')}")
        lines += [f"  - {line[:300]}" for line in each["lines"][:12]]
    lines.append("\n## Problems\n")
    lines += [f"- {text[:600]}" for text in found["problems"]] or ["None."]
    lines.append("\n## Geometric means\n")
    lines.append("| | N | cases | of a copy | times PyTorch's best |")
    lines.append("|---|---|---|---|---|")
    for title, group in groups(found["cases"]):
        means = [mean(row.get(key) for row in group) for key in ("of_copy", "times_as_fast")]
        N = group[0]["shape"][0]
        lines.append(f"| {title} | {N} | {len(group)} | {means[0]:.2f} | {means[1]:.2f} |")
    return "\n".join(lines) + "\n"


def groups(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["op"], row["layout"], row["dtype"], row["shape"][0]

    ordered = sorted(rows, key=key)
    return [(" ".join(k[:3]), list(group)) for k, group in groupby(ordered, key)]


def mean(numbers: Any) -> float:
    logarithms = [math.log(number) for number in numbers if number]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """One line for each shape."""
    lines = [
        f"## {title}\n",
        "Milliseconds on the device. GB/s count 1 read and 1 write of x, backward 2 and 1; the "
        "copy is of x, by the faster of two ways. numbabn writes into a given result, or a fresh "
        "one.\n",
    ]
    for name, group in groups(rows):
        lines.append(f"\n### {name}, N = {group[0]['shape'][0]}\n")
        lines.append(
            "| shape | ms | ± | fresh | GB/s | copy GB/s | of copy | cuDNN | native "
            "| compile | times the best | kernels |"
        )
        lines.append("|" + "---|" * 12)
        lines += [line(row) for row in group]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    times = row.get("times", {})
    ours = times.get("numbabn")

    def ms(way: str) -> str:
        return f"{times[way]['ms']:.4f}" if way in times else "-"

    spread = (ours["upper"] - ours["lower"]) / 2 / ours["ms"] if ours else 0.0
    dry = "!" if any(each["exposed"] for each in times.values()) else ""
    why = "" if ours else (row.get("failed") or "; ".join(row.get("wrong", [])) or "-")[:80]
    kernels = ", ".join(f"{k[0]} x{k[3]} {k[4]}" for k in row.get("kernels", []))
    cells = [
        "x".join(map(str, row["shape"])) + dry, ms("numbabn") if ours else why,
        f"{100 * spread:.0f}%", ms("numbabn fresh"), f"{row.get('gb_s', 0):.0f}",
        f"{row.get('copy_gb_s', 0):.0f}", f"{row.get('of_copy', 0):.2f}",
        *(ms(way) for way in PYTORCH), f"{row.get('times_as_fast', 0):.2f}", kernels,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def listing(values: Any) -> str:
    if not isinstance(values, dict):
        return f"{values}\n"
    rows = [f"| {k} | {f'{v:.2f}' if isinstance(v, float) else v} |" for k, v in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"


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
    report = Report(args.out)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "worker.txt").open("w+") as log:
        worker = Worker(log)
        try:
            work(report, worker, args, Path(folder))
        finally:
            worker.stop()
        log.seek(0)
        report.found["worker_log"] = log.read()[-20000:]
    report.write()
    print("\n" + summary(report.found))
    return 1 if report.found["problems"] else 0


def work(report: Report, worker: Worker, args: argparse.Namespace, folder: Path) -> None:
    """Do all parts."""
    found = report.found
    tests: dict[str, tuple[Any, Path]] = {}
    with report.part("environment"):
        found["environment"] = environment()
        facts = worker.ask("facts", 90)
        if "failed" in facts:
            report.problem(f"device: {facts['failed']}")
        found["environment"] |= facts
    with report.part("start of the tests"):
        if not args.no_tests:
            tests = start_tests(args.quick, folder)
    with report.part("compilation of the figures' kernels, beside the tests"):
        capability = found["environment"].get("capability", [9, 0])
        answer = worker.ask("prepare", TESTS, capability=capability, variants=VARIANTS)
        for text in [
            *answer.pop("problems", []),
            *([answer["failed"]] if "failed" in answer else []),
        ]:
            report.problem(f"compilation: {text}")
        found["compilation"] = answer
    with report.part("tests"):
        finish_tests(report, tests)
    with report.part("figures"):
        time_cases(report, worker, cases_of(args.quick), RESERVE)
    found["environment"]["nvidia-smi, after the figures"] = driver()
    with report.part("host"):
        for key, op in (*(("us", op) for op in OPS), ("pieces_us", "forward")):
            answer = worker.ask("host", 30, op=op, shape=SMALL, pieces=key == "pieces_us")
            if "failed" in answer:
                report.problem(f"host, {op}: {answer['failed']}")
            else:
                found["host"].setdefault(key, {}).update(answer)
    with report.part("kernels"):
        used = {tuple(k[:4]) for row in found["cases"] for k in row.get("kernels", [])}
        answer = worker.ask("kernels", 60, variants=sorted(used))
        found["kernels"] = answer.get("kernels", {})
        if "failed" in answer:
            report.problem(f"kernels: {answer['failed']}")
    with report.part("torch.compile"):
        time_compiled(report, worker, compiled_of(args.quick))


if __name__ == "__main__":
    sys.exit(main())
