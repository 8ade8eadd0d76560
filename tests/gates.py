"""What machine code must hold to, kernel by kernel, and what is found where it does not.

``python tests/gates.py sm_90`` prints what each variant of full width costs.
"""

import sys
from collections import Counter
from math import inf
from types import SimpleNamespace
from typing import NamedTuple

import sass

from numbabn.cuda import compilation
from numbabn.cuda.compilation import Code, Variant
from numbabn.cuda.formats import ACCESS, FORMATS, THREADS
from numbabn.cuda.schedule import DEPTH, slots_of

STEPS = 4  # rows or places that a thread takes at once, all of which it loads before it computes
MASK, WORD = 8, 32  # bits of a mask that are loaded and stored at a time
INTEGER_ATOMICS = {"INC", "OR"}

# Of a multiprocessor.
REGISTERS, MOST_THREADS = 1 << 16, 2048
SHARED = {(8, 0): 164 << 10, (9, 0): 228 << 10, (10, 0): 228 << 10}  # bytes
# What of it is given at a time: registers of a thread, bytes of a block, beside which each takes
# some more.
REGISTERS_AT_ONCE, SHARED_AT_ONCE, RESERVED = 8, 128, 1 << 10
HELD_BY_ONE = {(8, 0)}  # capabilities whose shared memory has no room for what two blocks hold
COUNTED_ON = (9, 0)  # for which instructions are counted


class Part(NamedTuple):
    """What a kernel does with all data, in a loop of its own: accesses of each turn."""

    name: str
    loads: int
    stores: int = 0
    reads_mask: bool = False
    writes_mask: bool = False
    keeps: int = 0  # accesses that are put into slots of shared memory
    takes: int = 0  # and those that come from there
    most: float = inf  # instructions by 16 bytes moved that there may be


STATISTICS = Part("statistics", 1)
NORMALIZE = Part("normalize", 2, 1, writes_mask=True)
PRODUCTS = Part("products", 2, reads_mask=True)
GRADIENT = Part("gradient", 2, 2, reads_mask=True)
PARTS = {
    "statistics": (STATISTICS,),
    "normalize": (NORMALIZE,),
    "forward": (
        STATISTICS._replace(name="forward statistics", keeps=1),
        NORMALIZE._replace(name="forward normalize", loads=1, takes=1),
    ),
    "products": (PRODUCTS,),
    "gradient": (GRADIENT,),
    "backward": (
        PRODUCTS._replace(name="backward products", keeps=2),
        GRADIENT._replace(name="backward gradient", loads=0, takes=2),
    ),
}
ARRAYS = {"forward": 1, "backward": 2}  # that are held
WAITS = {"planes": 1, "short": 1, "rows": 2}  # for the other blocks of a channel, where they are

# Instructions by 16 bytes moved, at most: 3% more than there are.
MOST = {
    #                     float16, bfloat16, float32, float64
    "planes": {
        "statistics":         (82, 88, 53, 68),
        "normalize":          (70, 76, 49, 46),
        "forward statistics": (89, 93, 60, 73),
        "forward normalize":  (76, 81, 56, 54),
        "products":           (65, 72, 44, 39),
        "gradient":           (43, 46, 30, 28),
        "backward products":  (71, 75, 48, 46),
        "backward gradient":  (38, 40, 25, 22),
    },
    "short": {
        "statistics":         (73, 79, 44, 59),
        "normalize":          (56, 63, 33, 28),
        "forward statistics": (76, 81, 47, 65),
        "forward normalize":  (55, 61, 32, 26),
        "products":           (58, 65, 36, 32),
        "gradient":           (41, 43, 26, 25),
        "backward products":  (61, 66, 39, 35),
        "backward gradient":  (35, 38, 21, 20),
    },
    "rows": {
        "statistics":         (73, 81, 45, 59),
        "normalize":          (71, 78, 55, 53),
        "forward statistics": (76, 81, 47, 63),
        "forward normalize":  (71, 77, 50, 48),
        "products":           (58, 66, 36, 32),
        "gradient":           (41, 43, 26, 24),
        "backward products":  (61, 66, 39, 34),
        "backward gradient":  (34, 37, 19, 18),
    },
}  # fmt: skip


class Expected(NamedTuple):
    """What a kernel must hold to."""

    parts: tuple[Part, ...]
    itemsize: int  # bytes
    width: int  # numbers moved at a time
    resident: int  # blocks of a multiprocessor
    threads: int  # of a block
    capability: tuple[int, int]
    held: int = 0  # accesses that a thread holds at most
    slots: int = 0  # those of them that shared memory has room for
    waits: int = 0  # loops that wait for other blocks
    merges: bool = False  # whether the pieces of a channel are put together

    @property
    def bits(self) -> int:
        return 8 * self.itemsize * self.width

    @property
    def is_packed(self) -> bool:
        """Whether numbers are rounded to 16 bits, two at once."""
        return self.itemsize == 2 and self.bits == 128


