"""Same bits for any number of threads and any plan; memory; the cache."""

import os
from itertools import product

import numpy as np
import pytest
from programs import run

import numbabn
from numbabn import cpu, reference
from numbabn.cpu import compilation, planes, schedule, vector

BITS = """
    import hashlib, sys
    import numba, numpy as np
    import numbabn

    shapes = [
        ((4099, 19), 1), ((131, 1061), 1), ((3, 19, 31, 37), 1), ((20, 2, 65, 67), 1),
        ((140003, 2), 1), ((20011, 5), 1),
    ]
    for threads in {threads}:
        numba.set_num_threads(threads)
        digest = hashlib.sha256()
        for shape, axis in shapes:
            random = np.random.default_rng(0)
            x, dy, residual = (random.standard_normal(shape, dtype=np.float32) for _ in range(3))
            y, mean, invstd, mask = numbabn.batch_norm_forward(
                x, axis=axis, residual=residual, activation="relu"
            )
            gradients = numbabn.batch_norm_backward(
                dy, x, None, mean, invstd, axis=axis, mask=mask, with_residual=True
            )
            stats = numbabn.batch_stats(x, axis=axis)
            for result in (y, mean, invstd, mask, *gradients, stats.mean, stats.m2):
                digest.update(result.tobytes())
        print(threads, digest.hexdigest())
"""


def test_same_bits_for_any_number_of_threads():
    lines = run(BITS.format(threads=[1, 2, 5, 2]), NUMBA_NUM_THREADS="5").splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "5", "2"]
    assert len({line.split()[1] for line in lines}) == 1


def test_small_inputs_start_no_threads():
    output = run(
        """
    import numba, numpy as np
    import numbabn

    numbabn.batch_norm(np.ones((4, 8), np.float32), training=True)
    try:
        print(numba.threading_layer())
    except ValueError:
        print("none")
    """
    )
    assert output.split() == ["none"]


def test_kernels_are_kept_on_disk_under_a_stamp_of_every_file():
    assert os.path.isdir(cpu.cache_folder())
    for variant in (planes.forward_planes.serial, planes.forward_planes.parallel):
        assert variant._cache._cache_file._source_stamp == compilation._source_stamp()
    names = {
        variant._cache._cache_file._index_name
        for variant in (planes.forward_planes.serial, planes.forward_planes.parallel)
    }
    assert len(names) == 2


def test_the_stamp_follows_any_file(tmp_path, monkeypatch):
    files = ("cpu/a.py", "cpu/b.py", "layout.py", "c/a.py")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    monkeypatch.setattr(compilation, "__file__", str(tmp_path / "cpu" / "schedule.py"))
    stamp = compilation._source_stamp.__wrapped__
    kernels, callers = set(), set()
    for name in files:
        kernels.add(stamp())
        callers.add(stamp(tmp_path / "c"))
        (tmp_path / name).write_text("pass  # changed\n")
        kernels.add(stamp())
        callers.add(stamp(tmp_path / "c"))
    assert len(kernels) == 4
    assert len(callers) == 5


def test_without_a_folder_to_write_to_kernels_still_run():
    output = run(
        """
    from numba.core import caching

    def refuse(self):
        raise OSError("read-only")

    caching._CacheLocator.ensure_cache_path = refuse
    caching._SourceFileBackedLocatorMixin.ensure_cache_path = refuse
    import numpy as np
    import numbabn
    from numbabn import cpu, reference

    y = numbabn.batch_norm(np.array([[1.0], [3.0]]), training=True, eps=0.0)
    print(*y.ravel(), cpu.cache_folder())
    """
    )
    assert output.split() == ["-1.0", "1.0", "None"]


