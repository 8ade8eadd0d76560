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

# Channels; rows shorter than this do not pay for a loop each, and run as planes whose places are
# gathered into tiles: 6 times as fast or more at 3 channels, on a busy machine.
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
def _plan(
    shape: tuple[int, ...], axis: int, itemsize: int, strides: tuple[Steps, ...], masked: bool
) -> Plan | None:
    """Sizes and steps for all arrays; None if no view fits them all."""
    if any(stride % itemsize for each in strides for stride in each):
        return None
    steps = tuple(tuple(stride // itemsize for stride in each) for each in strides)
    if masked:
        steps = (*steps, contiguous_strides(shape, 1))
    groups = _groups(shape, axis, steps)
    if len(groups) > 2:
        return None
    outer, inner = ([], [], *groups)[-2:]
    kind = "rows"
    if inner and (shape[axis] < NARROW_ROW or abs(steps[0][inner[-1]]) < abs(steps[0][axis])):
        kind = "planes"
    N = math.prod(shape[i] for i in outer)
    S = math.prod(shape[i] for i in inner)
    C = shape[axis]
    each = tuple(
        (s[outer[-1]] if outer else 0, s[axis], s[inner[-1]] if inner else 0) for s in steps
    )
    if kind == "planes":
        adjoining = all((dc, ds) == (S, 1) for _, dc, ds in each)
    else:
        # More than one n would have been joined with the rest, were there no gap.
        adjoining = N == 1 and all((dc, ds) == (1, C) for _, dc, ds in each)
    return Plan(kind, (N, C, S), adjoining, each)


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
        What allocates and copies where the arrays are.
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
    plan = _plan(shape, axis, itemsize, tuple(strides), masked) if aligned else None
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
        plan = _plan(
            shape, axis, itemsize, (contiguous_strides(shape, itemsize),) * len(given), masked
        )
        if plan is None:
            raise AssertionError("a contiguous array is always viewable")

    steps = iter(plan.steps)
    # Past the constructors of named tuples, which take longer than a small kernel.
    views = tuple([a if a is None else _view((a, *next(steps))) for a in (*arrays, mask)])
    return _layout((plan.kind, plan.shape, plan.adjoining, first.dtype, views, copies, plan))
