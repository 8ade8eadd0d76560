"""What kernels take: arrays as addresses and steps, whatever their rank, and per-channel numbers.

A kernel's arguments are tuples of these; compiled, each member is a number of 8 bytes.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

from ..libraries import DeviceArray, Form
from .formats import FORMATS

_INDEX = {name: k for k, name in enumerate(FORMATS)}


class Map(NamedTuple):
    """Element (n, c, s) lies ``n * dn + c * dc + s * ds`` elements, or bits, behind ``at``."""

    at: Any  # array or, in kernels, `Global`; of a mask, the address of its bytes; 0 if none
    dn: int
    dc: int
    ds: int


class Numbers(NamedTuple):
    """One number per channel."""

    at: Any  # array or, in kernels, its address; 0 if there is none
    step: int  # bytes
    format: int  # index of `formats.FORMATS`


class Forward(NamedTuple):
    """Maps of a forward pass."""

    y: Any  # `Map` [N, C, S], written
    x: Any  # `Map` [N, C, S]
    residual: Any  # `Map` [N, C, S], or none
    mask: Any  # `Map` of bits [N, C, S], written, or none


class Backward(NamedTuple):
    """Maps of a backward pass."""

    dx: Map  # [N, C, S], written
    dresidual: Map  # [N, C, S], written, or none
    dy: Map  # [N, C, S]
    x: Map  # [N, C, S]
    mask: Map  # bits [N, C, S], or none


class Parameters(NamedTuple):
    """Per-channel arrays of a forward pass; none of them needs to be there."""

    weight: Numbers
    bias: Numbers
    running_mean: Numbers  # updated in training
    running_var: Numbers
    mean: Numbers  # the batch's, written; none in inference
    m2: Numbers
    invstd: Numbers


class Gradients(NamedTuple):
    """Per-channel arrays of a backward pass."""

    weight: Numbers  # or none
    mean: Numbers
    invstd: Numbers
    dweight: Numbers  # written
    dbias: Numbers  # written


class Settings(NamedTuple):
    """Numbers of a forward pass."""

    eps: float
    momentum: float
    correction: float
    rectify: int  # whether there is a ReLU


class Memory(NamedTuple):
    """What the blocks of a grid share."""

    partials: Any  # `Global` of float64 [3, C, pieces]: counts, means and M2; or two sums
    sums: Any  # `Global` of float64 [2, C]: of all pieces, mean and M2; or those sums
    counters: Any  # address of int32 [groups, 2]: blocks that have come so far; zeros


class Shape(NamedTuple):
    """Sizes, and how blocks and threads share them; see `schedule`.

    A piece is what a crew of ``2**crew`` threads sums in one go. They lie ``2**across`` side by
    side along the axis that is contiguous in memory, and `below` one another along the other one.
    """

    N: int
    C: int
    S: int
    planes: int  # of a piece; 1 where it is part of a plane
    places: int  # of a piece; of rows, their number
    per_plane: int  # pieces of a plane
    pieces: int  # of a channel
    groups: int  # of channels that a block takes side by side
    crew: int
    across: int
    below: int
    side: int  # threads side by side
    along: int  # turns of a thread along a plane
    rounds: int  # turns of a thread, at most
    beside: int  # 2**beside channels are put together side by side; of short planes, a group
    share: int  # how many channels of a group one of its blocks puts together
    lasting: int = -1  # of two sweeps, the first task that L2 keeps for the second; else -1


_NO_NUMBERS = Numbers(0, 0, 0)
_numbers = partial(tuple.__new__, Numbers)  # past its constructor, as in `layout`


@lru_cache(maxsize=1024)
def _step_and_format(form: Form) -> tuple[int, int]:
    return form.strides[0], _INDEX[form.name]


def numbers_of(array: DeviceArray | None) -> Numbers:
    """Pass one number per channel."""
    if array is None:
        return _NO_NUMBERS
    return _numbers((array, *_step_and_format(array.form)))
