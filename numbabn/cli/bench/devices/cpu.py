"""The CPU: arrays as they are, calls by the wall clock."""

from collections.abc import Callable
from typing import Any

from ..arrays import Arrays
from ..sampling import Call, WallClock
from . import Device, Notes
from .cpu_limits import sweeps


class CPU(Device):
    """NumPy's arrays, which every call of a case uses anew."""

    notes = Notes(
        timed="by the wall clock",
        limit="by the same threads, sampled in turns with the kernel; the best of plain (p) and "
        "non-temporal (n) stores, and of one thread (1) for small arrays",
        cache="Inputs within the cache stay in it: all calls of a case use the same arrays",
        disturbed="another program took a core meanwhile",
    )

    def __init__(self) -> None:
        self.clock = WallClock()

    def put(self, values: Any) -> Any:
        """Give the array itself."""
        return values

    def place(self, arrays: Arrays) -> list[Arrays]:
        """Give the arrays themselves."""
        return [arrays]

    def fetched(self, call: Callable[[], Any], placed: Arrays, arrays: Arrays) -> Callable[[], Any]:
        """Give the call itself."""
        return call

    def sweeps(self, placed: list[Arrays]) -> dict[str, Call]:
        """Copy or combine bytes, by each kind of stores."""
        (arrays,) = placed
        return {**sweeps(arrays.sources, arrays.out)}

    def facts(self) -> dict[str, Any] | None:
        """Tell nothing more."""
        return None
