"""Every number belongs to one piece, one thread and one turn of it."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numbabn.cuda import planes, rows, schedule, simulator, sweep
from numbabn.cuda.formats import FORMATS, LANES, THREADS, WARP

pytestmark = pytest.mark.real_blocks


def takes(view, shape, width):
    """Whatever threads take, as (n, c, s) of each access."""
    x = simulator.Flat(FORMATS["float64"], width)
    module = planes if view == "planes" else rows
    for group in range(shape.groups):
        for index in range(shape.pieces):
            for simulator._here.t in range(THREADS):
                piece = module._piece(x, shape, group, index)
                place = sweep.Place(piece.n, piece.s)
                for _ in range(-(-shape.rounds // 4) * 4):
                    if sweep.inside(piece, place):
                        yield place.n, piece.c, place.s
                    place = sweep._next(piece, place)


@settings(
    max_examples=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors],
)  # fmt: skip
@given(
    st.sampled_from(["planes", "rows"]), st.integers(1, 12), st.integers(1, 5),
    st.integers(1, 900), st.sampled_from([1, 2, 4, 8]),
)  # fmt: skip
def test_all_numbers_are_taken_once(view, N, C, S, width):
    if view == "rows":
        C *= 7 * width
    else:
        S *= width
    shape = schedule.shape_of(view, (N, C, S), width)
    across, along = (S, C) if view == "planes" else (C, S)
    taken = sorted(takes(view, shape, width))
    size = planes._size if view == "planes" else rows._size
    assert len(taken) == len(set(taken)) == N * across * along // width
    assert all(0 <= n < N and 0 <= c < C and 0 <= s < S for n, c, s in taken)
    total = sum(size(shape, index) for index in range(shape.pieces))
    assert total == N * S
    assert shape.below << shape.across == THREADS
    assert shape.rounds <= schedule.DEPTH
    assert view == "planes" or width << shape.across <= min(THREADS, WARP * LANES)


def test_neighbours_are_on_one_plane():
    """Else they could not put their bits together."""
    width = 4
    x = simulator.Flat(FORMATS["float32"], width)
    shape = schedule.shape_of("planes", (5, 1, (THREADS + THREADS // 3) * width), width)
    assert shape.planes > 1
    places = []
    for simulator._here.t in range(THREADS):
        piece = planes._piece(x, shape, 0, 0)
        places.append([sweep.Place(piece.n, piece.s)])
        for _ in range(shape.rounds - 1):
            places[-1].append(sweep._next(piece, places[-1][-1]))
    for turn in zip(*places, strict=True):
        assert len({place.n for place in turn}) == 1


def test_a_whole_channel_in_one_piece():
    assert schedule.is_whole(schedule.shape_of("planes", (2, 3, 4), 4))
    assert not schedule.is_whole(schedule.shape_of("planes", (1000, 3, 4000), 4))


@pytest.mark.parametrize("view", ["planes", "rows"])
def test_sizes_beyond_32_bits(view):
    shape = schedule.shape_of(view, (3, 5, 2**33), 1)
    assert shape.pieces * shape.planes * shape.places >= 3 * 2**33
