"""Twins of `intrinsics` for Numba's simulator, and how a grid of threads runs there.

Kernels run as they are, each thread of a block as a coroutine that goes on until it waits for the
others, and where blocks wait for one another, each of those. Addresses are of the host's memory.
Whoever reads or writes beside an array or off its alignment is told, and so are threads that wait
for different things, or that use the same number of shared memory, one of them writing, with no
barrier in between, and blocks that wait for what never comes.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from greenlet import getcurrent, greenlet

from .formats import CONSTANTS, CREWS, FORMATS, LANES, STAGE, THREADS, Format

WORD_BITS = 32
_POWERS = 1 << np.arange(LANES)
_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in FORMATS}


class Flat:
    """An array in memory, whose numbers are moved `width` at a time; or none."""

    def __init__(self, format_: Format, width: int, memory: Any = None, origin: int = 0) -> None:
        self.format = format_
        self.width = width
        self.computed = np.dtype(format_.computed).type
        self.memory = memory  # one dimension
        self.origin = origin  # index of the element that has index 0
        self.size = 0 if memory is None else len(memory)
        self.address = 0 if memory is None else memory.ctypes.data

    def at(self, index: int, count: int) -> Any:
        first = self.origin + index
        if not 0 <= first <= first + count <= self.size:
            raise IndexError(f"{count} numbers from {first} on, of {self.size}")
        itemsize = self.format.itemsize
        if (self.address + first * itemsize) % (count * itemsize):
            raise IndexError(f"{count * itemsize} bytes at an address that is no multiple of them")
        return self.memory[first : first + count]


class Packed(NamedTuple):
    """Numbers as they are stored."""

    x: Flat
    numbers: Any


def flat(name: str, width: int, address: int, first: int, last: int) -> Flat:
    """View the elements `first` to `last`, counted from an address, which need not be the first."""
    dtype = _DTYPES[name]
    nbytes = (last + 1 - first) * dtype.itemsize
    memory = (ctypes.c_char * nbytes).from_address(address + first * dtype.itemsize)
    return Flat(FORMATS[name], width, np.frombuffer(memoryview(memory), dtype), -first)


def flat_bytes(address: int, count: int) -> Any:
    """View bytes."""
    return np.frombuffer(memoryview((ctypes.c_char * count).from_address(address)), np.uint8)


class Shared:
    """Numbers of float64 that a block shares, and who has used them since the last barrier."""

    def __init__(self, count: int) -> None:
        self.numbers = [np.float64(np.nan)] * count
        self.read: dict[int, int] = {}  # by which thread; -1: by several
        self.written: dict[int, int] = {}

    def _check(self, index: int, t: int) -> None:
        if not 0 <= index < len(self.numbers):
            raise IndexError(f"number {index} of shared memory, of {len(self.numbers)}")
        if t != _here.t:
            raise RuntimeError(
                f"thread {_here.t} uses number {index} of shared memory, "
                "as another does with no barrier in between"
            )

    def get(self, index: int) -> Any:
        t = _here.t
        self._check(index, self.written.get(index, t))
        if self.read.setdefault(index, t) != t:
            self.read[index] = -1
        return self.numbers[index]

    def set(self, index: int, value: Any) -> None:
        t = _here.t
        self._check(index, self.written.get(index, t))
        self._check(index, self.read.get(index, t))
        self.written[index] = t
        self.numbers[index] = np.float64(value)

    def forget(self) -> None:
        self.read.clear()
        self.written.clear()


# Threads.

_BARRIER, _EXCHANGE, _PAUSE, _END = "a barrier", "an exchange", "another block", "the end"


class _Here:
    """The thread that runs."""

    t = 0
    b = 0
    threads = 0
    blocks = 0
    slots = 0  # of each thread
    together = False  # whether blocks may wait for one another
    memory: dict[str, Shared]  # of the block
    held: dict[tuple[int, int], Any]  # of the block, by slot and thread
    arrivals = 0  # of blocks, at any counter


_here = _Here()


def _wait(why: str, value: Any = None) -> list[Any]:
    """Let all other threads come as far as this one; give what each has brought."""
    runner = getcurrent().parent
    if runner is None:
        raise RuntimeError("expected `run` to run the threads, got Numba's own, without exchanges")
    brought: list[Any] = runner.switch((why, value))
    return brought


def _block(kernel: Callable[..., None], arguments: Any, b: int) -> None:
    """Run a block, handing over to others whenever a thread pauses."""

    def work(_: Any) -> tuple[str, None]:
        with np.errstate(all="ignore"):
            kernel(*arguments)
        return _END, None

    memory: dict[str, Shared] = {}
    held: dict[tuple[int, int], Any] = {}
    crew = [greenlet(work) for _ in range(_here.threads)]
    brought: list[Any] = []
    reasons: set[str] = set()
    while _END not in reasons:
        given, brought, reasons = brought, [], set()
        for t, each in enumerate(crew):
            _here.b, _here.t, _here.memory, _here.held = b, t, memory, held
            why, value = each.switch(given)
            while why == _PAUSE:
                getcurrent().parent.switch()
                _here.b, _here.t, _here.memory, _here.held = b, t, memory, held
                why, value = each.switch(None)
            brought.append(value)
            reasons.add(why)
        if len(reasons) > 1:
            raise RuntimeError(f"threads of one block wait for {sorted(reasons)}")
        if _BARRIER in reasons:
            for each in memory.values():
                each.forget()


def order(blocks: int) -> Any:
    """Give the numbers of a grid's blocks in the order in which they run."""
    return range(blocks)


