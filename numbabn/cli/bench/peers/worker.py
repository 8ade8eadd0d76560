"""The program of a peer's process: ``worker NAME THREADS``.

Reads requests from standard input, one JSON object a line, and answers each by one line: what was
asked for, or ``{"error": ...}``. Ends when its input does.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any

from .. import arrays
from ..cases import Case
from ..sampling import Sample, Sampler


class Unable(Exception):  # noqa: N818 - no fault of anyone's
    """The peer has no such operation, layout or dtype."""


def main() -> None:
    """Serve until the input ends."""
    name, threads = sys.argv[1], int(sys.argv[2])
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers, name, threads)


def serve(requests: IO[str], answers: IO[str], name: str, threads: int) -> None:
    """Answer requests until there are none."""

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        peer = importlib.import_module(f"{__package__}.{name}_peer")
        answer({"version": peer.load(threads)})
    except Exception as error:
        answer({"error": _told(error)})
        return
    session = Session(peer.calls_of)
    for line in requests:
        request = json.loads(line)
        try:
            answer(getattr(session, request.pop("do"))(**request))
        except Exception as error:
            answer({"error": _told(error)})


class Session:
    """What the process can be asked for."""

    def __init__(self, calls_of: Callable[[Case, arrays.Arrays], dict[str, Any]]) -> None:
        self._calls_of = calls_of
        self._samplers: dict[str, Sampler] = {}

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        """Make a case's data and calls, and warm up."""
        self.release()
        case["shape"] = tuple(case["shape"])
        this = Case(**case)
        calls = self._calls_of(this, arrays.make(this))
        self._samplers = {variant: Sampler(call) for variant, call in calls.items()}
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
