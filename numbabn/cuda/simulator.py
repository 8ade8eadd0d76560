"""Twins of `intrinsics` for Numba's simulator, and how a grid of threads runs there.

Kernels run as they are, each thread of a block as one of Python's. Only one of them runs at a time:
at a barrier it hands on to the next, so that all have come when its turn comes again. Addresses
are of the host's memory; whoever reads or writes beside an array or off its alignment is told.
"""

import ctypes
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .formats import COLUMNS, CONSTANTS, FORMATS, STAGE, SUMS, Format

WORD = 32
_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in FORMATS}


class Flat:
    """An array in memory, whose numbers are moved `width` at a time; or none."""

    def __init__(self, format_: Format, width: int, memory: Any = None, origin: int = 0) -> None:
        self.format = format_
        self.width = width
        self.computed = np.dtype(format_.computed).type
        self.memory = memory  # one dimension
        self.origin = origin  # index of the element that has index 0

    def at(self, index: int, count: int) -> Any:
        first = self.origin + index
        if not 0 <= first <= first + count <= len(self.memory):
            raise IndexError(f"{count} numbers from {first} on, of {len(self.memory)}")
        part = self.memory[first : first + count]
        if part.ctypes.data % part.nbytes:
            raise IndexError(f"{part.nbytes} bytes at an address that is no multiple of them")
        return part


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


# Threads.


class _Stopped(Exception):  # noqa: N818
    """Another thread of the block has failed."""


class _Block:
    """Threads that run one at a time, round after round."""

    def __init__(self, blocks: int, count: int) -> None:
        self.blocks = blocks
        self.count = count
        self.turns = [threading.Lock() for _ in range(count)]
        for turn in self.turns:
            turn.acquire()
        self.left_for = [""] * count  # why each thread waits
        self.slots: tuple[list[Any], list[Any]] = ([None] * count, [None] * count)
        self.memory: dict[str, Any] = {}
        self.error: BaseException | None = None

    def hand_on(self, t: int) -> None:
        self.turns[(t + 1) % self.count].release()

    def wait(self, t: int) -> None:
        self.turns[t].acquire()
        if self.error is not None:
            raise _Stopped

    def round(self, t: int, why: str) -> None:
        """Let all other threads come as far as this one."""
        self.left_for[t] = why
        self.hand_on(t)
        self.wait(t)
        if t == 0 and len(set(self.left_for)) > 1:
            raise RuntimeError(f"threads of one block wait for {sorted(set(self.left_for))}")


class _Thread(threading.local):
    block: _Block
    t: int
    b: int
    turn: int  # which of the block's slots are free


_here = _Thread()


def run(kernel: Callable[..., None], blocks: int, threads: int, arguments: Any) -> None:
    """Run a kernel on a grid, block after block."""
    block = _Block(blocks, threads)

    def work(t: int) -> None:
        _here.block, _here.t, _here.turn = block, t, 0
        try:
            block.wait(t)
            with np.errstate(all="ignore"):
                for b in range(blocks):
                    _here.b = b
                    if t == 0:
                        block.memory.clear()
                    kernel(*arguments)
                    block.round(t, "the end")
        except _Stopped:
            pass
        except BaseException as error:
            block.error = error
        finally:
            block.hand_on(t)

    crew = [threading.Thread(target=work, args=(t,)) for t in range(threads)]
    for each in crew:
        each.start()
    block.turns[0].release()
    for each in crew:
        each.join()
    if block.error is not None:
        raise block.error


def _exchange(value: Any) -> list[Any]:
    """Give what each thread of the block has brought."""
    slots = _here.block.slots[_here.turn]
    _here.turn = 1 - _here.turn
    slots[_here.t] = value
    _here.block.round(_here.t, "an exchange")
    return slots


def _shared(name: str, count: int) -> Any:
    return _here.block.memory.setdefault(name, np.full(count, np.nan))


# Twins.


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def thread() -> int:
    return _here.t


def block() -> int:
    return _here.b


def threads() -> int:
    return _here.block.count


def blocks() -> int:
    return _here.block.blocks


