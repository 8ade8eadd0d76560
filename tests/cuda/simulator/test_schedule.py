"""Every number belongs to one piece, one thread and one turn of it."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numbabn.cuda import planes, rows, schedule, short, simulation, simulator, sweep
from numbabn.cuda.formats import CREWS, FORMATS, LANES, THREADS, WARP

pytestmark = pytest.mark.real_blocks
as_on_a_gpu = pytest.mark.skipif(
    os.environ.get("NUMBABN_TEST_BLOCKS") != "real", reason="of sizes as on a GPU"
)


def takes(view, shape, width):
    """Whatever threads take, as (n, c, s) of each access."""
    x = simulator.Flat(FORMATS["float64"], width)
    simulator._here.threads = THREADS
    for group in range(shape.groups):
        for index in range(shape.pieces):
            for simulator._here.t in range(THREADS):
                if view == "planes":
                    piece = planes._piece(x, shape, planes._channel(shape, group), index)
                else:
                    piece = (rows if view == "rows" else short)._piece(x, shape, group, index)
                place = sweep.Place(0, 0)
                for _ in range(-(-shape.rounds // 4) * 4):
                    if sweep.inside(piece, place):
                        yield piece.n + place.plane, piece.c, piece.s + place.along
                    place = sweep._next(piece, place)


@settings(
    max_examples=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors],
)  # fmt: skip
@given(
    st.sampled_from(["planes", "rows"]), st.integers(1, 12), st.integers(1, 5),
    st.integers(1, 900), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]),
)  # fmt: skip
def test_all_numbers_are_taken_once(view, N, C, S, width, arrays):
    if view == "rows":
        C *= 7 * width
    else:
        S *= width
    shape = schedule.shape_of(view, (N, C, S), width, 8, arrays)
    across, along = (S, C) if view == "planes" else (C, S)
    taken = sorted(takes(view, shape, width))
    size = planes._size if view == "planes" else rows._size
    assert len(taken) == len(set(taken)) == N * across * along // width
    assert all(0 <= n < N and 0 <= c < C and 0 <= s < S for n, c, s in taken)
    total = sum(size(shape, index) for index in range(shape.pieces))
    assert total == N * S
    assert shape.below << shape.across == 1 << shape.crew
    assert 1 << shape.crew in (WARP, THREADS)
    assert shape.pieces == 1 or 1 << shape.crew == THREADS
    assert shape.rounds <= schedule.DEPTH // arrays
    assert view == "planes" or width << shape.across <= min(THREADS, WARP * LANES)
    assert view == "rows" or THREADS >> shape.crew <= CREWS
    # All pieces of a channel are put together by threads of one block, each channel by one block.
    assert THREADS >> shape.beside >= min(shape.pieces, THREADS)
    assert view == "planes" or shape.share * shape.pieces >= width << shape.across


@pytest.mark.parametrize("arrays", [1, 2])
@pytest.mark.parametrize("places", [3 * 3, 5 * 5, 7 * 7, 14 * 14])
@pytest.mark.parametrize("lanes", [2, 4, 8])
@pytest.mark.parametrize("N", [1, 7, 300])
def test_all_numbers_of_bundles_are_taken_once(N, lanes, places, arrays):
    channels = schedule.bundle(places, lanes)
    sizes = N, 2 * channels, places
    fits = schedule.is_short(sizes, lanes)
    assert fits == (channels > 1 and channels * places <= THREADS * lanes)
    if not fits:
        return
    shape = schedule.shape_of("short", sizes, lanes, 8, arrays)
    taken = sorted(takes("short", shape, lanes))
    assert len(taken) == len(set(taken)) == N * 2 * channels * places // lanes
    assert all(c % lanes == 0 and 0 <= c < 2 * channels * places for _, c, _ in taken)
    assert sum(short._size(shape, index) for index in range(shape.pieces)) == N * places
    assert shape.groups == 2
    assert shape.rounds <= schedule.DEPTH // arrays


@pytest.mark.parametrize("view", ["planes", "rows"])
def test_sizes_beyond_32_bits(view):
    shape = schedule.shape_of(view, (3, 5, 2**33), 1, 4, 1)
    assert shape.pieces * shape.planes * shape.places >= 3 * 2**33


def test_pieces_are_alike():
    """So that blocks that wait for one another do not wait for the largest."""
    shape = schedule.shape_of("planes", (256, 64, 196), 4, 4, 1)
    assert shape.pieces * shape.planes - 256 < shape.pieces * shape.below
    shape = schedule.shape_of("planes", (4, 128, 1 << 20), 8, 2, 1)
    assert shape.per_plane * shape.places - (1 << 20) < shape.per_plane * (8 << shape.across)


@as_on_a_gpu
def test_what_is_held_of_resnet():
    """As `docs/cuda.md` has it: on an H200 all of ResNet-50 but the largest channels-last."""
    assert schedule.is_held(
        schedule.shape_of("planes", (256, 64, 112 * 112), 4, 4, 1), simulation.RUNNING
    )
    assert schedule.is_held(
        schedule.shape_of("planes", (4, 128, 1 << 20), 8, 2, 1), simulation.RUNNING
    )
    assert schedule.is_held(
        schedule.shape_of("rows", (1, 512, 256 * 784), 4, 4, 1), simulation.RUNNING
    )
    assert not schedule.is_held(
        schedule.shape_of("rows", (1, 256, 256 * 3136), 8, 2, 1), simulation.RUNNING
    )


@as_on_a_gpu
def test_narrow_groups_where_wide_ones_cannot_be_held():
    def width(rows):
        """Bytes of threads side by side, and how many pieces there are."""
        shape = schedule.shape_of("rows", (1, 1024, rows), 8, 2, 1)
        return 8 * 2 << shape.across, shape.pieces

    assert width(50_000) == (512, 261)
    assert width(100_000) == (256, 261)
    assert width(400_000) == (64, 261)
    assert width(500_000)[0] == 512  # not held at all
    assert width(300)[0] == schedule.NARROWEST  # as many blocks as there are tasks for


@as_on_a_gpu
def test_a_warp_for_a_short_channel():
    assert 1 << schedule.shape_of("planes", (8, 512, 49), 1, 2, 1).crew == THREADS
    assert 1 << schedule.shape_of("planes", (2, 512, 49), 1, 2, 1).crew == WARP


@as_on_a_gpu
def test_small_inputs_have_small_pieces():
    """Else some multiprocessors had none."""
    small = schedule.shape_of("planes", (8, 3, 1 << 16), 4, 4, 1)
    large = schedule.shape_of("planes", (8, 300, 1 << 16), 4, 4, 1)
    assert small.groups * small.pieces > schedule.BLOCKS // 2
    assert small.rounds < large.rounds
    assert large.groups * large.pieces > schedule.BLOCKS
    assert schedule.slots_of(small, "planes", 1) < schedule.slots_of(large, "planes", 1)


@as_on_a_gpu
def test_slots_fit_into_shared_memory():
    """Two blocks of a multiprocessor of 228 KB, each with its own sums beside, and a reserve."""
    for view, sizes in (("planes", (256, 64, 12544)), ("rows", (1, 512, 100_000))):
        for width, itemsize in ((8, 2), (4, 4), (2, 8)):
            for arrays in (1, 2):
                shape = schedule.shape_of(view, sizes, width, itemsize, arrays)
                held = schedule.slots_of(shape, view, arrays) * THREADS * width * itemsize
                own = 8 * THREADS * (LANES if view == "rows" else 2)
                assert 2 * (held + own + 1024) <= 228 << 10


def test_what_lasts_in_a_cache():
    assert schedule.first_lasting(100, 1 << 30, 1 << 28) == 88
    assert schedule.first_lasting(100, 1 << 20, 1 << 28) == 0
