"""Where cases are computed: how arrays get there, what the limit is there, how calls are timed."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import numbabn

from ....backends import cuda_backend
from ..arrays import Arrays
from ..cases import DTYPES
from ..sampling import Call, Clock

NAMES = ("cpu", "cuda")


class Notes(NamedTuple):
    """What the footer says of times on a device, in parts of sentences."""

    timed: str  # how a call is
    limit: str  # what it is the best of
    cache: str  # what is in it
    disturbed: str  # why samples are left out


class Device(ABC):
    """What is asked of a device.

    Attributes
    ----------
    clock : Clock
    notes : Notes
    """

    clock: Clock
    notes: Notes

    def refusal(self, dtype: str) -> str | None:
        """Ask the library whether it takes a dtype here; return why not."""
        try:
            numbabn.batch_stats(self.put(np.zeros((2, 1), DTYPES[dtype])))
        except TypeError as error:
            return str(error)
        return None

    @abstractmethod
    def put(self, values: Any) -> Any:
        """Give an array of the device, of a NumPy array's values."""

    @abstractmethod
    def place(self, arrays: Arrays) -> list[Arrays]:
        """Give a case's arrays there, as many times as calls must go round to be timed."""

    @abstractmethod
    def fetched(self, call: Callable[[], Any], placed: Arrays, arrays: Arrays) -> Callable[[], Any]:
        """Make a call on placed arrays one on `arrays`: with their `out`, and results in NumPy."""

    @abstractmethod
    def sweeps(self, placed: list[Arrays]) -> dict[str, Call]:
        """Return the ways to sweep as much memory as an operation at the limit, by name."""

    @abstractmethod
    def facts(self) -> dict[str, Any] | None:
        """Tell what matters to times and ``numbabn info`` does not know."""


def find(name: str) -> Device:
    """Return a device by its name.

    Raises
    ------
    RuntimeError
        If this machine has none.
    """
    if name == "cuda":
        cuda_backend()
        from .cuda import CUDA

        return CUDA()
    from .cpu import CPU

    return CPU()
