"""Machine code kept on disk from process to process, where numba keeps the CPU's.

A file holds a digest of what follows it, a line of facts, and the machine code. It is written
beside its place and moved there, so that another process finds all of it or none; one that is not
what it should be is not there.
"""

import contextlib
import hashlib
import json
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from cuda.bindings import driver, nvjitlink, nvvm
from numba.core.caching import FunctionCache

from .formats import THREADS

_DIGEST = hashlib.sha256().digest_size
# What turns a kernel's source into machine code; NVVM and the linker tell theirs themselves.
_COMPILERS = ("numba-cuda", "numba", "llvmlite", "cuda-core", "cuda-bindings")


def _linker() -> Any:
    """Give the linker's version: the driver's, where there is no other."""
    try:
        return nvjitlink.version()
    except RuntimeError:
        return driver.cuDriverGetVersion()


@cache
def _stamp() -> str:
    """Name all that decides how a kernel is compiled, beside itself and the device."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    versions: list[Any] = [sys.version_info[:2], *map(version, _COMPILERS)]
    versions += [nvvm.version(), nvvm.ir_version(), _linker(), THREADS]
    digest.update(repr(versions).encode())
    return digest.hexdigest()


def folder() -> Path | None:
    """Where machine code is kept; None if nowhere could be written."""
    try:
        # NUMBA_CACHE_DIR, else beside the sources, else the user's: the first that can be written.
        return Path(FunctionCache(folder).cache_path)
    except RuntimeError:
        return None


def load(name: str, *options: Any) -> tuple[dict[str, Any], bytes] | None:
    """Give what was saved under a name, with these options and all else as it is now."""
    place = folder()
    if place is None:
        return None
    try:
        content = (place / name).read_bytes()
    except OSError:
        return None
    digest, rest = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(rest).digest() != digest:
        return None
    line, _, code = rest.partition(b"\n")
    facts: dict[str, Any] = json.loads(line)
    return (facts, code) if facts.pop("stamp", None) == [_stamp(), repr(options)] else None


def save(name: str, facts: dict[str, Any], code: bytes, *options: Any) -> None:
    """Keep machine code and facts about it under a name, if a folder can be written."""
    place = folder()
    if place is None:
        return
    line = json.dumps({"stamp": [_stamp(), repr(options)], **facts}).encode()
    rest = line + b"\n" + code
    beside = place / f"{name}.{uuid4().hex}"
    with contextlib.suppress(OSError):
        try:
            beside.write_bytes(hashlib.sha256(rest).digest() + rest)
            beside.replace(place / name)
        finally:
            beside.unlink(missing_ok=True)
