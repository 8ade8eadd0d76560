"""What machine code must hold to, kernel by kernel, and what is found where it does not."""

from collections import Counter
from typing import NamedTuple

import sass

from numbabn.cuda import compilation
from numbabn.cuda.compilation import Variant
from numbabn.cuda.formats import FORMATS, THREADS

STEPS = 4  # rows or places that a thread takes at once, all of which it loads before it computes
REGISTERS = 1 << 16  # of a multiprocessor
# Bytes of its shared memory, and those of them that each block takes beyond its own.
SHARED = {(8, 0): 164 << 10, (9, 0): 228 << 10, (10, 0): 228 << 10}
RESERVED = 1 << 10
MASK, WORD = 8, 32  # bits of a mask that are loaded and stored at a time
INTEGER_ATOMICS = {"INC", "OR"}


class Part(NamedTuple):
    """What a kernel does with all data, in a loop of its own: accesses of each turn."""

    name: str
    loads: int
    stores: int = 0
    reads_mask: bool = False
    writes_mask: bool = False
    keeps: int = 0  # accesses that are put into slots of shared memory
    takes: int = 0  # and those that come from there


STATISTICS = Part("statistics", 1)
NORMALIZE = Part("normalize", 2, 1, writes_mask=True)
PRODUCTS = Part("products", 2, reads_mask=True)
GRADIENT = Part("gradient", 2, 2, reads_mask=True)
PARTS = {
    "statistics": (STATISTICS,),
    "normalize": (NORMALIZE,),
    "forward": (STATISTICS._replace(keeps=1), NORMALIZE._replace(loads=1, takes=1)),
    "products": (PRODUCTS,),
    "gradient": (GRADIENT,),
    "backward": (PRODUCTS._replace(keeps=2), GRADIENT._replace(loads=0, takes=2)),
}
ARRAYS = {"forward": 1, "backward": 2}  # that are held


class Expected(NamedTuple):
    """What a kernel must hold to."""

    parts: tuple[Part, ...]
    itemsize: int  # bytes
    width: int  # numbers moved at a time
    resident: int  # blocks of a multiprocessor
    threads: int  # of a block
    capability: tuple[int, int]

    @property
    def bits(self) -> int:
        return 8 * self.itemsize * self.width

    @property
    def is_packed(self) -> bool:
        """Whether numbers are rounded to 16 bits, two at once."""
        return self.itemsize == 2 and self.bits == 128


def expected(variant: Variant, capability: tuple[int, int], resident: int) -> Expected:
    """Say what a variant must hold to, compiled for so many blocks of a multiprocessor."""
    itemsize = FORMATS[variant.format].itemsize
    parts = PARTS[variant.kernel]
    return Expected(parts, itemsize, variant.width, resident, THREADS, capability)


def compiled(variant: Variant, capability: tuple[int, int]) -> tuple[str, sass.Kernel, Expected]:
    """Compile a variant, and read its name, what it has become, and what it must hold to."""
    code = compilation.compiled(variant, capability)
    due = expected(variant, capability, code.resident)
    return code.name, sass.read(code.cubin, code.report), due


class Finding(NamedTuple):
    gate: str
    what: str

    def __str__(self) -> str:
        return f"{self.gate}: {self.what}"


def _does(loop: sass.Loop, part: Part, bits: int) -> bool:
    """Whether a loop loads and stores what a part of a kernel does."""
    loads = [bits] * part.loads * STEPS + [MASK] * part.reads_mask * STEPS
    stores = [bits] * part.stores * STEPS + [WORD] * part.writes_mask * STEPS
    moved = {
        "LDG": loads, "STG": stores,
        "STS": [bits] * part.keeps * STEPS, "LDS": [bits] * part.takes * STEPS,
    }  # fmt: skip
    return all(loop.moved(name) == sorted(bits) for name, bits in moved.items())


def _is_per_channel(loop: sass.Loop) -> bool:
    """Whether a loop loads a channel's numbers, of any dtype, or its pieces' sums, of float64."""
    sizes = set(loop.moved("LDG"))
    return not loop.moved("STG") and (sizes == {16, 32, 64} or sizes == {64})


def main_loops(
    kernel: sass.Kernel, due: Expected
) -> tuple[list[tuple[Part, sass.Loop]], list[sass.Loop]]:
    """Find the loop of each part, and the loops of none."""
    found, left = [], []
    for loop in kernel.loops:
        parts = [part for part in due.parts if _does(loop, part, due.bits)]
        found += [(part, loop) for part in parts]
        if not parts and not _is_per_channel(loop):
            left.append(loop)
    return found, left


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

    blocks, threads = due.resident, due.threads
    if kernel.registers * threads * blocks > REGISTERS:
        note("residence", f"{kernel.registers} registers")
    if (kernel.shared + RESERVED) * blocks > SHARED[due.capability]:
        note("residence", f"{kernel.shared} bytes of shared memory")

    for each in everything:
        if each.name.startswith(("ATOM", "RED")) and not INTEGER_ATOMICS & {
            *each.opcode.split(".")
        }:
            note("atomics", each)

    loops, left = main_loops(kernel, due)
    for loop in left:
        loads, stores = (dict(Counter(loop.moved(name))) for name in ("LDG", "STG"))
        note("access", f"{loop}: bits loaded {loads}, stored {stores}, which is no part's")
    for part in {*due.parts} - {part for part, _ in loops}:
        note("access", f"no loop moves {due.bits} bits at a time as {part.name} does")

    for part, loop in loops:
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


class Figures(NamedTuple):
    """What a kernel's main loop costs."""

    part: str
    registers: int  # of the kernel
    instructions: int  # whether or not they all run
    per_access: float  # instructions by 16 bytes loaded or stored


def figures(kernel: sass.Kernel, due: Expected) -> list[Figures]:
    """Say what each part of a kernel costs."""
    result = []
    for part, loop in main_loops(kernel, due)[0]:
        count = len(loop.instructions)
        nbytes = (part.loads + part.stores) * STEPS * due.bits // 8
        result.append(Figures(part.name, kernel.registers, count, count * 16 / nbytes))
    return result
