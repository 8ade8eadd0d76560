"""How kernels are compiled and called: per dtype, serially or over threads, kept on disk."""

import contextlib
import hashlib
import os
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock

from ..threads import ALONE, run
from . import arguments

# Fast-math flags go by name, never `True`: `nnan` and `ninf` would let the compiler drop NaN and
# infinity, `reassoc` turn sum(x - shift) into sum(x) - n * shift.
_OPTIONS = {"fastmath": {"contract", "nsz"}, "error_model": "numpy", "nogil": True}


class _Part(JITCodeLibrary):
    """LLVM's code of a function that kernels alone call: it becomes machine code as part of them.

    By itself it would be translated, too, once more at each level of calls, which takes a third of
    the time that kernels need to compile. It is still optimized at each level: where it was not,
    backward on planes took 6 to 11% longer.
    """

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0  # no such function

    @property
    def codegen(self) -> "_Part":
        return self  # numba would write an environment's address into machine code, by `set_env`

    def set_env(self, name: str, environment: Any) -> None:
        """Do nothing: functions that deal with no Python object need none."""


class _PartCompiler(Compiler):
    def define_pipelines(self) -> Any:
        state = self.state
        state.library = _Part(state.targetctx.codegen(), state.func_id.func_qualname)
        return super().define_pipelines()


# Called by kernels alone: without the wrappers for Python they compile in less time.
_INNER = _OPTIONS | {
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": _PartCompiler,
}
primitive: Callable[[Callable[..., Any]], Any] = njit(**_INNER)
inlined: Callable[[Callable[..., Any]], Any] = njit(**_INNER, forceinline=True)


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


if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles would wait for its locks for ever.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def _apart(work: Callable[..., Any], *args: Any) -> None:
    """Work where no signal is seen: Ctrl-C leaves numba unable ever to compile or load again.

    The caller is interrupted all the same, and the work done in the background.
    """
    if global_compiler_lock.is_locked():  # by this thread, for which another would wait for ever
        work(*args)
        return
    thread = ThreadPoolExecutor(1)
    try:
        thread.submit(work, *args).result()
    finally:
        thread.shutdown(wait=False)


def _kind(name: str, stored: Any) -> Any:
    if name == "Numbers":
        return arguments.numbers
    if name == "Flag":
        return numba.types.boolean
    return arguments.signature(getattr(arguments, name), stored)


class Kernel:
    """Compile a loop over threads for each dtype it is called for, serially and in parallel.

    `kinds` name the types of its arguments; `Memory` and `Shape` come last.
    """

    def __init__(self, function: Callable[..., Any], *kinds: str) -> None:
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self._function = function
        self._kinds = kinds
        self._compiled: dict[tuple[str, bool], Callable[..., Any]] = {}

    @cached_property
    def serial(self) -> Any:
        return _compile(self._function, "serial")

    @cached_property
    def parallel(self) -> Any:
        return _compile(self._function, "parallel", parallel=True)

    def compiled(self, stored: str, parallel: bool) -> Callable[..., Any]:
        """Give the function for maps of a stored dtype."""
        found = self._compiled.get((stored, parallel))
        if found is None:
            if numba.config.DISABLE_JIT:
                raise RuntimeError(
                    "NUMBA_DISABLE_JIT is set, but numbabn's kernels cannot run as Python: they "
                    "compute on vectors in registers; numbabn.reference needs no compiler"
                )
            _apart(self._prepare, stored, parallel)
            found = self._compiled[stored, parallel]
        return found

    def _prepare(self, stored: str, parallel: bool) -> None:
        with global_compiler_lock:  # from here on: `cached_property` has a lock of its own, too
            dispatcher = self.parallel if parallel else self.serial
            dtype = getattr(numba.types, stored)
            signature = tuple(_kind(name, dtype) for name in (*self._kinds, "Memory", "Shape"))
            dispatcher.compile(signature)
            # Past the dispatcher, which would ask every argument for its type.
            self._compiled[stored, parallel] = dispatcher.overloads[signature].entry_point

    def prepare(self, stored: str, parallel: bool) -> bool:
        """Compile the function ahead of its first call; False if it was there already."""
        stats = (self.parallel if parallel else self.serial).stats
        missed = stats.cache_misses.total()
        self.compiled(stored, parallel)
        return bool(stats.cache_misses.total() > missed)

    def __call__(self, plan: Any, *args: Any) -> None:
        """Run over as many threads as the plan says."""
        parallel = plan.shape.threads > 1
        function = self._compiled.get((plan.stored, parallel)) or self.compiled(
            plan.stored, parallel
        )
        if plan.team is ALONE:
            function(*args, plan.memory, plan.shape)
        else:
            run(plan.team, function, *args, plan.memory, plan.shape)


def kernel(*kinds: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a loop over threads; see `Kernel`."""
    return lambda function: Kernel(function, *kinds)


def cache_folder(of: Kernel) -> str | None:
    """Where compiled kernels are kept between processes; None if nowhere could be written."""
    path: str | None = None if numba.config.DISABLE_JIT else of.serial.stats.cache_path
    return path
