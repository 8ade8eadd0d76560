"""From arrays and a channel axis to one of two views of memory, without a copy where one exists.

Planes have the channel outside, ``[N, C, S]``; rows have it inside, ``[N, S, C]`` in memory. Both
are three sizes and, for each array, three steps, so that a kernel needs no more than a `View`.
Axes other than the channel may be taken in any order, because batch normalization treats them
alike; all the arrays of one call are taken in the same order.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

# Channels; rows shorter than this do not pay for a loop each. Without a gap many of them are taken
# as one, where that is known how; else they run as planes whose places are gathered into tiles.
NARROW_ROW = 16

Steps = tuple[int, ...]


class View(NamedTuple):
    """Element (n, c, s) lies ``n * dn + c * dc + s * ds`` elements behind the array's first.

    A mask of bits is a view too: its array is bytes, its steps count bits.
    """

    array: Any
    dn: int
    dc: int
    ds: int


class Layout(NamedTuple):
    """How the arrays of one call are seen: planes or rows, sizes, and a view of each."""

    kind: str  # "planes" or "rows"
    shape: tuple[int, int, int]  # N, C, S
    adjoining: bool  # whether in every map planes, or rows, lie in order and without a gap
    dtype: Any
    views: tuple[View | None, ...]  # outputs, inputs, and the mask
    copies: tuple[tuple[Any, Any], ...]  # (an output, the contiguous stand-in to copy back)
    plan: "Plan"

    def finish(self, backend: Any) -> None:
        """Put into place the outputs that could not be viewed."""
        for array, stand_in in self.copies:
            backend.copy(array, stand_in)


_view = partial(tuple.__new__, View)
_layout = partial(tuple.__new__, Layout)


class Plan:
    """What a layout is but for its arrays: one object wherever that is the same, to serve as a key.

    Attributes
    ----------
    kind, shape, adjoining
        As of `Layout`.
    steps : tuple of tuples
        dn, dc, ds of each array that is there, outputs first; last those of a mask.
    """

    __slots__ = ("adjoining", "kind", "shape", "steps")

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int, int],
        adjoining: bool,
        steps: tuple[tuple[int, int, int], ...],
    ) -> None:
        self.kind = kind
        self.shape = shape
        self.adjoining = adjoining
        self.steps = steps


@lru_cache(maxsize=256)
def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> Steps:
    """Give the strides of a C-contiguous array."""
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def see(
    shape: Any, axis: int, steps: Any, folding: bool
) -> tuple[bool, bool, int, int, int, bool, Any]:
    """Find the view of arrays of one shape; numba compiles this, too.

    Axes other than the channel are put together where every array crosses them with one step. The
    first array's steps say which is outermost; those that it broadcasts come first.

    Parameters
    ----------
    shape : tuple
        Sizes of the axes.
    axis : int
        The channel's, not negative.
    steps : ndarray of int64, [arrays, axes]
        Elements from one index to the next.
    folding : bool
        Whether rows of few channels are rows, too, where they lie without a gap in every array.

    Returns
    -------
    tuple
        Whether there is a view; whether it is rows; N, C, S; whether in every array planes, or
        rows, lie in order and without a gap; and dn, dc, ds of each array, [arrays, 3].
    """
    lead = steps[0]
    order = np.empty(len(shape), np.int64)
    count = 0
    for i in range(len(shape)):
        if i != axis and shape[i] != 1:
            k = count
            while k and lead[order[k - 1]] and not 0 < abs(lead[i]) <= abs(lead[order[k - 1]]):
                order[k] = order[k - 1]
                k -= 1
            order[k] = i
            count += 1

    fits = True
    outer, inner, N, S = -1, -1, 1, 1  # the last axis of each group, and their sizes
    for k in range(count):
        i = order[k]
        joined = inner >= 0
        for a in range(len(steps)):
            joined = joined and steps[a, inner] == shape[i] * steps[a, i]
        if joined:
            S *= shape[i]
        else:
            fits = fits and outer < 0
            outer, N, S = inner, S, shape[i]
        inner = i

    C = shape[axis]
    rows = inner < 0 or (C >= NARROW_ROW and abs(lead[inner]) >= abs(lead[axis]))
    if folding and not rows and outer < 0 and 1 < C < NARROW_ROW:
        rows = True
        for a in range(len(steps)):
            rows = rows and steps[a, axis] == 1 and steps[a, inner] == C
    # More than one n of rows would have been joined with the rest, were there no gap.
    adjoining = N == 1 or not rows
    each = np.zeros((len(steps), 3), np.int64)
    for a in range(len(steps)):
        if outer >= 0:
            each[a, 0] = steps[a, outer]
        if inner >= 0:
            each[a, 2] = steps[a, inner]
        each[a, 1] = steps[a, axis]
        dc, ds = (1, C) if rows else (S, 1)
        adjoining = adjoining and each[a, 1] == dc and each[a, 2] == ds
    return fits, rows, N, C, S, adjoining, each


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    axis: int,
    itemsize: int,
    strides: tuple[Steps, ...],
    masked: bool,
    folding: bool,
) -> Plan | None:
    """Sizes and steps for all arrays; None if no view fits them all."""
    if any(stride % itemsize for each in strides for stride in each):
        return None
    steps = [[stride // itemsize for stride in each] for each in strides]
    if masked:
        steps.append([*contiguous_strides(shape, 1)])
    fits, rows, N, C, S, adjoining, each = see(shape, axis, np.array(steps, np.int64), folding)
    if not fits:
        return None
    views = tuple((dn, dc, ds) for dn, dc, ds in each.tolist())
    return Plan("rows" if rows else "planes", (N, C, S), bool(adjoining), views)


def arrange(
    backend: Any,
    axis: int,
    inputs: Sequence[Any],
    outputs: Sequence[Any] = (),
    *,
    mask: Any = None,
) -> Layout:
    """View the arrays of one call, all of one shape and dtype, as planes or as rows.

    Parameters
    ----------
    backend : module
        What allocates and copies where the arrays are, and says whether it folds rows.
    axis : int
        The channel's, not negative.
    inputs, outputs : sequence of arrays or None
        Views come back in this order, outputs first and the mask last; None stays None.
    mask : array of uint8, optional
        One bit per element in C order, packed.

    Returns
    -------
    Layout
        Where the arrays have no view in common, contiguous copies stand in for them;
        `Layout.finish` writes back those of outputs.
    """
    # Outputs first: they are never broadcast, so their steps tell how memory is laid out.
    arrays = (*outputs, *inputs)
    given, strides, aligned = [], [], True
    for a in arrays:
        if a is not None:
            given.append(a)
            strides.append(a.strides)
            aligned = aligned and a.flags.aligned
    first = given[0]
    shape, itemsize, masked = first.shape, first.itemsize, mask is not None
    copies: tuple[tuple[Any, Any], ...] = ()
    folding = backend.FOLDS_ROWS
    plan = _plan(shape, axis, itemsize, tuple(strides), masked, folding) if aligned else None
    if plan is None:
        arrays = (
            *(None if a is None else backend.empty(a.shape, a.dtype, a) for a in outputs),
            *(None if a is None else backend.contiguous(a) for a in inputs),
        )
        copies = tuple(
            (output, stand_in)
            for output, stand_in in zip(outputs, arrays, strict=False)
            if output is not None
        )
        dense = (contiguous_strides(shape, itemsize),) * len(given)
        plan = _plan(shape, axis, itemsize, dense, masked, folding)
        if plan is None:
            raise AssertionError("a contiguous array is always viewable")

    steps = iter(plan.steps)
    # Past the constructors of named tuples, which take longer than a small kernel.
    views = tuple([a if a is None else _view((a, *next(steps))) for a in (*arrays, mask)])
    return _layout((plan.kind, plan.shape, plan.adjoining, first.dtype, views, copies, plan))
