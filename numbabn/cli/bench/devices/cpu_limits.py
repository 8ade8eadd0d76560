"""The limit: memory swept as an operation sweeps it, with no arithmetic to speak of.

A copy (one read, one write) for what reads x alone, and for what reads two arrays the traffic of
a triad (two reads, one write), as ``a ^ b``, which no bits can slow down as they can a float's
sum. On bytes, so that one function serves every dtype; in lines of 64 bytes, aligned in `out`.
Plain stores read the line that they overwrite; non-temporal ones do not, but leave nothing in the
cache. Which are faster depends on the size, so both are measured.
"""

import platform
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64
X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
ONE_THREAD_BELOW = 1 << 22  # bytes of a result; there entering a parallel region may not pay

# Typed as the untyped decorators that they are.
_compile: Callable[[Callable[..., Any]], Any] = numba.njit
_compile_parallel: Callable[[Callable[..., Any]], Any] = numba.njit(parallel=True)
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic

_LINE = ir.VectorType(ir.IntType(32), LINE // 4)


def sweeps(sources: list[Any], out: Any) -> dict[str, Callable[[], None]]:
    """Return the ways to sweep `sources` into `out`, by name, over numba's current threads.

    Parameters
    ----------
    sources : list of one or two contiguous arrays
    out : contiguous array of as many bytes
    """
    a, b, out = (array.reshape(-1).view(np.uint8) for array in (sources[0], sources[-1], out))
    reads = len(sources)
    ways = {"plain": sweep(reads, streaming=False, parallel=True)}
    if X86:
        ways["non-temporal"] = sweep(reads, streaming=True, parallel=True)
    if numba.get_num_threads() > 1 and out.size < ONE_THREAD_BELOW:
        ways["plain, one thread"] = sweep(reads, streaming=False, parallel=False)
    return {name: partial(way, a, b, out) for name, way in ways.items()}


@cache
def sweep(reads: int, *, streaming: bool, parallel: bool) -> Any:
    """Compile ``out = a`` or ``out = a ^ b`` on flat arrays of bytes.

    Returns
    -------
    compiled function of a, b and out
        `b` counts for two reads only.
    """
    line = _line(reads, streaming)

    @_compile
    def part(a: Any, b: Any, out: Any, start: int, stop: int) -> None:
        # The result's first aligned line, and the end of its last.
        first = min(stop, start + (-(out.ctypes.data + start)) % LINE)
        last = first + (stop - first) // LINE * LINE
        for i in range(start, first):
            out[i] = a[i] if reads == 1 else a[i] ^ b[i]
        for i in range(first, last, LINE):
            line(a, b, out, i)
        for i in range(last, stop):
            out[i] = a[i] if reads == 1 else a[i] ^ b[i]
        if streaming:
            _store_fence()

    @_compile
    def whole(a: Any, b: Any, out: Any) -> None:
        part(a, b, out, 0, out.size)

    @_compile_parallel
    def shared(a: Any, b: Any, out: Any) -> None:
        threads = numba.get_num_threads()
        for t in numba.prange(threads):
            part(a, b, out, out.size * t // threads, out.size * (t + 1) // threads)

    return shared if parallel else whole


def _line(reads: int, streaming: bool) -> Any:
    """One line: loads that need no alignment, one store that has it."""

    @_intrinsic
    def line(typing_context: Any, a: Any, b: Any, out: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def address(array: Any, kind: Any) -> Any:
                data = context.make_array(kind)(context, builder, array).data
                return builder.bitcast(builder.gep(data, [args[3]]), _LINE.as_pointer())

            a, b, out = (address(args[k], signature.args[k]) for k in range(3))
            value = builder.load(a, align=1)
            if reads == 2:
                value = builder.xor(value, builder.load(b, align=1))
            store = builder.store(value, out, align=LINE)
            if streaming:
                one = ir.Constant(ir.IntType(32), 1)
                store.set_metadata("nontemporal", builder.module.add_metadata([one]))
            return context.get_dummy_value()

        return types.void(a, b, out, at), codegen

    return line


@_intrinsic
def _store_fence(typing_context: Any) -> Any:
    """Wait until non-temporal stores can be seen by other cores."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fence = ir.FunctionType(ir.VoidType(), [])
        builder.call(
            cgutils.get_or_insert_function(builder.module, fence, "llvm.x86.sse.sfence"), []
        )
        return context.get_dummy_value()

    return types.void(), codegen
