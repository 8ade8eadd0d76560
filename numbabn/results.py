"""Memory for results, kept when they are gone: fresh memory page-faults as it is filled."""

import os
from typing import Any

import numpy as np

LINE = 64  # bytes of a cache line
SMALLEST = 1 << 18  # bytes; malloc mostly keeps what smaller results leave


class _Block:
    """Memory that begins with a cache line."""

    def __init__(self, nbytes: int) -> None:
        memory = np.empty(nbytes + LINE, np.uint8)
        start = -memory.ctypes.data % LINE
        self.nbytes = nbytes
        self.memory = memory[start : start + nbytes]
        self.interface = self.memory.__array_interface__  # which NumPy makes anew each time


class _Loan:
    """The base of a result: dies with the last array that views it."""

    pool: "Pool | None" = None  # until Ctrl-C can do no harm

    def __init__(self, pool: "Pool", block: _Block) -> None:
        self.block = block
        self.__array_interface__ = block.interface
        self.pool = pool

    def __del__(self) -> None:
        if self.pool is not None:
            self.pool.give_back(self.block)


class Pool:
    """Blocks of memory, left by results that are gone, for those to come.

    Whoever finds the pool busy does without it. To wait could be for ever: results die anywhere,
    even in here if the garbage collector runs, and a forked child finds the pool as it is. Visits
    stand in a set: a lock would stay taken where Ctrl-C came just before ``try``.

    Parameters
    ----------
    limit : int
        Bytes kept at most; 0 keeps none.

    Attributes
    ----------
    kept : int
        Bytes kept now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept = 0
        self._blocks: list[_Block] = []  # the oldest first
        self._visits: set[object] = set()

    def empty_like(self, x: Any) -> Any:
        """Do as ``numpy.empty_like(x, subok=False)``; large results begin with a cache line."""
        nbytes = x.nbytes
        if not SMALLEST <= nbytes <= self.limit:
            return np.empty_like(x, subok=False)
        block = self._take(nbytes) or _Block(nbytes)
        strides = None if x.flags.c_contiguous else np.empty_like(x, subok=False).strides
        return np.ndarray(x.shape, x.dtype, np.asarray(_Loan(self, block)), 0, strides)

    def _take(self, nbytes: int) -> _Block | None:
        """Find the latest block that is large enough, but not by more than a quarter."""
        visit = object()
        try:
            self._visits.add(visit)
            if len(self._visits) == 1:
                for i in reversed(range(len(self._blocks))):
                    if nbytes <= self._blocks[i].nbytes <= nbytes + nbytes // 4:
                        self.kept -= self._blocks[i].nbytes
                        return self._blocks.pop(i)
        finally:
            self._visits.discard(visit)
        return None

    def give_back(self, block: _Block) -> None:
        """Keep a block, at the cost of the oldest ones."""
        visit = object()
        dropped = []  # to be freed outside
        try:
            self._visits.add(visit)
            if len(self._visits) == 1:
                self.kept += block.nbytes
                self._blocks.append(block)
                while self.kept > self.limit:
                    self.kept -= self._blocks[0].nbytes
                    dropped.append(self._blocks.pop(0))
        finally:
            self._visits.discard(visit)


_pool = Pool(int(os.environ.get("NUMBABN_POOL_BYTES", 1 << 28)))
empty_like = _pool.empty_like
