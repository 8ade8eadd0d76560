"""From arrays and a channel axis to one of two views of memory, without a copy where one exists.

Planes have the channel outside, ``[N, C, S]``; rows have it inside, ``[N, S, C]`` in memory. Both
are three sizes and, for each array, three steps, so that a kernel needs no more than a `View`.
Many short planes run as rows of ``C * S`` columns, of which S fold into a channel.
Axes other than the channel may be taken in any order, because batch normalization treats them
alike; all the arrays of one call are taken in the same order.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SHORT_PLANE = 512  # places; below, planes run as rows of C * S columns ...
MANY_PLANES = 8  # ... if a column has at least so many elements

# numba compiles no 16-bit floats: kernels take the integers that hold their bits.
_STORED = {np.dtype(np.float16): np.uint16, np.dtype(ml_dtypes.bfloat16): np.int16}

# Channels; rows shorter than this do not pay for a loop each, and run as planes whose places are
# gathered into tiles: 6 times as fast or more at 3 channels, on a busy machine.
NARROW_ROW = 16

Steps = tuple[int, ...]


class View(NamedTuple):
    """``data[origin + n * dn + c * dc + s * ds]`` is element (n, c, s); steps count elements.

    A mask of bits is a view too: its ``data`` are bytes, its origin and steps count bits.
    """

    data: Any  # 1-d, contiguous
    origin: int
    dn: int
    dc: int
    ds: int


class Layout(NamedTuple):
    """How the arrays of one call are seen: planes or rows, sizes, and a view of each."""

    kind: str  # "planes" or "rows"
    shape: tuple[int, int, int, int]  # N, C, S and the fold: columns of a row per channel
    nbytes: int  # of one array
    views: tuple[View | None, ...]
    mask: View | None
    copies: tuple[tuple[Any, Any], ...]  # (an output, the contiguous stand-in to copy back)

    def finish(self) -> None:
        """Put into place the outputs that could not be viewed."""
        for array, stand_in in self.copies:
            array[...] = stand_in


class _Plan(NamedTuple):
    kind: str
    shape: tuple[int, int, int, int]
    steps: tuple[tuple[int, int, int], ...]  # dn, dc, ds of each array


class _Memory:
    """A stretch of memory as NumPy's array interface shows it, keeping its owner alive."""

    def __init__(self, owner: Any, address: int, size: int) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": owner.dtype.str,
            "shape": (size,),
            "data": (address, False),
        }


def _flat(array: Any) -> tuple[Any, int]:
    """All memory between an array's lowest and highest element, and where element 0 is in it.

    Always writeable: numba compiles anew for a read-only array, and kernels write to outputs only.
    """
    if array.flags.c_contiguous and array.flags.writeable:
        return np.asarray(array).reshape(-1), 0
    spans = [
        (size - 1) * step for size, step in zip(array.shape, element_steps(array), strict=True)
    ]
    low = sum(span for span in spans if span < 0)
    high = sum(span for span in spans if span > 0)
    address = array.__array_interface__["data"][0] + low * array.itemsize
    return np.asarray(_Memory(array, address, high - low + 1)), -low


def _stored(array: Any) -> Any:
    tag = None if array is None else _STORED.get(array.dtype)
    return array if tag is None else array.view(tag)


def element_steps(array: Any) -> Steps:
    """Strides in elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


@lru_cache(maxsize=256)
def contiguous_steps(shape: tuple[int, ...]) -> Steps:
    """Give the steps in elements of a C-contiguous array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _groups(shape: tuple[int, ...], axis: int, steps: tuple[Steps, ...]) -> list[list[int]]:
    """Axes, other than the channel, put together where every array crosses them with one step.

    The first array's steps say which axis is outermost; those that it broadcasts come first.
    """
    lead = steps[0]
    axes = [i for i in range(len(shape)) if i != axis and shape[i] != 1]
    axes.sort(key=lambda i: -abs(lead[i]) if lead[i] else -math.inf)
    groups: list[list[int]] = []
    for i in axes:
        if groups and all(s[groups[-1][-1]] == shape[i] * s[i] for s in steps):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@lru_cache(maxsize=1024)
def _plan(shape: tuple[int, ...], axis: int, steps: tuple[Steps, ...]) -> _Plan | None:
    """Sizes and steps for all arrays; None if no view fits them all."""
    groups = _groups(shape, axis, steps)
    if len(groups) > 2:
        return None
    outer, inner = ([], *groups)[-2:] if groups else ([], [])
    kind = "rows"
    if inner and (shape[axis] < NARROW_ROW or abs(steps[0][inner[-1]]) < abs(steps[0][axis])):
        kind = "planes"
    elif not outer:
        outer, inner = inner, outer
    N = math.prod(shape[i] for i in outer)
    S = math.prod(shape[i] for i in inner)
    C = shape[axis]
    each = tuple(
        (s[outer[-1]] if outer else 0, s[axis], s[inner[-1]] if inner else 0) for s in steps
    )
    fold = 1
    if (
        kind == "planes"
        and S < SHORT_PLANE
        and N >= MANY_PLANES
        and all(ds == 1 and dc == S for _, dc, ds in each)
    ):
        kind, fold, S = "rows", S, 1
        each = tuple((dn, 1, 0) for dn, _, _ in each)
    return _Plan(kind, (N, C, S, fold), each)


def arrange(
    axis: int, inputs: Sequence[Any], outputs: Sequence[Any] = (), *, mask: Any = None
) -> Layout:
    """View the arrays of one call, all of one shape and dtype, as planes or as rows.

    Parameters
    ----------
    axis : int
        The channel's, not negative.
    inputs, outputs : sequence of arrays or None
        Views come back in this order, outputs first; None stays None.
    mask : array of uint8, optional
        One bit per element in C order, packed.

    Returns
    -------
    Layout
        Where the arrays have no view in common, contiguous copies stand in for them;
        `Layout.finish` writes back those of outputs.
    """
    # Outputs first: they are never broadcast, so their steps tell how memory is laid out.
    outputs, inputs = [_stored(a) for a in outputs], [_stored(a) for a in inputs]
    arrays = [*outputs, *inputs]
    given = [a for a in arrays if a is not None]
    shape = given[0].shape
    bits = () if mask is None else (contiguous_steps(shape),)
    copies: tuple[tuple[Any, Any], ...] = ()

    plan = None
    if all(a.flags.aligned and not any(s % a.itemsize for s in a.strides) for a in given):
        plan = _plan(shape, axis, (*map(element_steps, given), *bits))
    if plan is None:
        arrays = [
            *(None if a is None else np.empty(a.shape, a.dtype) for a in outputs),
            *(None if a is None else np.require(a, requirements=["C", "A"]) for a in inputs),
        ]
        copies = tuple(
            (output, stand_in)
            for output, stand_in in zip(outputs, arrays, strict=False)
            if output is not None
        )
        plan = _plan(shape, axis, (contiguous_steps(shape),) * (len(given) + len(bits)))
        if plan is None:
            raise AssertionError("a contiguous array is always viewable")

    steps = iter(plan.steps)
    views = tuple(None if a is None else View(*_flat(a), *next(steps)) for a in arrays)
    mask_view = None if mask is None else View(mask, 0, *next(steps))
    return Layout(plan.kind, plan.shape, given[0].nbytes, views, mask_view, copies)
