"""How numbers lie in memory, what they are computed in, and the sizes that kernels are built on."""

from typing import NamedTuple

WARP = 32
WORD = 4  # bytes; masks are read and written by words
ACCESS = 16  # bytes that one instruction moves at most
THREADS = 256  # of a block
MOST_BLOCKS = 1 << 20  # of a grid; the rest is left to its loops
LANES = 8  # numbers that one access moves at most
LEGACY = 1  # handle of the legacy default stream, which 0 stands for where it is no other

# Numbers of float64 in shared memory.
CREWS = THREADS // WARP  # of a block of planes, at most
CONSTANTS = 5  # of a channel, at most
STAGE = THREADS * LANES  # one of each lane; or, of rows, those constants of a block's channels


class Format(NamedTuple):
    """A dtype of data."""

    name: str
    itemsize: int  # bytes
    computed: str

    @property
    def lanes(self) -> int:
        """How many numbers one access moves."""
        return ACCESS // self.itemsize


FORMATS = {
    each.name: each
    for each in (
        Format("float16", 2, "float32"),
        Format("bfloat16", 2, "float32"),
        Format("float32", 4, "float32"),
        Format("float64", 8, "float64"),
    )
}
# By these numbers kernels tell the dtypes of per-channel arrays.
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = range(4)
