"""A CUDA device: arrays of Numba's, in sets that no cache holds, calls by the device's own clock.

Numba's arrays and no other library's: the extras of numbabn bring Numba, so that everybody has
them, and PyTorch, in its own process, takes them over without a copy. Kernels see addresses alone,
so whose arrays they are does not show in device time.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError

from ....backends import to_numpy
from ...command import CommandError
from ..arrays import Arrays
from ..sampling import Call
from . import Device, Notes
from .cuda_clock import CudaClock
from .cuda_limits import sweeps

CACHES = 3  # times the L2 cache that the sets of a case fill together
MOST_SETS = 128
LARGE = 1 << 30  # bytes of a set that leaves nothing in the cache for the next call
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var", "mean", "invstd")


def sets_of(nbytes: int, l2_bytes: int) -> int:
    """Say how many sets of so many bytes calls go round."""
    least = 1 if nbytes > LARGE else 2
    return min(MOST_SETS, max(least, math.ceil(CACHES * l2_bytes / nbytes)))


def bits(array: Any) -> Any:
    """See an array as whole numbers: Numba moves no bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")


class CUDA(Device):
    """The current device, on its legacy default stream."""

    notes = Notes(
        timed="by CUDA events around calls that the host enqueued while the device was held",
        limit="sampled in turns with numbabn; the best of the driver's copy (d), for a copy, and "
        "of a kernel (k)",
        cache=f"Calls go round sets of arrays that together fill the L2 cache {CACHES} times, or "
        f"{MOST_SETS} sets, of which the cache then holds a part",
        disturbed="the host was too slow to keep the device busy",
    )

    def __init__(self) -> None:
        self.clock = CudaClock()

    def put(self, values: Any) -> Any:
        """Copy to the device."""
        return cuda.to_device(bits(values)).view(values.dtype)

    def place(self, arrays: Arrays) -> list[Arrays]:
        """Copy to the device; all sets share what has one number per channel."""
        l2_bytes = cuda.get_current_device().L2_CACHE_SIZE
        nbytes = sum(array.nbytes for array in (*arrays.sources, arrays.out))
        count = sets_of(nbytes, l2_bytes)
        try:
            shared = {name: self.put(getattr(arrays, name)) for name in PER_CHANNEL}
            return [
                replace(
                    arrays,
                    x=self.put(arrays.x),
                    other=None if arrays.other is None else self.put(arrays.other),
                    out=self.put(arrays.out),
                    **shared,
                )
                for _ in range(count)
            ]
        except CudaAPIError as error:
            raise CommandError(
                f"expected device memory for {count} x {nbytes} bytes, got {error}", code=1
            ) from None

    def fetched(self, call: Callable[[], Any], placed: Arrays, arrays: Arrays) -> Callable[[], Any]:
        """Copy `out` to the device, and back what the call has written."""

        def fetch() -> Any:
            bits(placed.out).copy_to_device(bits(arrays.out))
            result = call()
            for name in ("out", "running_mean", "running_var"):
                getattr(arrays, name)[...] = to_numpy(getattr(placed, name))
            if not isinstance(result, tuple):
                return to_numpy(result)
            named: Any = type(result)
            return named(*(a if a is None else to_numpy(a) for a in result))

        return fetch

    def sweeps(self, placed: list[Arrays]) -> dict[str, Call]:
        """Copy or combine whole words, by the driver and by a kernel."""
        return sweeps([(arrays.sources, arrays.out) for arrays in placed])

    def facts(self) -> dict[str, Any] | None:
        """Tell which device it is."""
        device = cuda.get_current_device()
        return {
            "name": device.name,
            "compute_capability": list(device.compute_capability),
            "multiprocessors": device.MULTIPROCESSOR_COUNT,
            "l2_bytes": device.L2_CACHE_SIZE,
        }
