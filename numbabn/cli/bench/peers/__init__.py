"""The peers: other libraries that normalize batches, each in a process of its own.

A process per peer keeps thread pools and allocators apart. It is spoken to in lines of JSON over
pipes, makes the same data as numbabn has, and sleeps in a read while others are timed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cases import Case
from ..sampling import Sample, Timing

# What must be importable for each.
NEEDS = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "jax": ("jax",),
}
# Which there are on each device. JAX's call waits for its result, so that events cannot time it.
ON = {"cpu": tuple(NEEDS), "cuda": ("torch",)}
# A program by name would find another numbabn than this where this one is not installed.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1));"
    "from numbabn.cli.bench.peers.worker import main; main()"
)
_ROOT = Path(__file__).parents[4]


def missing(name: str) -> list[str]:
    """List the packages that a peer lacks here."""
    return [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]


class PeerError(Exception):
    """A peer that cannot do what it was asked."""


class Peer:
    """The process of one peer, started when first needed and again if it died.

    Parameters
    ----------
    name : str
        A key of `NEEDS`.
    threads : int
        How many it may use.
    device : str
        The device's name.
    """

    def __init__(self, name: str, threads: int, device: str = "cpu") -> None:
        self.name = name
        self.version = ""
        self._threads = threads
        self._device = device
        self._process: subprocess.Popen[str] | None = None
        self._samples: dict[str, list[Sample]] = {}

    def start(self) -> None:
        """Start the process; raise PeerError if the peer cannot be loaded."""
        threads = str(self._threads)
        # Read by OpenMP, MKL, OpenBLAS and XLA when they are loaded.
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(_ROOT), self.name, threads, self._device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | dict.fromkeys(pools, threads),
        )
        self.version = self._answer()["version"]

    def prepare(self, case: Case) -> None:
        """Make the data of a case and warm up; raise PeerError if the peer cannot do it."""
        self._samples = {}
        if self._process is None:
            self.start()
        self._ask(do="prepare", case=asdict(case))

    def sample(self, most: int) -> None:
        """Let it work for a turn, of `most` samples at most, the others being idle."""
        for variant, samples in self._ask(do="sample", most=most)["samples"].items():
            self._samples.setdefault(variant, []).extend(Sample(*sample) for sample in samples)

    def timings(self) -> dict[str, Timing]:
        """Summarize the samples of each of its ways to do the case."""
        return {variant: Timing.of(samples) for variant, samples in self._samples.items()}

    def release(self) -> None:
        """Let go of the case's data."""
        if self._process is not None:
            self._ask(do="release")

    def close(self) -> int:
        """End the process; return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it died with a request unread
            process.stdin.close()
        try:
            code = process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        return code

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died, which the answer tells
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"its process ended with code {self.close()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


@contextmanager
def started(name: str, threads: int, device: str = "cpu") -> Iterator[Peer]:
    """Start a peer, and end it afterwards."""
    peer = Peer(name, threads, device)
    try:
        peer.start()
        yield peer
    finally:
        peer.close()