def run(
    kernel: Callable[..., None], blocks: int, threads: int, arguments: Any,
    *, slots: int = 0, together: bool = False,
) -> None:  # fmt: skip
    """Run a kernel on a grid: block after block, or all `together`, each while the others wait."""
    _here.blocks, _here.threads, _here.slots, _here.together = blocks, threads, slots, together
    if not together:
        for b in order(blocks):
            _block(kernel, arguments, b)
        return
    running = [greenlet(lambda b=b: _block(kernel, arguments, b)) for b in order(blocks)]
    while running:
        before = _here.arrivals, len(running)
        for each in running:
            each.switch()
        running = [each for each in running if not each.dead]
        if before == (_here.arrivals, len(running)):
            raise RuntimeError(f"{len(running)} blocks wait for others that never come")


def _shared(name: str, count: int) -> Any:
    if name not in _here.memory:
        _here.memory[name] = Shared(count)
    return _here.memory[name]


# Twins.


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def thread() -> int:
    return _here.t


def block() -> int:
    return _here.b


def threads() -> int:
    return _here.threads


def blocks() -> int:
    return _here.blocks


def barrier() -> None:
    _wait(_BARRIER)


def any_of(flag: bool) -> bool:
    return any(_wait(_BARRIER, flag))


def from_neighbour(value: Any, distance: int) -> Any:
    return _wait(_EXCHANGE, value)[_here.t ^ distance]


def shared_sums() -> Any:
    return _shared("sums", THREADS)


def shared_constants() -> Any:
    return _shared("constants", CREWS * CONSTANTS)


def shared_lanes() -> Any:
    return _shared("lanes", STAGE)


def slots() -> bool:
    return True


def no_slots() -> bool:
    return False


def holds(slots: bool) -> bool:
    return slots


def keep(slots: bool, index: int, packed: Any) -> None:
    if not slots:
        return
    if not 0 <= index < _here.slots:
        raise IndexError(f"slot {index}, of {_here.slots}")
    _here.held[index, _here.t] = packed


def kept(slots: bool, index: int, x: Flat) -> Any:
    return _here.held[index, _here.t]


def read(memory: Any, index: int) -> Any:
    return memory.get(index)


def write(memory: Any, index: int, value: Any) -> None:
    memory.set(index, value)


def read_lanes(x: Flat, memory: Any, index: int, between: int, left: int) -> Any:
    return np.array([memory.get(index + k * between + (k >= left)) for k in range(x.width)])


def write_lanes(memory: Any, index: int, step: int, lanes: Any) -> None:
    for k, value in enumerate(lanes):
        memory.set(index + k * step, value)


def width(x: Any) -> int:
    return x.width if isinstance(x, Flat) else len(x)


def is_wide(x: Flat) -> bool:
    return x.computed is np.float64


def present(x: Any) -> bool:
    return x.memory is not None if isinstance(x, Flat) else x is not None


def as_computed(x: Flat, value: Any) -> Any:
    return x.computed(value)


def zeros(x: Flat) -> Any:
    return np.zeros(x.width, x.computed)


def wide(lanes: Any) -> Any:
    return lanes.astype(np.float64)


def narrow(x: Flat, lanes: Any) -> Any:
    return lanes.astype(x.computed)


def total(lanes: Any) -> Any:
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def finite_or_zero(lanes: Any) -> Any:
    return np.where(np.isfinite(lanes), lanes, lanes.dtype.type(0))


def median(a: Any, b: Any, c: Any) -> Any:
    return np.sort([a, b, c], axis=0)[1]


def spread(x: Flat, value: Any) -> Any:
    return np.full(x.width, value, np.float64)


def relu(lanes: Any) -> Any:
    return np.where(lanes <= 0, lanes.dtype.type(0), lanes)


