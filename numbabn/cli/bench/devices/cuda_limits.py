"""The limit on a CUDA device: a copy by the driver or by a kernel, or a kernel's ``a ^ b``.

As on the CPU, on bits and with no arithmetic to speak of. The kernel is an ordinary one: words of 8
bytes, four on their way at a time in each thread.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from numba import cuda

from ..sampling import Call, in_turn

WORD = 8  # bytes moved at a time, or as many as divide an array
THREADS = 256
EACH = 4  # words of a thread

# Typed as the untyped decorators that they are.
_compile: Callable[[Callable[..., Any]], Any] = cuda.jit
_compile_part: Callable[[Callable[..., Any]], Any] = cuda.jit(device=True)


def sweeps(sets: list[tuple[list[Any], Any]]) -> dict[str, Call]:
    """Return the ways to sweep one set of arrays after the other, by name.

    Parameters
    ----------
    sets : list of (sources, out)
        One or two contiguous sources, and a result of as many bytes.
    """
    stream = cuda.legacy_default_stream()
    by_kernel: list[Call] = []
    by_driver: list[Call] = []
    for sources, out in sets:
        a, b, result = map(words, (sources[0], sources[-1], out))
        blocks = -(-result.size // (THREADS * EACH))
        by_kernel.append(partial(sweep(len(sources))[blocks, THREADS, stream], a, b, result))
        by_driver.append(partial(result.copy_to_device, a, stream=stream))
    ways = {"kernel": in_turn(by_kernel)}
    return ways | ({"driver": in_turn(by_driver)} if len(sets[0][0]) == 1 else {})


def words(array: Any) -> Any:
    """See a contiguous array as a line of the largest words that divide it."""
    size = math.gcd(array.nbytes, WORD)
    return array.reshape(array.size).view(f"u{size}")


@cache
def sweep(reads: int) -> Any:
    """Make the kernel ``out = a`` or ``out = a ^ b``; `b` counts for two reads only."""

    @_compile_part
    def word(a: Any, b: Any, i: Any) -> Any:
        return a[i] if reads == 1 else a[i] ^ b[i]

    @_compile
    def kernel(a: Any, b: Any, out: Any) -> None:
        first = cuda.blockIdx.x * THREADS * EACH + cuda.threadIdx.x
        if first + (EACH - 1) * THREADS < out.size:
            # All loads before all stores, which might be to where the next load is from.
            p, q, r, s = (
                word(a, b, first),
                word(a, b, first + THREADS),
                word(a, b, first + 2 * THREADS),
                word(a, b, first + 3 * THREADS),
            )
            out[first] = p
            out[first + THREADS] = q
            out[first + 2 * THREADS] = r
            out[first + 3 * THREADS] = s
        else:
            for i in range(first, out.size, THREADS):
                out[i] = word(a, b, i)

    return kernel
