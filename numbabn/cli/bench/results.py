"""The results file: what was measured and where, and all that the table and the figure show."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command import CommandError
from .cases import TRAFFIC
from .devices import Notes
from .measurement import Result, means

FORMAT = 1  # changes with whatever a reader of the last one does not know
KEYS = frozenset({"settings", "environment", "cases"})  # of every format


def document(
    settings: dict[str, Any], facts: dict[str, Any], found: list[Result]
) -> dict[str, Any]:
    """Put together what the file holds."""
    return {
        "format": FORMAT,
        "settings": settings,
        "environment": facts,
        "traffic": {op: TRAFFIC[op]._asdict() for op in TRAFFIC if op in settings["op"]},
        "cases": [result.document() for result in found],
        "geometric_means": means(found, list(facts["peers"])),
    }


@dataclass(frozen=True)
class Results:
    """A document, just measured or read from a file, as the table and the figure take it.

    Attributes
    ----------
    document : dict
        The whole of it.
    found : list of Result
    what : list of str
        The suites and shapes that were asked for.
    version : str
        That of numbabn.
    peers : dict
        The version of each peer, in the order of the table.
    device : {"cpu", "cuda"}
    notes : Notes
    place : str
        On what it was measured, in a line.
    """

    document: dict[str, Any]
    found: list[Result]
    what: list[str]
    version: str
    peers: dict[str, str]
    device: str
    notes: Notes
    place: str

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Results":
        """Take a document apart."""
        settings, facts = document["settings"], document["environment"]
        return cls(
            document=document,
            found=[Result.of(case) for case in document["cases"]],
            what=settings["what"],
            version=facts["versions"]["numbabn"],
            peers=facts["peers"],
            device=settings["device"],
            notes=Notes(**facts["notes"]),
            place=place(facts),
        )


def read(path: Path) -> Results:
    """Read a file; what is none, or not of this format, is an error of one line."""
    name = f"--from: {str(path)!r}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{name} is not JSON: {error}") from None
    if not isinstance(found, dict) or not found.keys() >= KEYS:
        raise CommandError(f"{name} is JSON, but no results of numbabn bench")
    if (got := found.get("format", "none")) != FORMAT:
        raise CommandError(
            f"{name}: expected results of format {FORMAT}, got format {got}; "
            f"measure them again: numbabn bench ... --json {shlex.quote(str(path))}"
        )
    try:
        return Results.of(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CommandError(f"{name}: expected what numbabn bench wrote, got {reason}") from None


def place(facts: dict[str, Any]) -> str:
    """Say on what it was measured."""
    return _on_cpu(facts) if facts["gpu"] is None else _on_gpu(facts["gpu"])


def _on_cpu(facts: dict[str, Any]) -> str:
    threads, load = facts["threads_used"], facts["load_average"]
    return (
        f"{threads} thread{'s' * (threads > 1)} on {facts['cpu_model']} ({facts['cpu']['name']})"
        + ("" if load is None else f", load {load:.1f} at the start")
    )


def _on_gpu(gpu: dict[str, Any]) -> str:
    capability = ".".join(map(str, gpu["compute_capability"]))
    driver = gpu["driver_version"]
    return (
        f"Device time on {gpu['name']} (compute capability {capability}, "
        f"{gpu['multiprocessors']} multiprocessors, {gpu['l2_bytes'] / 2**20:.0f} MiB of L2)"
        + ("" if driver is None else f", driver {driver}")
    )
