"""Memory that blocks share lives as long as what uses it: a stream's calls, or a CUDA graph."""

import gc
import os
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("numba simulates a GPU", allow_module_level=True)
pytest.importorskip("cuda.core", reason="numba-cuda is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numbabn.cuda import workspace
from numbabn.cuda.workspace import Workspace
from numbabn.libraries import DeviceArray, Place, form_of

STREAM = 7


class Memory(np.ndarray):
    """Of NumPy, but there may be weak references to it."""


class Library:
    """Allocates on the host."""

    name = "Host"

    def __init__(self, graphs_have_memory):
        self.graphs_have_memory = graphs_have_memory
        self.cleared = 0

    def empty(self, form, place):
        return np.ones(form.shape, form.dtype).view(Memory)

    def address(self, array):
        return array.ctypes.data

    def clear(self, array):
        self.cleared += 1
        array.owner.fill(0)


@pytest.fixture
def capturing(monkeypatch):
    streams = set()
    monkeypatch.setattr(workspace, "is_capturing", streams.__contains__)
    monkeypatch.setattr(workspace, "_captured", [])
    return streams


def beside(graphs_have_memory):
    place = Place(Library(graphs_have_memory), 0, STREAM, False)
    return DeviceArray(None, place, 0, form_of((1,), (8,), np.dtype(float)))


def sizes(pieces, channels):
    return SimpleNamespace(pieces=pieces, groups=channels, C=channels)


def alive(fitted):
    return [weakref.ref(each.owner) for each in fitted]


def test_a_stream_keeps_what_is_enough(capturing):
    kept, like = Workspace(), beside(False)
    first = kept.fit(sizes(4, 10), like)
    assert [each.size for each in first] == [120, 20, 20]
    assert not first.counters.owner.any()
    assert kept.fit(sizes(2, 5), like) is first
    second = kept.fit(sizes(100, 2), like)
    assert [each.size for each in second] == [600, 20, 20]
    assert kept.fit(sizes(4, 10), like) is second
    assert like.place.library.cleared == 2
    gone = alive(first)
    del first
    gc.collect()
    assert [each() for each in gone] == [None] * 3


def test_a_graph_with_memory_gets_its_own(capturing):
    """So it may be replayed on any stream, beside any other."""
    kept, like = Workspace(), beside(True)
    capturing.add(STREAM)
    first, second = (kept.fit(sizes(4, 10), like) for _ in range(2))
    assert kept.buffers is None
    assert like.place.library.cleared == 2  # by the graph, at each replay
    assert not {each.address for each in first} & {each.address for each in second}
    gone = alive(first)
    del first
    gc.collect()
    assert [each() for each in gone] == [None] * 3  # the graph's pool keeps it
    capturing.clear()
    assert kept.fit(sizes(4, 10), like) is kept.buffers


def test_a_graph_without_memory_uses_the_streams_and_keeps_it(capturing):
    kept, like = Workspace(), beside(False)
    fitted = kept.fit(sizes(4, 10), like)
    capturing.add(STREAM)
    for _ in range(2):
        assert kept.fit(sizes(4, 10), like) is fitted
    assert like.place.library.cleared == 1
    capturing.clear()
    held = alive(fitted)
    assert kept.fit(sizes(50, 10), like) is not fitted
    del fitted, kept
    gc.collect()
    assert all(each() is not None for each in held)


@pytest.mark.parametrize("before", [None, (4, 9), (3, 10)], ids=["none", "channels", "pieces"])
def test_nothing_is_allocated_for_a_graph_without_memory(capturing, before):
    kept, like = Workspace(), beside(False)
    if before is not None:
        kept.fit(sizes(*before), like)
    fitted = kept.buffers
    capturing.add(STREAM)
    with pytest.raises(RuntimeError, match=r"call once on this stream.*before capturing"):
        kept.fit(sizes(4, 10), like)
    assert kept.buffers is fitted
    capturing.clear()
    assert kept.fit(sizes(4, 10), like) is kept.buffers
