"""Views: the right elements in the right order, and no copy where a view exists."""

import cases
import numpy as np
import pytest

from numbabn import cpu
from numbabn.layout import arrange


def strided(layout, view):
    """See an array as a kernel does: [N, C, S]."""
    steps = (step * view.array.itemsize for step in (view.dn, view.dc, view.ds))
    return np.lib.stride_tricks.as_strided(view.array, layout.shape, tuple(steps))


def elements(layout, view):
    """Read a view into [C, N * S]."""
    return strided(layout, view).transpose(1, 0, 2).reshape(layout.shape[1], -1)


@cases.shapes
def test_contiguous_arrays_are_viewed_whole(shape, axis):
    x = np.arange(np.prod(shape)).reshape(shape)
    layout = arrange(cpu, axis % x.ndim, (x,))
    assert layout.views[0].array is x
    expected = np.moveaxis(x, axis, 0).reshape(shape[axis], -1)
    np.testing.assert_array_equal(elements(layout, layout.views[0]), expected)


@pytest.mark.parametrize("axis", range(4))
@cases.memory
def test_all_arrays_are_taken_in_the_same_order(lay, axis):
    x = np.arange(9.0 * 4 * 5 * 6).reshape(9, 4, 5, 6)
    laid, other, y = lay(x), np.asfortranarray(-x), np.zeros_like(x)
    mask = np.zeros(-(-x.size // 8), np.uint8)
    layout = arrange(cpu, axis, (laid, other, None), (y, None), mask=mask)
    y_view, no_output, x_view, other_view, no_input, bits_view = layout.views
    assert no_output is None
    assert no_input is None
    values = elements(layout, x_view)
    np.testing.assert_array_equal(elements(layout, other_view), -values)
    np.testing.assert_array_equal(
        np.sort(values), np.sort(np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1))
    )
    bits = elements(layout, bits_view._replace(array=np.arange(x.size)))
    np.testing.assert_array_equal(bits, values)

    strided(layout, y_view)[...] = strided(layout, x_view)
    layout.finish(cpu)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(
    ("shape", "axis", "order", "kind"),
    [
        ((8, 16, 600), 1, (0, 1, 2), "planes"),
        ((8, 16, 60), 1, (0, 1, 2), "planes"),
        ((1, 16, 60), 1, (0, 1, 2), "planes"),
        ((8, 16), 1, (0, 1), "rows"),
        ((8, 16), 1, (1, 0), "planes"),  # sixteen planes of eight, side by side
        ((800, 16), 1, (1, 0), "planes"),
        ((8, 60, 16), 2, (0, 1, 2), "rows"),
        ((8, 600, 16), 2, (0, 2, 1), "planes"),
        ((8, 60, 15), 2, (0, 1, 2), "rows"),
        ((8, 60, 15), 2, (1, 0, 2), "rows"),
        ((8, 15), 1, (0, 1), "rows"),
        ((8, 15), 1, (1, 0), "planes"),
        ((8, 1, 60), 1, (0, 1, 2), "planes"),
        ((8, 16, 1), 1, (0, 1, 2), "rows"),
        ((1, 16, 1), 1, (0, 1, 2), "rows"),
    ],
)
def test_kind_follows_memory(shape, axis, order, kind):
    x = cases._memory_order(np.zeros(shape), order)
    layout = arrange(cpu, axis, (x,), (np.empty_like(x),))
    assert layout.kind == kind
    assert not layout.copies


def test_narrow_rows_are_rows_where_they_adjoin_and_are_folded():
    x, y = np.zeros((8, 60, 15)), np.zeros((8, 60, 15))
    assert arrange(cpu, 2, (x,), (y,)).kind == "rows"
    assert arrange(cpu, 2, (x,), (np.zeros((8, 60, 16))[:, :, :15],)).kind == "planes"
    assert arrange(cpu, 2, (x[:, ::2],), (y[:, ::2],)).kind == "planes"
    assert arrange(cpu, 2, (x, x[:1].repeat(8, 0)), (y,)).kind == "rows"
    assert arrange(cpu, 2, (x, np.broadcast_to(x[:1], x.shape)), (y,)).kind == "planes"


def test_narrow_rows_are_planes_where_they_are_not_folded(monkeypatch):
    monkeypatch.setattr(cpu, "FOLDS_ROWS", False)
    assert arrange(cpu, 1, (np.zeros((60, 15)),)).kind == "planes"


def test_one_channel_is_one_long_plane():
    layout = arrange(cpu, 1, (np.zeros((5, 1, 8, 9)),))
    assert (layout.kind, layout.shape) == ("planes", (1, 1, 360))


@pytest.mark.parametrize(
    ("x", "axis", "adjoining"),
    [
        (np.zeros((8, 16, 60)), 1, True),
        (np.zeros((8, 16, 60))[::2], 1, True),  # the planes of one n still do
        (np.zeros((8, 16, 60))[:, ::2], 1, False),
        (np.zeros((8, 16, 60))[:, :, ::2], 1, False),
        (np.zeros((8, 60, 16)), 2, True),
        (np.zeros((8, 60, 32))[:, :, :16], 2, False),
        (np.zeros((8, 60, 16))[::2], 2, False),
        (np.zeros((60, 16)), 1, True),
        (np.zeros((60, 16))[::2], 1, False),
        (np.broadcast_to(np.zeros((60, 16)), (8, 60, 16)), 2, False),
    ],
)
def test_adjoining_planes_and_rows_lie_without_a_gap(x, axis, adjoining):
    assert arrange(cpu, axis, (x,), (np.empty(x.shape),)).adjoining is adjoining
