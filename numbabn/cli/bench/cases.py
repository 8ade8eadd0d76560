"""What is timed: an operation on a shape in a layout and a dtype."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class Traffic(NamedTuple):
    """How often an operation at the limit sweeps an array of x's size."""

    reads: int
    writes: int

    @property
    def sweeps(self) -> int:
        """Both together."""
        return self.reads + self.writes


TRAFFIC = {
    "forward": Traffic(1, 1),  # x; y
    "inference": Traffic(1, 1),  # x; y
    "backward": Traffic(2, 1),  # dy, x; dx
    "add_relu": Traffic(2, 1),  # x, residual; y, beside a mask of one bit per element
}
LAYOUTS = ("nchw", "nhwc", "nc")
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def layouts_of(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Name the ways in which such a shape may lie in memory, the usual one first."""
    return ("nc",) if len(shape) == 2 else ("nchw", "nhwc")


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes
    ----------
    op : str
        A key of `TRAFFIC`.
    layout : {"nchw", "nhwc", "nc"}
        Channels first, channels last, or no places at all; the places may be of any rank.
    dtype : str
        A key of `DTYPES`.
    shape : tuple of int
        N, C, then the places, whatever the layout.
    """

    op: str
    layout: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The shape as it is written on the command line."""
        return "x".join(map(str, self.shape))

    @property
    def axis(self) -> int:
        """Where the channel is."""
        return -1 if self.layout == "nhwc" else 1

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of the array itself."""
        N, C, *places = self.shape
        return (N, *places, C) if self.layout == "nhwc" else self.shape

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * int(DTYPES[self.dtype].itemsize)

    @property
    def traffic(self) -> int:
        """Bytes that the operation moves at the limit."""
        return self.nbytes * TRAFFIC[self.op].sweeps

    def per_channel(self, values: Any) -> Any:
        """Shape an array of one number per channel so that it broadcasts against x."""
        return values.reshape(-1, *[1] * (0 if self.axis == -1 else len(self.shape) - 2))
