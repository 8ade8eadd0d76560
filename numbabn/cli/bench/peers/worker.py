"""The program of a peer's process: ``worker NAME THREADS DEVICE``.

Reads requests from standard input, one JSON object a line, and answers each by one line: what was
asked for, or ``{"error": ...}``. Ends when its input does.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any

from .. import arrays, devices
from ..cases import Case
from ..sampling import Sample, Sampler, in_turn


class Unable(Exception):  # noqa: N818 - no fault of anyone's
    """The peer has no such operation, layout or dtype."""


def main() -> None:
    """Serve until the input ends."""
    name, threads, device = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers, name, threads, device)


def serve(
    requests: IO[str], answers: IO[str], name: str, threads: int, device: str = "cpu"
) -> None:
    """Answer requests until there are none."""

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        module = f"{name}_peer" if device == "cpu" else f"{name}_{device}_peer"
        peer = importlib.import_module(f"{__package__}.{module}")
        version = peer.load(threads)
        session = Session(peer.calls_of, devices.find(device))
        answer({"version": version})
    except Exception as error:
        answer({"error": _told(error)})
        return
    for line in requests:
        request = json.loads(line)
        try:
            answer(getattr(session, request.pop("do"))(**request))
        except Exception as error:
            answer({"error": _told(error)})


class Session:
    """What the process can be asked for."""

    def __init__(
        self,
        calls_of: Callable[[Case, arrays.Arrays], dict[str, Any]],
        device: devices.Device,
    ) -> None:
        self._calls_of = calls_of
        self._device = device
        self._samplers: dict[str, Sampler] = {}

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        """Make a case's data and calls, and warm up."""
        self.release()
        case["shape"] = tuple(case["shape"])
        this = Case(**case)
        placed = [self._calls_of(this, each) for each in self._device.place(arrays.make(this))]
        self._samplers = {
            variant: Sampler(in_turn([calls[variant] for calls in placed]), self._device.clock)
            for variant in placed[0]
        }
        return {}

    def sample(self, most: int) -> dict[str, Any]:
        """Sample all variants alternately for about a turn, `most` times at most."""
        rounds = min(most, *(sampler.per_turn for sampler in self._samplers.values()))
        samples: dict[str, list[Sample]] = {variant: [] for variant in self._samplers}
        for _ in range(rounds):
            for variant, sampler in self._samplers.items():
                samples[variant].append(sampler.sample())
        return {"samples": samples}

    def release(self) -> dict[str, Any]:
        """Let go of the data."""
        self._samplers = {}
        return {}


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, Unable) else f"{type(error).__name__}: {lines[0]}"
