"""How kernels are compiled and called: per dtype, serially or over threads, kept on disk."""

import contextlib
import hashlib
import types
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import llvmlite.binding as llvm
import numba
from numba import njit
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from ..threads import ALONE, apart, run
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
def _source_stamp(folder: Path | None = None) -> str:
    """Digest every file whose code ends up inside a kernel, or what a folder has that calls one."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    others = () if folder is None else folder.glob("*.py")
    for path in sorted({*here.glob("*.py"), *others, here.parent / "layout.py"}):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _PackageCache(FunctionCache):
    """numba's on-disk cache, made stale by a change in any kernel file, not in one alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = _source_stamp(Path(function.__code__.co_filename).parent)


def _compile(function: Callable[..., Any], variant: str, **options: Any) -> Any:
    # numba's cache tells functions apart by name and line, not by options.
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    twin.__module__ = function.__module__
    twin.__qualname__ = f"{function.__qualname__}_{variant}"
    dispatcher = njit(**_OPTIONS | options)(twin)
    if not numba.config.DISABLE_JIT:
        # No folder is writable: the kernels compile anew in each process.
        with contextlib.suppress(RuntimeError):
            dispatcher._cache = _PackageCache(twin)
    return dispatcher


def _digest(kinds: tuple[Any, ...]) -> str:
    """Tell functions apart by types of arguments and version."""
    return hashlib.sha256(f"{kinds} {_source_stamp()}".encode()).hexdigest()[:16]


class _Linked:
    """A function that compiled functions call by a symbol.

    Numba would put a copy of it into each of them, which takes 5 to 20 s to compile. Its address is
    told as a caller is compiled. A caller that numba has kept on disk tells it as it is loaded: by
    what lies among its constants, a `_Symbol`.
    """

    known: ClassVar[dict[str, "_Linked"]] = {}

    def __init__(self, name: str, dispatcher: Callable[[], Any]) -> None:
        self.name = name
        self._dispatcher = dispatcher
        self.known[name] = self

    def compiled(self, kinds: tuple[Any, ...]) -> tuple[Any, str]:
        """Compile it for types of arguments; give the type of its result, and its symbol."""
        dispatcher = self._dispatcher()
        dispatcher.compile(kinds)
        found = dispatcher.overloads[kinds]
        symbol = f"numbabn_{self.name}_{_digest(kinds)}"
        address = found.library.get_pointer_to_function(found.fndesc.llvm_func_name)
        llvm.add_symbol(symbol, address)
        return found.signature.return_type, symbol


class _Symbol:
    """A constant of a function that calls one that is linked."""

    def __init__(self, name: str, kinds: tuple[Any, ...], symbol: str) -> None:
        self._state = name, kinds, symbol

    def __reduce__(self) -> Any:
        return _symbol, self._state


def _symbol(name: str, kinds: tuple[Any, ...], symbol: str) -> _Symbol:
    """Give the symbol its address, before the function that was kept is linked."""
    if name not in _Linked.known or _Linked.known[name].compiled(kinds)[1] != symbol:
        raise OSError("kept by another version of numbabn")  # numba compiles it anew
    return _Symbol(name, kinds, symbol)


def _linked(name: str, dispatcher: Callable[[], Any]) -> Any:
    """Make what compiled functions call with a tuple of arguments."""
    target = _Linked(name, dispatcher)

    @intrinsic
    def call(typing_context, arguments):
        kinds = tuple(numba.types.unliteral(kind) for kind in arguments)
        result, symbol = target.compiled(kinds)

        def codegen(context, builder, signature, args):
            values = [
                context.cast(builder, value, kind, wanted)
                for value, kind, wanted in zip(
                    cgutils.unpack_tuple(builder, args[0]), arguments, kinds, strict=True
                )
            ]
            context.get_env_manager(builder).add_const(_Symbol(name, kinds, symbol))
            kind = context.call_conv.get_function_type(result, kinds)
            callee = cgutils.get_or_insert_function(builder.module, kind, symbol)
            status, value = context.call_conv.call_function(builder, callee, result, kinds, values)
            with cgutils.if_unlikely(builder, status.is_error):
                context.call_conv.return_status_propagate(builder, status)
            return value

        return result(arguments), codegen

    return call


def native(function: Callable[..., Any], **options: Any) -> Any:
    """Decorate what compiled functions call with a tuple of arguments; kept as kernels are."""
    return _linked(function.__name__, cache(lambda: _compile(function, "native", **options)))


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
        # For compiled functions: the serial one, as their thread may be one of many.
        self.linked = _linked(self.__name__, lambda: self.serial)

    @cached_property
    def serial(self) -> Any:
        return _compile(self._function, "serial")

    @cached_property
    def parallel(self) -> Any:
        return _compile(self._function, "parallel", parallel=True)

    def signature(self, stored: Any) -> tuple[Any, ...]:
        """Give the types of the arguments for maps of a stored dtype."""
        return tuple(_kind(name, stored) for name in (*self._kinds, "Memory", "Shape"))

    def _result(self, stored: str, parallel: bool) -> Any:
        """Compile for maps of a stored dtype."""
        if numba.config.DISABLE_JIT:
            raise RuntimeError(
                "NUMBA_DISABLE_JIT is set, but numbabn's kernels cannot run as Python: they "
                "compute on vectors in registers; numbabn.reference needs no compiler"
            )
        return apart(self._make, stored, parallel)

    def _make(self, stored: str, parallel: bool) -> Any:
        with global_compiler_lock:  # from here on: `cached_property` has a lock of its own, too
            dispatcher = self.parallel if parallel else self.serial
            signature = self.signature(getattr(numba.types, stored))
            dispatcher.compile(signature)
            return dispatcher.overloads[signature]

    def compiled(self, stored: str, parallel: bool) -> Callable[..., Any]:
        """Give the function for maps of a stored dtype."""
        found = self._compiled.get((stored, parallel))
        if found is None:
            # Past the dispatcher, which would ask every argument for its type.
            found = self._compiled[stored, parallel] = self._result(stored, parallel).entry_point
        return found

    def address(self, stored: str, parallel: bool) -> int:
        """Give the function's address for maps of a stored dtype, as compiled code calls it."""
        result = self._result(stored, parallel)
        return int(result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))

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


class Entry:
    """What C calls: a function of pointers that gives an int32, kept on disk as kernels are."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self._function = function
        self._compiled: Any = CFunc(function, (arguments, numba.types.int32), {}, dict(_OPTIONS))
        self._address = 0

    @property
    def address(self) -> int:
        """Where the function is, compiled."""
        if not self._address:
            apart(self._make)
        return self._address

    def _make(self) -> None:
        with global_compiler_lock:
            with contextlib.suppress(RuntimeError):
                self._compiled._cache = _PackageCache(self._function)
            self._compiled.compile()
            self._address = int(self._compiled.address)


def kernel(*kinds: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a loop over threads; see `Kernel`."""
    return lambda function: Kernel(function, *kinds)


def cache_folder(of: Kernel) -> str | None:
    """Where compiled kernels are kept between processes; None if nowhere could be written."""
    path: str | None = None if numba.config.DISABLE_JIT else of.serial.stats.cache_path
    return path