def barrier() -> None:
    _here.block.round(_here.t, "a barrier")


def any_of(flag: bool) -> bool:
    return any(_exchange(flag))


def fence() -> None:
    pass


def from_neighbour(value: Any, distance: int) -> Any:
    return _exchange(value)[_here.t ^ distance]


def shared_sums() -> Any:
    return _shared("sums", SUMS)


def shared_constants() -> Any:
    return _shared("constants", COLUMNS * CONSTANTS)


def shared_lanes() -> Any:
    return _shared("lanes", STAGE)


def read(memory: Any, index: int) -> Any:
    return memory[index]


def write(memory: Any, index: int, value: Any) -> None:
    memory[index] = value


def read_lanes(x: Flat, memory: Any, index: int, step: int) -> Any:
    return np.array([memory[index + k * step] for k in range(x.width)])


def write_lanes(memory: Any, index: int, step: int, lanes: Any) -> None:
    for k, value in enumerate(lanes):
        memory[index + k * step] = value


def width(x: Flat) -> int:
    return x.width


def is_wide(x: Flat) -> bool:
    return x.computed is np.float64


def width_of(lanes: Any) -> int:
    return len(lanes)


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


def spread(x: Flat, value: Any) -> Any:
    return np.full(x.width, value, np.float64)


def relu(lanes: Any) -> Any:
    return np.where(lanes <= 0, lanes.dtype.type(0), lanes)


def keep_where(bits: int, lanes: Any) -> Any:
    kept = [bits >> k & 1 for k in range(len(lanes))]
    return np.where(kept, lanes, lanes.dtype.type(0))


def reciprocal(value: Any) -> Any:
    return type(value)(1) / value


def square_root(value: Any) -> Any:
    return np.sqrt(value)


def quotient(a: int, b: int) -> int:
    return a // b


def load(x: Flat, index: int) -> Any:
    return Packed(x, x.at(index, x.width).copy())


def nothing(x: Flat) -> Any:
    return Packed(x, np.zeros(x.width, x.computed))


def unpack(packed: Any) -> Any:
    return packed.numbers.astype(packed.x.computed)


def store(y: Flat, index: int, lanes: Any) -> None:
    y.at(index, y.width)[...] = lanes


def get(x: Flat, index: int) -> Any:
    return x.at(index, 1).astype(x.computed)[0]


def put(y: Flat, index: int, value: Any) -> None:
    y.at(index, 1)[...] = value


def _numbers_at(name: str) -> Callable[[int], Flat]:
    return lambda address: flat(name, 1, address, 0, 0)


float16_at, bfloat16_at, float32_at, float64_at = map(_numbers_at, FORMATS)


def passed(y: Flat, lanes: Any) -> int:
    stored = lanes.astype(y.memory.dtype)
    return int(sum(1 << k for k, through in enumerate(~(stored <= 0)) if through))


def every_bit() -> int:
    return -1


def get_bits(mask: Any, bit: int) -> int:
    return int(mask[bit >> 3]) >> (bit & 7)


def gathered(y: Flat, bits: int) -> int:
    side = WORD // y.width
    first = _here.t // side * side
    each = _exchange(bits)
    return sum(each[first + k] << k * y.width for k in range(side))


def put_word(mask: Any, bit: int, bits: int) -> None:
    if bit % WORD or (mask.ctypes.data + bit // 8) % (WORD // 8):
        raise IndexError(f"a word from bit {bit} on")
    mask[bit // 8 : bit // 8 + WORD // 8] = list(bits.to_bytes(WORD // 8, "little"))


def or_bits(mask: Any, bit: int, bits: int) -> None:
    if bit % WORD + bits.bit_length() > WORD:
        raise IndexError(f"bits {bits:b} from bit {bit} on, beyond the end of a word")
    for k in range(bits.bit_length()):
        mask[bit + k >> 3] |= (bits >> k & 1) << (bit + k & 7)


def arrive(counters: Any, index: int, last: int) -> int:
    before = int(counters[index])
    counters[index] = 0 if before == last else before + 1
    return before