def is_full(variant: Variant) -> bool:
    """Whether it moves 16 bytes at a time."""
    return variant.width == FORMATS[variant.format].lanes


def _parts(variant: Variant, capability: tuple[int, int]) -> tuple[Part, ...]:
    """List the parts of a variant, with what each may cost where that is counted."""
    if variant.view == "channels":
        return ()
    parts = PARTS[variant.kernel]
    if variant.view == "short":  # whose threads set their own bits
        parts = tuple(part._replace(writes_mask=False) for part in parts)
    if not is_full(variant) or capability != COUNTED_ON:
        return parts
    most, column = MOST[variant.view], [*FORMATS].index(variant.format)
    return tuple(part._replace(most=most[part.name][column]) for part in parts)


def expected(variant: Variant, capability: tuple[int, int], resident: int) -> Expected:
    """Say what a variant must hold to, compiled for so many blocks of a multiprocessor."""
    kernel, view, format_name, width = variant
    itemsize, parts = FORMATS[format_name].itemsize, _parts(variant, capability)
    due = Expected(parts, itemsize, width, resident, THREADS, capability)
    if view == "channels":
        return due._replace(merges=True)
    if kernel not in ARRAYS:
        return due
    longest = SimpleNamespace(rounds=DEPTH // ARRAYS[kernel])
    return due._replace(
        resident=1 if capability in HELD_BY_ONE else resident,
        held=DEPTH,
        slots=slots_of(longest, view, ARRAYS[kernel]),
        waits=WAITS[view],
        merges=True,
    )


def compiled(variant: Variant, capability: tuple[int, int]) -> tuple[Code, sass.Kernel, Expected]:
    """Compile a variant, and read what it has become, and say what it must hold to."""
    code = compilation.compiled(variant, capability)
    due = expected(variant, capability, code.resident)
    return code, sass.read(code.cubin, code.report), due


class Finding(NamedTuple):
    gate: str
    what: str

    def __str__(self) -> str:
        return f"{self.gate}: {self.what}"


# Loops.


def _does(loop: sass.Loop, part: Part, bits: int) -> bool:
    """Whether a loop moves in global memory what a part of a kernel does."""
    loads = [bits] * part.loads * STEPS + [MASK] * part.reads_mask * STEPS
    stores = [bits] * part.stores * STEPS + [WORD] * part.writes_mask * STEPS
    return loop.moved("LDG") == sorted(loads) and loop.moved("STG") == sorted(stores)


def _only_loads(loop: sass.Loop) -> bool:
    return not any(loop.moved(name) for name in ("STG", "STS", "LDS"))


def _waits(loop: sass.Loop) -> bool:
    """Whether a loop reads a counter until other blocks are there, and leaves them time between."""
    names = Counter(each.name for each in loop.instructions)
    acquired = any(".STRONG.GPU" in each.opcode for each in loop.instructions)
    once = loop.moved("LDG") == [32] and names["NANOSLEEP"] == 1
    return once and acquired and _only_loads(loop)


def _merges(loop: sass.Loop) -> bool:
    """Whether a loop puts together what was summed of pieces, in float64."""
    summed = any(each.is_f64 for each in loop.instructions)
    return {*loop.moved("LDG")} == {64} and summed and _only_loads(loop)


class Loops(NamedTuple):
    """What the loops of a kernel are there for."""

    main: list[tuple[Part, sass.Loop]]
    waiting: list[sass.Loop]
    other: list[sass.Loop]  # that none should be


def loops(kernel: sass.Kernel, due: Expected) -> Loops:
    """Tell a kernel's loops apart."""
    found = Loops([], [], [])
    for loop in kernel.loops:
        parts = [part for part in due.parts if _does(loop, part, due.bits)]
        if _waits(loop):
            found.waiting.append(loop)
        elif parts:
            found.main.extend((part, loop) for part in parts)
        elif not (due.merges and _merges(loop)):
            found.other.append(loop)
    return found


def per_access(part: Part, loop: sass.Loop, due: Expected) -> float:
    """Instructions of a loop, whether or not they all run, by 16 bytes moved.

    Those are moved from and to global memory, or come from slots; to put them there is what it
    costs to hold them.
    """
    nbytes = (part.loads + part.stores + part.takes) * STEPS * due.bits // 8
    return len(loop.instructions) * ACCESS / nbytes


def carried(loop: sass.Loop) -> int:
    """How many accesses stay in registers until the next turn puts them into slots."""
    stores = [at for at, each in enumerate(loop.instructions) if each.name == "STS"]
    return sum(loop.origin(at) is None for at in stores)


# A kernel.


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def slot_bytes(due: Expected) -> int:
    """How many bytes of shared memory a block's slots take."""
    return due.slots * due.threads * due.bits // 8


def resident(kernel: sass.Kernel, due: Expected) -> int:
    """How many blocks of a kernel find room on a multiprocessor, holding as much as they may."""
    registers = _up(kernel.registers, REGISTERS_AT_ONCE) * due.threads
    shared = kernel.shared + slot_bytes(due) + RESERVED
    return min(
        REGISTERS // registers,
        SHARED[due.capability] // _up(shared, SHARED_AT_ONCE),
        MOST_THREADS // due.threads,
    )


def findings(kernel: sass.Kernel, due: Expected) -> list[Finding]:
    """Hold a kernel to all of it."""
    found = []

    def note(gate: str, what: object) -> None:
        found.append(Finding(gate, str(what)))

    everything = [each for body in kernel.functions.values() for each in body]
    local = sum(each.name in ("LDL", "STL") for each in everything)
    if kernel.stack or kernel.spilled or local:
        what = f"{kernel.stack} bytes of stack, {kernel.spilled} spilled, {local} accesses"
        note("spills", what)

    if resident(kernel, due) < due.resident:
        what = f"{kernel.registers} registers, {kernel.shared} + {slot_bytes(due)} bytes"
        note("residence", f"{what}: room for {resident(kernel, due)} blocks")

    for each in everything:
        if each.name.startswith(("ATOM", "RED")) and not INTEGER_ATOMICS & {
            *each.opcode.split(".")
        }:
            note("atomics", each)

    main, waiting, other = loops(kernel, due)
    if len(waiting) != due.waits:
        note("waiting", f"{len(waiting)} loops wait for other blocks, not {due.waits}")
    for loop in other:
        loads, stores = (dict(Counter(loop.moved(name))) for name in ("LDG", "STG"))
        note("access", f"{loop}: bits loaded {loads}, stored {stores}, which is no part's")
    for part in {*due.parts} - {part for part, _ in main}:
        note("access", f"no loop moves {due.bits} bits at a time as {part.name} does")

    for part, loop in main:
        for name, count in (("STS", part.keeps), ("LDS", part.takes)):
            if loop.moved(name) != [due.bits] * count * STEPS:
                note("held", f"{part.name}: {name} of {loop.moved(name)} bits")
        if part.keeps and loop.moved("STS"):
            held = due.slots + carried(loop)
            if held != due.held:
                note("held", f"{part.name}: {held} accesses by a thread, not {due.held}")

        cost = per_access(part, loop, due)
        if cost > part.most:
            note("cost", f"{part.name}: {cost:.1f} instructions by 16 bytes")

        for each in loop.instructions:
            if each.is_f64 and due.itemsize < 8:
                note("float64", f"{part.name}: {each}")
            if _divides(each):
                note("division", f"{part.name}: {each}")
        if due.is_packed:
            packed = 0
            for each in loop.instructions:
                if each.rounds == 1:
                    note("packing", f"{part.name}: {each}")
                packed += each.rounds == 2
            if packed < part.stores * STEPS * due.width // 2:
                note("packing", f"{part.name}: {packed} times two numbers are rounded")
    return found


def _divides(each: sass.Instruction) -> bool:
    """Whether an integer division begins here, or is called."""
    if each.name == "CALL":
        return any(name in each.operands for name in ("_div_", "_rem_"))
    return each.name == "I2F" and each.opcode.endswith(".RP")


def table(capability: tuple[int, int]) -> None:
    """Print what each variant of full width takes of a multiprocessor, and costs."""
    row = "{:30} {:>9} {:>7} {:>6} {:>6}  {}"
    print(row.format("", "registers", "shared", "slots", "blocks", "instructions by 16 bytes"))
    for variant in filter(is_full, compilation.variants()):
        _, kernel, due = compiled(variant, capability)
        main = loops(kernel, due).main
        costs = [f"{part.name} {per_access(part, loop, due):.0f}" for part, loop in main]
        sizes = kernel.registers, kernel.shared, slot_bytes(due), resident(kernel, due)
        print(row.format(str(variant), *sizes, ", ".join(costs)))


if __name__ == "__main__":
    table(divmod(int(sys.argv[1].removeprefix("sm_")), 10))
