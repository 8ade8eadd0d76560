"""The simulator tells what would go wrong on a GPU, and the tests tell broken kernels."""

import cases
import numpy as np
import pytest
from problem import SIMULATED as ON
from problem import Problem, check_constant, check_training

import numbabn
from numbabn.backends import borrow
from numbabn.cuda import planes, rows, short, simulation, sweep, vector, workspace
from numbabn.cuda import simulator as gpu
from numbabn.cuda.formats import CONSTANTS, CREWS, FORMATS, THREADS, WARP


def run(kernel, *arguments, blocks=1, **options):
    gpu.run(kernel, blocks, THREADS, arguments, **options)


def as_lanes(array, width):
    return gpu.Flat(FORMATS[array.dtype.name], width, array)


def seen(array):
    (view,) = borrow(None, x=ON.put(array))
    return view


def aligned(count, dtype=np.float32):
    memory = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :].view(dtype)[:count]


class TestThreads:
    def test_every_thread_of_every_block_runs(self):
        seen = []
        run(lambda: seen.append((gpu.block(), gpu.thread())), blocks=3)
        assert seen == [(b, t) for b in range(3) for t in range(THREADS)]

    def test_a_barrier_lets_others_come(self):
        def kernel(out):
            memory = gpu.shared_sums()
            if gpu.thread() == THREADS - 1:
                gpu.write(memory, 0, 7.0)
            gpu.barrier()
            out.append(gpu.read(memory, 0))

        out = []
        run(kernel, out)
        assert out == [7.0] * THREADS

    def test_neighbours_are_of_the_warp(self):
        out = []
        run(lambda: out.append(gpu.from_neighbour(gpu.thread(), WARP // 2)))
        assert out == [t ^ WARP // 2 for t in range(THREADS)]

    def test_shared_memory_is_fresh_for_every_block(self):
        def kernel(out):
            memory = gpu.shared_sums()
            out.append(gpu.read(memory, 0))
            gpu.barrier()
            if gpu.thread() == 0:
                gpu.write(memory, 0, 1.0)

        out = []
        run(kernel, out, blocks=2)
        assert np.isnan(out).all()

    @pytest.mark.parametrize("other", [lambda: None, gpu.block])
    def test_a_barrier_that_not_all_threads_reach(self, other):
        def kernel():
            if gpu.thread() < 3:
                gpu.barrier()
            else:
                other()

        with pytest.raises(RuntimeError, match=r"wait for \['a barrier', 'the end'\]"):
            run(kernel)

    def test_an_exchange_while_others_wait_at_a_barrier(self):
        def kernel():
            if gpu.thread() % 2:
                gpu.barrier()
            else:
                gpu.from_neighbour(0.0, 1)

        with pytest.raises(RuntimeError, match=r"wait for \['a barrier', 'an exchange'\]"):
            run(kernel)

    def test_an_error_ends_the_grid(self):
        def kernel():
            gpu.barrier()
            if gpu.thread() == 5:
                raise ZeroDivisionError
            gpu.barrier()

        with pytest.raises(ZeroDivisionError):
            run(kernel)
        run(gpu.barrier)


class TestSharedMemory:
    @pytest.mark.parametrize("writer", [0, THREADS - 1])
    @pytest.mark.parametrize("first", ["read", "write"])
    def test_a_race(self, writer, first):
        def kernel():
            memory = gpu.shared_sums()
            if gpu.thread() != writer or first == "read":
                gpu.read(memory, 3)
            if gpu.thread() == writer:
                gpu.write(memory, 3, 1.0)

        with pytest.raises(RuntimeError, match=r"number 3 of shared memory.*no barrier in between"):
            run(kernel)

    def test_an_exchange_within_warps_is_no_barrier(self):
        def kernel():
            memory = gpu.shared_sums()
            if gpu.thread() == 0:
                gpu.write(memory, 0, 1.0)
            gpu.from_neighbour(0.0, 1)
            gpu.read(memory, 0)

        with pytest.raises(RuntimeError, match="no barrier in between"):
            run(kernel)

    def test_two_that_write(self):
        with pytest.raises(RuntimeError, match="thread 1 uses number 0"):
            run(lambda: gpu.write(gpu.shared_sums(), 0, 1.0))

    @pytest.mark.parametrize("index", [-1, CREWS * CONSTANTS])
    def test_beside_it(self, index):
        with pytest.raises(IndexError, match=f"number {index} of shared memory"):
            run(lambda: gpu.read(gpu.shared_constants(), index))
        with pytest.raises(IndexError, match=f"number {index} of shared memory"):
            run(lambda: gpu.write(gpu.shared_constants(), index, 0.0))


class TestSlots:
    def test_each_thread_has_its_own(self):
        x = as_lanes(np.arange(THREADS, dtype=np.float32), 1)

        def kernel(out):
            memory = gpu.slots()
            gpu.keep(memory, 1, gpu.load(x, gpu.thread(), None))
            gpu.barrier()
            out += gpu.unpack(gpu.kept(memory, 1, x)).tolist()

        out = []
        run(kernel, out, slots=2)
        assert out == list(range(THREADS))

    @pytest.mark.parametrize("index", [-1, 2])
    def test_beside_them(self, index):
        x = as_lanes(aligned(8), 4)
        with pytest.raises(IndexError, match=f"slot {index}, of 2"):
            run(lambda: gpu.keep(gpu.slots(), index, gpu.nothing(x)), slots=2)

    def test_what_another_block_has_kept(self):
        def kernel():
            if gpu.block() == 0:
                gpu.keep(gpu.slots(), 0, gpu.nothing(as_lanes(aligned(8), 4)))
            gpu.kept(gpu.slots(), 0, None)

        with pytest.raises(KeyError):
            run(kernel, blocks=2, slots=1)

    def test_none_keep_nothing(self):
        def kernel(out):
            memory = gpu.no_slots()
            gpu.keep(memory, 0, gpu.nothing(as_lanes(aligned(8), 4)))
            out.append((gpu.holds(memory), dict(gpu._here.held)))

        out = []
        run(kernel, out, slots=1)
        assert out == [(False, {})] * THREADS


class TestBlocksThatWait:
    @staticmethod
    def kernel(counters, out, comes):
        if gpu.block() in comes:
            vector.wait_for_all(counters, 1, 3)
        out.append(gpu.block())

    @pytest.mark.parametrize("order", [range, lambda blocks: reversed(range(blocks))])
    def test_all_of_them_come(self, monkeypatch, order):
        monkeypatch.setattr(gpu, "order", order)
        counters, out = np.zeros(2, np.int32), []
        run(self.kernel, counters, out, {0, 2, 3}, blocks=5, together=True)
        assert sorted(out) == [b for b in range(5) for _ in range(THREADS)]
        assert not counters.any()

    def test_one_that_never_comes(self):
        with pytest.raises(RuntimeError, match="2 blocks wait for others that never come"):
            run(self.kernel, np.zeros(2, np.int32), [], {0, 2}, blocks=4, together=True)

    def test_those_that_need_not_be_running(self):
        with pytest.raises(RuntimeError, match="a block waits for others, which need not be run"):
            run(self.kernel, np.zeros(2, np.int32), [], {0, 1, 2}, blocks=3)

    def test_more_than_can_run_at_once(self):
        with pytest.raises(RuntimeError, match=f"{simulation.RUNNING + 1} blocks launched togeth"):
            simulation.launch(
                None, "forward", "rows", "float32", 4, simulation.RUNNING + 1, together=True
            )


class TestMemory:
    @pytest.mark.parametrize("index", [-4, 8, 6])
    def test_beside_an_array(self, index):
        x = as_lanes(aligned(8), 4)
        with pytest.raises(IndexError, match=f"4 numbers from {index} on, of 8"):
            gpu.load(x, index, None)
        with pytest.raises(IndexError, match=f"4 numbers from {index} on, of 8"):
            gpu.store(x, index, np.zeros(4), None)

    def test_off_its_alignment(self):
        x = aligned(9)
        for array, index in ((x, 2), (x[1:], 0)):
            with pytest.raises(IndexError, match="16 bytes at an address that is no multiple"):
                gpu.load(as_lanes(array, 4), index, None)
        gpu.load(as_lanes(x[1:], 4), 3, None)
        gpu.load(as_lanes(x, 2), 2, None)

    def test_from_another_element_on(self):
        x = aligned(9)
        x[:] = range(9)
        backwards = gpu.flat("float32", 1, x[5:].ctypes.data, -5, 3)
        assert [gpu.get(backwards, i) for i in (-5, 0, 3)] == [0, 5, 8]
        with pytest.raises(IndexError):
            gpu.get(backwards, 4)

    def test_words_of_a_mask(self):
        mask = aligned(9, np.uint8)
        gpu.put_word(mask, 32, 0x80000001)
        assert mask.tolist() == [0, 0, 0, 0, 1, 0, 0, 0x80, 0]
        gpu.or_bits(mask, 70, 0b11)
        assert mask[8] == 0b11000000
        assert gpu.get_bits(mask, 70) == 0b11
        for wrong in (mask[1:], mask):
            with pytest.raises(IndexError, match="a word from bit"):
                gpu.put_word(wrong, 32 if wrong is not mask else 8, 0)
        with pytest.raises(IndexError, match="a word from bit 64 on, of 72"):
            gpu.put_word(mask, 64, 0)
        with pytest.raises(IndexError, match="beyond the end of a word"):
            gpu.or_bits(mask, 30, 0b111)
        for bit in (-1, 72):
            with pytest.raises(IndexError, match=f"bit {bit}"):
                gpu.get_bits(mask, bit)
            with pytest.raises(IndexError, match=f"from bit {bit} on, of 72"):
                gpu.or_bits(mask, bit, 1)

    def test_arrivals(self):
        counters = np.zeros(2, np.int32)
        assert [gpu.arrive(counters, 1, 2) for _ in range(4)] == [0, 1, 2, 0]
        assert counters.tolist() == [0, 1]

    def test_a_call_finds_nothing_of_an_earlier_one(self):
        like = seen(cases.normal((131, 19)))
        kept = workspace.workspace_of(like.place.device, like.place.stream)
        numbabn.batch_norm(like.owner, training=True)
        assert np.isfinite(kept.buffers.partials.owner.copy_to_host()).any()
        memory = simulation.memory_of(*kept.buffers)
        assert np.isnan(memory.partials.memory).all()
        memory.counters[0] = 1
        with pytest.raises(AssertionError):
            simulation.memory_of(*kept.buffers)


def nothing(*_):
    pass


def swapped_size(size):
    """Take the last piece for as large as the first, as where counts go by in merging."""
    return lambda shape, index: size(shape, 0)


# What is broken: where, how, a shape that shows it, and what is told.
BROKEN = {
    "no barrier in a block's sum": (vector, "barrier", nothing, (2, 3, 24, 25), RuntimeError),
    "no barrier around planes' constants": (planes, "barrier", nothing, (9, 5, 13), RuntimeError),
    "no barrier around rows' constants": (rows, "barrier", nothing, (131, 24), RuntimeError),
    "no barrier around short planes' constants": (
        short, "barrier", nothing, (13, 16, 7, 7), RuntimeError,
    ),
    "short planes' pieces count alike": (
        short, "_size", swapped_size(short._size), (13, 16, 7, 7), AssertionError,
    ),
    "blocks of short planes do not wait": (
        vector, "awaited", lambda counters, index: False, (13, 16, 7, 7), AssertionError,
    ),
    "planes' pieces count alike": (
        planes, "_size", swapped_size(planes._size), (11, 3, 7, 7), AssertionError,
    ),
    "rows' pieces count alike": (
        rows, "_size", swapped_size(rows._size), (131, 24), AssertionError,
    ),
    "blocks of planes do not wait": (
        vector, "awaited", lambda counters, index: False, (4, 3, 24, 25), AssertionError,
    ),
    "blocks of rows do not wait": (
        vector, "awaited", lambda counters, index: False, (131, 24), AssertionError,
    ),
    "one slot for all": (
        sweep, "keep", lambda slots, index, packed: gpu.keep(slots, 0, packed), (131, 24), KeyError,
    ),
    "a plane more": (
        sweep, "inside", lambda piece, place: piece.places > 0, (9, 5, 13), IndexError,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name", "broken", "shape", "error"), BROKEN.values(), ids=BROKEN
)
def test_a_broken_kernel_is_told(monkeypatch, module, name, broken, shape, error):
    monkeypatch.setattr(module, name, broken)
    options = {"with_residual": True, "activation": "relu", "on": ON}
    with pytest.raises(error):
        check_training(Problem(shape, 1, np.float32, 2**-23, **options))


def test_numbers_that_overflow_as_they_are_grown(monkeypatch):
    for module in (planes, rows, short):
        monkeypatch.setattr(module, "counts", lambda attempt, m2: True)
    for shape in ((3, 4, 7), (3, 3, 7), (9, 40)):
        with pytest.raises(AssertionError):
            check_constant(shape, 1, np.float32, 1e30, ON)
