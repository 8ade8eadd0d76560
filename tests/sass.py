"""What a GPU's machine code says: a kernel's registers and memory, its instructions, its loops."""

import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SECTION = re.compile(r"\s*\.section\s+\.text\.([^\s,]+)")
_LABEL = re.compile(r"(\.L_x_\w+):")
_TARGET = re.compile(r"`\((\.L_x_\w+)\)")
_LAST = ("BRA", "EXIT", "RET", "KILL", "BPT")
_INDIRECT = ("BRX", "BRXU", "JMP", "JMX", "JMXU")


class Instruction(NamedTuple):
    """One of a function."""

    address: int  # within the function
    guard: str  # such as @!P0, or nothing
    opcode: str  # with all that follows it after points
    operands: str

    def __str__(self) -> str:
        return f"{self.guard} {self.opcode} {self.operands}".strip()

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """How many bits of memory a load or store moves."""
        sizes = (re.fullmatch(r"[US]?(8|16|64|128|256)", each) for each in self.opcode.split("."))
        return next((int(size[1]) for size in sizes if size), 32)

    @property
    def is_f64(self) -> bool:
        """Whether it computes in float64, or converts to or from it."""
        return bool(re.match(r"D(ADD|FMA|MMA|MNMX|MUL|SET)|MUFU.*64H|.*\.F64", self.opcode))

    @property
    def rounds(self) -> int:
        """How many numbers it rounds to 16 bits."""
        if self.name == "F2FP":
            return 1 if "RZ" in self.operands else 2
        return int(self.opcode.startswith(("F2F.F16", "F2F.BF16")))


class Loop(NamedTuple):
    """A loop that has none inside."""

    instructions: tuple[Instruction, ...]

    def __str__(self) -> str:
        return f"loop at {self.instructions[0].address:#x}"

    def moved(self, name: str) -> list[int]:
        """How many bits each load (LDG, LDS) or store (STG, STS) moves, in order of size."""
        return sorted(each.bits for each in self.instructions if each.name == name)

    def origin(self, store: int) -> Instruction | None:
        """Find what gave what the store at an index writes; None if that was an earlier turn."""
        register = self.instructions[store].operands.rpartition(", ")[2]
        for each in reversed(self.instructions[:store]):
            if each.operands.partition(", ")[0] == register:
                if not each.opcode.startswith(("MOV", "IMAD.MOV")):
                    return each
                register = each.operands.rpartition(", ")[2].removesuffix(".reuse")
        return None


class Kernel(NamedTuple):
    """What a cubin and the assembler's report hold."""

    registers: int
    shared: int  # bytes
    stack: int  # bytes
    spilled: int  # bytes, stored and loaded
    functions: dict[str, tuple[Instruction, ...]]
    loops: tuple[Loop, ...]  # all of those that load or store numbers of global memory


@cache
def disassembler() -> str | None:
    """Find nvdisasm, among Python's packages or on the path."""
    try:
        import nvidia
    except ImportError:
        return shutil.which("nvdisasm")
    found = (each for folder in nvidia.__path__ for each in Path(folder).glob("*/bin/nvdisasm*"))
    return next(map(str, found), shutil.which("nvdisasm"))


def disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(disassembler()), "--print-code", "--no-dataflow", str(path)]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def _numbers(pattern: str, report: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, report)]
    if not found:
        raise ValueError(f"The assembler's report does not say {pattern}:\n{report}")
    return found


def read(cubin: bytes, report: str) -> Kernel:
    """Read a cubin, and what the assembler reported of it."""
    functions: dict[str, tuple[Instruction, ...]] = {}
    loops: list[Loop] = []
    for name, body, labels in _sections(disassembled(cubin)):
        functions[name] = tuple(body)
        loops += _loops(body, labels)
    return Kernel(
        max(_numbers(r"Used (\d+) registers", report)),
        sum(map(int, re.findall(r"(\d+) bytes smem", report))),
        max(_numbers(r"(\d+) bytes stack frame", report)),
        sum(_numbers(r"(\d+) bytes spill", report)),
        functions,
        tuple(each for each in loops if each.moved("LDG") or each.moved("STG")),
    )


def _sections(text: str) -> list[tuple[str, list[Instruction], dict[str, int]]]:
    """Split a listing into functions, each with its instructions and where labels point."""
    sections: list[tuple[str, list[Instruction], dict[str, int]]] = []
    for line in text.splitlines():
        if section := _SECTION.match(line):
            sections.append((section[1], [], {}))
        elif label := _LABEL.match(line):
            sections[-1][2][label[1]] = len(sections[-1][1])
        elif found := _INSTRUCTION.match(line):
            address, guard, opcode, operands = found.groups()
            sections[-1][1].append(Instruction(int(address, 16), guard or "", opcode, operands))
    return sections


def _blocks(body: list[Instruction], labels: dict[str, int]) -> dict[int, tuple[int, list[int]]]:
    """Cut a function into basic blocks: by where each starts, its end and what may follow."""
    branches: dict[int, list[int]] = {}
    for at, each in enumerate(body):
        if each.name in _INDIRECT:
            raise ValueError(f"No target is known of {each}")
        # BSSY says where paths meet again. A CALL of a label is a branch, and comes back from none.
        target = None if each.name == "BSSY" else _TARGET.search(each.operands)
        if target or each.name in _LAST:
            branches[at] = [labels[target[1]]] if target else []
            always = not each.guard and re.fullmatch(r"`\(\S+\)|", each.operands)
            if not (each.name in _LAST and (always or each.name == "RET")):
                branches[at].append(at + 1)
    starts = sorted({0, *labels.values(), *(at + 1 for at in branches)} - {len(body)})
    return {
        start: (end, branches.get(end - 1, [end]))
        for start, end in zip(starts, [*starts[1:], len(body)], strict=True)
    }


def _loops(body: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """Find a function's innermost loops."""
    blocks = _blocks(body, labels)
    before: dict[int, list[int]] = {}
    backward: dict[int, list[int]] = {}  # by a loop's first block, those that lead back to it
    path, done = [0], {0: False}
    while path:
        block = path[-1]
        following = [each for each in blocks[block][1] if each in blocks]
        for each in following:
            if each not in done:
                path.append(each)
                done[each] = False
                break
        else:
            for each in following:
                before.setdefault(each, []).append(block)
                if not done[each]:
                    backward.setdefault(each, []).append(block)
            done[path.pop()] = True
    members = {first: _members(first, ends, before) for first, ends in backward.items()}
    return [
        Loop(tuple(each for block in sorted(inside) for each in body[block : blocks[block][0]]))
        for first, inside in sorted(members.items())
        if not any(other in inside for other in members if other != first)
    ]


def _members(first: int, ends: list[int], before: dict[int, list[int]]) -> set[int]:
    """Find the blocks from a loop's first to those that lead back to it."""
    members, pending = {first}, list(ends)
    while pending:
        block = pending.pop()
        if block not in members:
            if block == 0:
                raise ValueError("A loop can be entered in its midst")
            members.add(block)
            pending += before[block]
    return members