def keep_where(bits: int, lanes: Any) -> Any:
    return np.where(bits & _POWERS[: len(lanes)], lanes, lanes.dtype.type(0))


def reciprocal(value: Any) -> Any:
    return type(value)(1) / value


def square_root(value: Any) -> Any:
    return np.sqrt(value)


def anew(value: int) -> int:
    return value


def small(value: int) -> int:
    if not 0 <= value < 1 << 32:
        raise OverflowError(f"expected an integer of 32 bits, got {value}")
    return value


def less(a: int, b: int) -> bool:
    return small(a) < small(b)


def quotient(a: int, b: int) -> int:
    return a // b


def apart() -> None:
    pass


def passing() -> int:
    return 0


def lasting() -> int:
    return 0


def load(x: Flat, index: int, policy: int) -> Any:
    return Packed(x, x.at(index, x.width).copy())


def nothing(x: Flat) -> Any:
    return Packed(x, np.zeros(x.width, x.computed))


def unpack(packed: Any) -> Any:
    return packed.numbers.astype(packed.x.computed)


def store(y: Flat, index: int, lanes: Any, policy: int) -> None:
    y.at(index, y.width)[...] = lanes


def get(x: Flat, index: int) -> Any:
    return x.at(index, 1).astype(x.computed)[0]


def put(y: Flat, index: int, value: Any) -> None:
    y.at(index, 1)[...] = value


def is_aligned(x: Any, index: int) -> bool:
    return bool((x.ctypes.data + index * x.itemsize) % (4 * x.itemsize) == 0)


def _four(x: Any, index: int) -> Any:
    if not 0 <= index <= index + 4 <= len(x):
        raise IndexError(f"4 numbers from {index} on, of {len(x)}")
    if not is_aligned(x, index):
        raise IndexError(f"{4 * x.itemsize} bytes at an address that is no multiple of them")
    return x[index : index + 4]


def get_four(x: Any, index: int) -> Any:
    return tuple(_four(x, index))


def put_four(y: Any, index: int, numbers: Any) -> None:
    _four(y, index)[...] = numbers


def _numbers_at(name: str) -> Callable[[int], Flat]:
    return lambda address: flat(name, 1, address, 0, 0)


float16_at, bfloat16_at, float32_at, float64_at = map(_numbers_at, FORMATS)


def passed(y: Flat, lanes: Any) -> int:
    stored = lanes.astype(y.memory.dtype)
    return int(sum(1 << k for k, through in enumerate(~(stored <= 0)) if through))


def every_bit() -> int:
    return -1


def get_bits(mask: Any, bit: int) -> int:
    if not 0 <= bit < 8 * len(mask):
        raise IndexError(f"bit {bit}, of {8 * len(mask)}")
    return int(mask[bit >> 3]) >> (bit & 7)


def gathered(y: Flat, bits: int) -> int:
    side = WORD_BITS // y.width
    first = _here.t // side * side
    each = _wait(_EXCHANGE, bits)
    return sum(each[first + k] << k * y.width for k in range(side))


def put_word(mask: Any, bit: int, bits: int) -> None:
    if not 0 <= bit <= bit + WORD_BITS <= 8 * len(mask):
        raise IndexError(f"a word from bit {bit} on, of {8 * len(mask)}")
    if bit % WORD_BITS or (mask.ctypes.data + bit // 8) % (WORD_BITS // 8):
        raise IndexError(f"a word from bit {bit} on, where none begins")
    mask[bit // 8 : bit // 8 + WORD_BITS // 8] = list(bits.to_bytes(WORD_BITS // 8, "little"))


def or_bits(mask: Any, bit: int, bits: int) -> None:
    if not 0 <= bit <= bit + bits.bit_length() <= 8 * len(mask):
        raise IndexError(f"bits {bits:b} from bit {bit} on, of {8 * len(mask)}")
    if bit % WORD_BITS + bits.bit_length() > WORD_BITS:
        raise IndexError(f"bits {bits:b} from bit {bit} on, beyond the end of a word")
    for k in range(bits.bit_length()):
        mask[bit + k >> 3] |= (bits >> k & 1) << (bit + k & 7)


def arrive(counters: Any, index: int, last: int) -> int:
    _here.arrivals += 1
    before = int(counters[index])
    counters[index] = 0 if before == last else before + 1
    return before


def awaited(counters: Any, index: int) -> bool:
    return bool(counters[index])


def pause() -> None:
    if not _here.together:
        raise RuntimeError("a block waits for others, which need not be running")
    getcurrent().parent.switch((_PAUSE, None))


def prefetch(address: int) -> None:
    pass
