"""Memory that the blocks of a grid share."""

import threading
from abc import ABC, abstractmethod
from typing import Any

from ..libraries import Place
from .arguments import Memory, Shape


class Workspace(ABC):
    """What launches on one stream share, kept from call to call.

    Whoever launches what uses it holds its lock: a stream runs what it is given in order.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.sizes = [0, 0, 0]
        self.arrays: tuple[Any, ...] = ()

    def memory(self, place: Place, shape: Shape, columns: int) -> Memory:
        """Give memory for a shape whose groups have some columns each."""
        wanted = 3 * shape.pieces * shape.groups * columns, 2 * shape.C, shape.groups
        if any(have < want for have, want in zip(self.sizes, wanted, strict=True)):
            self.sizes = [max(pair) for pair in zip(self.sizes, wanted, strict=True)]
            self.arrays = self._allocate(place)
        return self._memory()

    @abstractmethod
    def _allocate(self, place: Place) -> tuple[Any, ...]:
        """Allocate float64, float64 and int32 of these sizes; the last are zeros."""

    @abstractmethod
    def _memory(self) -> Memory:
        """Pass what was allocated."""