def planes_cut(made, summed, block, group, together, threads, kept):
    """Another plan for planes, with the memory that it needs."""
    row = planes.slab_row(group, made.shape.S)
    shape = made.shape._replace(
        block=block, group=group, together=together, threads=threads, row=row
    )
    slab = -(-block // group) * shape.N * row * summed
    return made._replace(
        shape=shape,
        slab=slab if kept else 0,
        sums=group * vector.SUMS,
        constants=(block + 1) * vector.CONSTANTS + 16,
        partials=block * shape.pieces * planes.PARTIAL,
    )


def rows_cut(made, summed, block, tile, threads):
    """Another plan for rows."""
    shape = made.shape._replace(block=block, tile=tile, threads=threads)
    return made._replace(shape=shape, sums=3 * (block + 16))


PLANS = {
    "long planes": ((20, 9, 4355), planes_cut, [
        (1, 1, False, 1, True), (1, 1, False, 2, True), (1, 1, True, 2, True),
        (2, 1, True, 3, False), (9, 1, True, 2, False), (4, 1, False, 2, True),
        (3, 1, True, 2, True),
    ]),
    "short planes": ((300, 19, 71), planes_cut, [
        (1, 1, False, 1, True), (4, 4, False, 1, True), (4, 4, False, 2, False),
        (8, 4, True, 3, True), (19, 5, True, 2, False), (3, 3, True, 2, True),
    ]),
    "rows": ((4099, 150), rows_cut, [
        (150, 16, 1), (64, 16, 1), (64, 8, 3), (192, 1, 2), (128, 16, 2),
    ]),
    "folded rows": ((140003, 2), rows_cut, [(128, 16, 1), (64, 5, 2), (128, 1, 3)]),
    "short rows": ((4099, 21), rows_cut, [(21, 16, 1), (64, 5, 2), (21, 16, 3)]),
}  # fmt: skip


def test_without_the_compiler_a_call_says_so():
    output = run(
        """
    import numpy as np
    import numbabn
    from numbabn.cli import main

    assert numbabn.fold(np.ones((2, 1)), None, np.zeros(2), np.ones(2))
    try:
        numbabn.batch_norm(np.ones((4, 8)), training=True)
    except RuntimeError as error:
        print(error)
    print(main(["warmup"]), main(["info"]))
    """,
        NUMBA_DISABLE_JIT="1",
    )
    lines = output.splitlines()
    assert lines[0].startswith("NUMBA_DISABLE_JIT is set, but numbabn's kernels cannot run")
    assert lines[-1] == "1 0"


@pytest.mark.parametrize(("size", "changed", "plans"), PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_a_plan_changes_no_bit(size, changed, plans, operation, monkeypatch, request):
    """Whatever is summed before it is written, by however many threads, with or without a slab."""
    random = np.random.default_rng(0)
    x, dy, residual = (random.standard_normal(size, dtype=np.float32) for _ in range(3))
    mean, invstd = np.zeros(size[1]), np.ones(size[1])
    _, _, _, mask = numbabn.batch_norm_forward(x, activation="relu")
    source = x if operation == "forward" else dy
    cut = schedule._cut
    request.addfinalizer(schedule.forget)
    found = set()
    for plan in plans:
        # Where the result begins within a line, and whether it goes past the caches.
        for place, streaming in product((0, 5), (False, True)):

            def other(*arguments, plan=plan, streaming=streaming):
                made = cut(*arguments)
                made = made._replace(shape=made.shape._replace(streaming=streaming))
                return changed(made, 1 if operation == "forward" else 2, *plan)

            monkeypatch.setattr(schedule, "_cut", other)
            schedule.forget()
            out = np.full(x.size + 32, np.nan, np.float32)
            out = out[place : place + x.size].reshape(size)
            in_place = source.copy()
            for given, target in ((source, out), (in_place, in_place)):
                if operation == "forward":
                    results = numbabn.batch_norm_forward(
                        given, residual=residual, activation="relu", out=target
                    )
                else:
                    results = numbabn.batch_norm_backward(
                        given, x, None, mean, invstd, mask=mask, with_residual=True, out=target
                    )
                found.add(b"".join(result.tobytes() for result in results))
    assert len(found) == 1
    if operation == "forward":
        expected, _, _ = reference.forward(x, residual=residual, activation="relu")
        np.testing.assert_allclose(results[0], expected, rtol=0, atol=5e-6)
    else:
        gated = np.unpackbits(mask, count=x.size, bitorder="little").reshape(size)
        expected = reference.backward(dy * gated, x, None, mean, invstd)[0]
        np.testing.assert_allclose(results[0], expected, rtol=0, atol=5e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ru_maxrss is POSIX's")
@pytest.mark.parametrize("size", [(16, 1, 1 << 20), (2, 8, 1 << 20), (1 << 18, 64), (4096, 4096)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_into_given_results_takes_no_memory_to_speak_of(size, threads):
    output = run(
        f"""
    import resource
    import numba, numpy as np
    import numbabn

    numba.set_num_threads({threads})
    x = np.ones({size}, np.float32)
    x[:, 0] = 2
    y, dx = np.full_like(x, 3), np.full_like(x, 3)
    small = np.ones((300, 300), np.float32)
    for a in (small, np.ones((4, 40, 300), np.float32)):  # compile
        _, mean, invstd, _ = numbabn.batch_norm_forward(a)
        numbabn.batch_norm_backward(a, a, None, mean, invstd)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, mean, invstd, _ = numbabn.batch_norm_forward(x, out=y)
    numbabn.batch_norm_backward(y, x, None, mean, invstd, out=dx)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """,
        NUMBA_NUM_THREADS="2",
        NUMBABN_L3_BYTES=str(1 << 25),
    )
    # x has 64 MiB; a slab at most half of the last cache, 16 MiB.
    assert int(output) < 24 << 10
