"""How work is cut and run: tile sizes, serial or parallel, compilation and its cache.

Everything here depends on the shape alone, never on the number of threads, because the cuts are
the tree by which statistics are summed: the same input gives the same bits on any machine size.
"""

import contextlib
import hashlib
import os
import threading
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock

PLANE_TILE = 4096  # elements of a plane summed in one go: 16 KiB of float32, half of an L1 cache
PLANE_PIECE = 16  # tiles of one channel that make one task
ROW_TILE = 128  # rows summed in one go
ROW_PIECE = 4  # tiles of one block of columns that make one task
ROW_BLOCK = 1024  # columns; with 256, 1 KiB of a 4 KiB row, 4096 x 1024 took 2 to 3 times as long
FUSE_CHANNELS = 16  # with fewer channels than this, a task per channel would leave cores idle
PARALLEL_BYTES = 1 << 17  # below this, entering a parallel region costs more than it saves

# Fast-math flags go by name, never `True`: `nnan` and `ninf` would let the compiler drop NaN and
# infinity. `reassoc` is what lets a sum be vectorized, and is for sums alone: it also allows
# sum(x - shift) to become sum(x) - n * shift, and LLVM was seen to do so.
_OPTIONS = {"fastmath": {"contract", "nsz"}, "error_model": "numpy", "nogil": True}
_SUM_OPTIONS = _OPTIONS | {"fastmath": {"contract", "nsz", "reassoc"}}

primitive: Callable[[Callable[..., Any]], Any] = njit(**_OPTIONS)
summing: Callable[[Callable[..., Any]], Any] = njit(**_SUM_OPTIONS)


@cache
def _source_stamp() -> str:
    """Digest every file whose code ends up inside a compiled kernel."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _PackageCache(FunctionCache):
    """numba's on-disk cache, made stale by a change in any kernel file, not in one alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = _source_stamp()


def _compile(function: Callable[..., Any], variant: str, **options: Any) -> Any:
    # numba's cache tells functions apart by name and line, not by options.
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    twin.__module__ = function.__module__
    twin.__qualname__ = f"{function.__qualname__}_{variant}"
    dispatcher = njit(**_OPTIONS, **options)(twin)
    if not numba.config.DISABLE_JIT:
        # No folder is writable: the kernels compile anew in each process.
        with contextlib.suppress(RuntimeError):
            dispatcher._cache = _PackageCache(twin)
    return dispatcher


_threadless = False
_reentrant = False
_turn = threading.Lock()


def _after_fork() -> None:
    """Keep to serial kernels if the parent's threads had started: OpenMP would abort here."""
    global _threadless, _turn
    _turn = threading.Lock()
    with contextlib.suppress(ValueError):  # raised where no layer has started
        numba.threading_layer()
        _threadless = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
    # A child forked while another thread compiles would wait for that thread for ever.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


class kernel:  # noqa: N801 - a decorator
    """One loop over independent tasks, compiled twice: serial, and over numba's threads.

    Called with the number of bytes that it moves, then the compiled function's own arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.serial = _compile(function, "serial")
        self.parallel = _compile(function, "parallel", parallel=True)

    def __call__(self, nbytes: int, *args: Any) -> Any:
        global _reentrant
        if nbytes < PARALLEL_BYTES or _threadless:
            return self.serial(*args)
        if _reentrant:
            return self.parallel(*args)
        # numba's workqueue layer aborts the process when two threads enter it at once, and
        # which layer runs is known only after the first launch.
        with _turn:
            result = self.parallel(*args)
            _reentrant = numba.threading_layer() != "workqueue"
            return result


def cache_folder(of: kernel) -> str | None:
    """Where compiled kernels are kept between processes; None if nowhere could be written."""
    path: str | None = None if numba.config.DISABLE_JIT else of.serial.stats.cache_path
    return path
