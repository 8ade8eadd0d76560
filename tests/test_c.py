import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import cases
import foreign
import numpy as np
import problem
import pytest
from foreign import Call, Foreign
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import Problem
from programs import environment_of

import numbabn
from numbabn import c, reference
from numbabn.c import structs

ALONE, TOGETHER = Foreign(), Foreign(threads=2)
ROOT = Path(numbabn.__file__).parents[1]
EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = {"axis": 1, "activation": None}


@cases.shapes
@cases.dtypes
def test_training(shape, axis, dtype, ulp):
    problem.check_training(Problem(shape, axis, dtype, ulp, on=ALONE))
    p = Problem(shape, axis, dtype, ulp, with_residual=True, activation="relu", on=ALONE)
    problem.check_training(p)


@cases.shapes
@cases.narrow_dtypes
def test_training_of_sixteen_bits(shape, axis, dtype, ulp):
    p = Problem(shape, axis, dtype, ulp, with_residual=True, activation="relu", on=ALONE)
    forward = {"residual": p.residual, "axis": axis, "activation": "relu"}
    result = ALONE.call(numbabn.batch_norm_forward, p.x, p.weight, p.bias, **forward)
    ALONE.call(
        numbabn.batch_norm_backward, p.dy, p.x, p.weight, *result[1:3],
        axis=axis, mask=result.mask, with_residual=True,
    )  # fmt: skip
    problem.check_inference(p)


@cases.shapes
@cases.dtypes
def test_inference(shape, axis, dtype, ulp):
    problem.check_inference(Problem(shape, axis, dtype, ulp, with_residual=True, on=ALONE))
    problem.check_inference(Problem(shape, axis, dtype, ulp, activation="relu", on=ALONE))


@cases.shapes
@cases.dtypes
def test_statistics(shape, axis, dtype, ulp):
    x = cases.normal(shape, dtype, seed=1, offset=3)
    stats = ALONE.call(numbabn.batch_stats, x, axis=axis)
    _, mean, m2 = reference.statistics(x, axis=axis)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(stats.m2, m2, rtol=1e-12)


@cases.memory
@pytest.mark.parametrize("axis", [1, -1])
def test_any_strides(lay, axis):
    shape = (3, 5, 7, 6) if axis == 1 else (3, 7, 6, 18)
    p = Problem(
        shape, axis, np.float32, 2**-23, with_residual=True, activation="relu", on=ALONE
    )  # fmt: skip
    problem.check_strides(p, lay)


@cases.memory
def test_results_of_any_strides(lay):
    """Results that lie in another way than the operands."""
    p = Problem((3, 5, 7, 6), 1, np.float32, 2**-23, with_residual=True, activation="relu")
    keywords = {"out": lay(np.zeros_like(p.x)), **p.keywords}
    y, mean, invstd, mask = ALONE.call(numbabn.batch_norm_forward, p.x, p.weight, **keywords)
    assert y is keywords["out"]
    ALONE.call(
        numbabn.batch_norm_backward, lay(p.dy), p.x, p.weight, mean, invstd,
        mask=mask, with_residual=True, out=np.asfortranarray(np.zeros_like(p.x)),
    )  # fmt: skip


@pytest.mark.parametrize("lay", [cases.MEMORY["C"], cases.MEMORY["stepped HW"]])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_in_place(lay, activation):
    p = Problem((9, 5, 7, 6), 1, np.float64, 2**-48, with_residual=True, activation=activation)
    forward = {"x": lay(p.x), "residual": lay(p.residual), "weight": p.weight, "bias": p.bias}
    for name in ("x", "residual"):
        operands = forward | {name: lay(p.keywords.get(name, p.x).copy())}
        expected = numbabn.batch_norm_forward(**operands, activation=activation)
        call, got = foreign.forward(
            **operands, out=operands[name], axis=1, activation=activation, eps=1e-5
        )
        call["correction"] = 1
        assert call.run() == c.Status.OK
        foreign.same(got, expected)
    for name in ("x", "dy"):
        operands = {"x": lay(p.x.copy()), "dy": lay(p.dy.copy()), "weight": p.weight}
        saved = {"mean": expected.mean, "invstd": expected.invstd, "mask": expected.mask}
        keywords = operands | saved | {"training": True, "with_residual": True}
        wanted = numbabn.batch_norm_backward(**keywords)
        call, got = foreign.backward(**keywords, out=operands[name], axis=1)
        assert call.run() == c.Status.OK
        foreign.same(got, wanted)


def test_broadcast_inputs():
    p = Problem((6, 5, 7, 8), 1, np.float32, 2**-23)
    for narrow in (p.x[:1], p.x[:, :1], p.x[:, :, :1, :1]):
        x = np.broadcast_to(narrow, p.x.shape)
        ALONE.call(numbabn.batch_norm_forward, x, p.weight, p.bias, out=np.zeros_like(p.x))


@settings(deadline=None, max_examples=100)
@given(array=problem.arrays(), seed=st.integers(0, 2**16))
def test_any_array(array, seed):
    shape, axis, _, _ = array
    if np.prod(shape) != shape[axis]:
        problem.check_any_array(array, seed, on=ALONE)


@cases.narrow_dtypes
def test_float32_beside_sixteen_bits(dtype, ulp):
    x = cases.normal((40, 21, 9, 5), dtype, offset=8)
    numbers = [cases.normal(21, np.float32, seed=s) for s in range(4)]
    numbers[3] = np.abs(numbers[3])
    result = ALONE.call(numbabn.batch_norm_forward, x, *numbers, activation="relu")
    ALONE.call(numbabn.batch_norm_inference, x, *numbers[2:], *numbers[:2])
    gradients = ALONE.call(numbabn.batch_norm_backward, x, x, numbers[0], *result[1:3])
    assert gradients.dweight.dtype == np.float32


@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_running_statistics(correction):
    x = cases.normal((6, 4), np.float64)
    var = np.ones(4)
    keywords = {"momentum": 1.0, "correction": correction}
    ALONE.call(numbabn.batch_norm_forward, x, running_var=var, **keywords)
    np.testing.assert_allclose(var, x.var(0) * 6 / (6 - correction), rtol=1e-14)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0)])
def test_empty(shape):
    x = np.empty(shape, np.float32)
    running = np.full(3, 2, np.float32), np.full(3, 5, np.float32)
    result = ALONE.call(numbabn.batch_norm_forward, x, None, None, *running, activation="relu")
    ALONE.call(numbabn.batch_norm_inference, x, *running)
    ALONE.call(numbabn.batch_norm_backward, x, x, None, *result[1:3], with_residual=True)
    ALONE.call(numbabn.batch_stats, x)


@pytest.mark.parametrize("name", [*cases.LARGE, "NCHW fused", "NC"])
@cases.dtypes
def test_numbas_threads_change_no_bit(name, dtype, ulp):
    shape, axis = cases.SHAPES[name]
    p = Problem(shape, axis, dtype, ulp, with_residual=True, activation="relu", on=TOGETHER)
    assert c.table(np.dtype(dtype).name, parallel=True).threads >= 1
    problem.check_training(p)
    problem.check_inference(p)
    TOGETHER.call(numbabn.batch_stats, p.x, axis=axis)


@pytest.mark.parametrize("threads", [0, 2])
def test_many_threads_at_once(threads):
    """Each with arrays of its own, of one size and of another; ctypes releases the GIL."""
    problems = [Problem(s, 1, np.float32, 2**-23) for s in ((16, 24, 28, 28), (64, 200))]
    expected = [numbabn.batch_norm_forward(p.x, p.weight, p.bias) for p in problems]
    numbers = {"eps": 1e-5, "correction": 1.0}
    wrong = []

    def run():
        for _ in range(20):
            for p, wanted in zip(problems, expected, strict=True):
                call, got = foreign.forward(
                    p.x, threads=threads, weight=p.weight, bias=p.bias, **numbers, **FEW
                )
                if call.run(parallel=threads > 1) or not np.array_equal(got.y, wanted.y):
                    wrong.append(p)

    running = [threading.Thread(target=run) for _ in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shares_of_channels_give_the_bits_of_the_whole(dtype):
    """How C programs use threads of their own: by strides, each some of the channels."""
    for shape, axis in (((33, 67, 7, 7), 1), ((2, 17, 40, 40), 1), ((1100, 64), -1)):
        x = cases.normal(shape, dtype)
        whole = numbabn.batch_norm_forward(x, axis=axis)
        y = np.full_like(x, np.nan)
        step = 16
        for first in range(0, shape[axis], step):
            here = (slice(None),) * (axis % len(shape)) + (slice(first, first + step),)
            call, got = foreign.forward(
                x[here], y[here], axis=axis, activation=None, eps=1e-5, correction=1.0
            )
            assert call.run() == c.Status.OK
            foreign.same(got.mean, whole.mean[first : first + step])
        foreign.same(y, whole.y)


WRONG = {
    "NDIM": ("forward", {"batch.ndim": 1}),
    "NDIM above": ("forward", {"batch.ndim": 33}),
    "SHAPE": ("forward", {"batch.shape": None}),
    "AXIS": ("forward", {"batch.axis": 2}),
    "AXIS below": ("backward", {"batch.axis": -3}),
    "MISSING_X": ("forward", {"x.data": None}),
    "MISSING_X of inference": ("inference", {"x.data": None}),
    "MISSING_X of statistics": ("statistics", {"x.data": None}),
    "MISSING_X of backward": ("backward", {"x.data": None}),
    "MISSING_Y": ("forward", {"y.data": None}),
    "MISSING_Y of inference": ("inference", {"y.data": None}),
    "MISSING_RUNNING": ("inference", {"running_mean": None}),
    "MISSING_RUNNING var": ("inference", {"running_var": None}),
    "MISSING_DY": ("backward", {"dy.data": None}),
    "MISSING_DX": ("backward", {"dx.data": None}),
    "MISSING_STATISTICS": ("forward", {"invstd": None}),
    "MISSING_STATISTICS of backward": ("backward", {"mean": None}),
    "MISSING_STATISTICS of statistics": ("statistics", {"m2": None}),
    "MISSING_GRADIENTS": ("backward", {"dbias": None}),
    "PARAMETERS": ("forward", {"batch.float32_parameters": 1}),
    "EPS": ("forward", {"eps": -1e-9}),
    "EPS nan": ("inference", {"eps": np.nan}),
    "EPS inf": ("inference", {"eps": np.inf}),
    "MOMENTUM": ("forward", {"momentum": np.inf}),
    "CORRECTION": ("forward", {"correction": 4.0}),
    "CORRECTION nan": ("forward", {"correction": np.nan}),
    "MASK": ("forward", {"relu": 0}),
}


def _calls():
    p = Problem((4, 3), 1, np.float64, 2**-48)
    running = {"running_mean": p.running_mean.copy(), "running_var": p.running_var.copy()}
    saved = {"mean": np.zeros(3), "invstd": np.ones(3), "mask": None}
    relu = {"axis": 1, "activation": "relu"}
    return {
        "forward": foreign.forward(p.x, **running, **relu, eps=1e-5, momentum=0.1, correction=1.0),
        "inference": foreign.inference(p.x, **running, **relu, eps=1e-5),
        "backward": foreign.backward(
            p.dy, p.x, None, axis=1, training=True, with_residual=True, **saved
        ),
        "statistics": foreign.statistics(p.x, axis=1),
    }


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case):
    operation, changes = WRONG[case]
    call, _ = _calls()[operation]
    held = [array.copy() for array in call.held if isinstance(array, np.ndarray)]
    for path, value in changes.items():
        *outer, name = path.split(".")
        setattr(getattr(call.struct, outer[0]) if outer else call.struct, name, value)
    assert call.run().name == case.split()[0]
    arrays = [array for array in call.held if isinstance(array, np.ndarray)]
    foreign.same(tuple(arrays), tuple(held))


@pytest.mark.parametrize("shape", [(4, 0), (-4, 3), (4, -3)])
def test_wrong_sizes(shape):
    call, _ = _calls()["forward"]
    call.held[0][:] = shape
    assert call.run() == c.Status.SHAPE


@pytest.mark.parametrize("shape", [(1 << 32, 4, 1 << 32), (1 << 31, 4, 1 << 33), (4, 1 << 61, 2)])
def test_sizes_beyond_what_can_be_counted(shape):
    call, _ = foreign.statistics(np.ones((2, 3, 2)), axis=1)
    call.held[0][:] = shape
    assert call.run() == c.Status.SHAPE


def test_one_value_per_channel():
    x = cases.normal((1, 3), np.float32)
    call, _ = foreign.forward(x, **FEW)
    assert call.run() == c.Status.VALUES
    keywords = {"axis": 1, "with_residual": False, "mean": np.zeros(3), "invstd": np.ones(3)}
    for training, status in ((True, c.Status.VALUES), (False, c.Status.OK)):
        call, _ = foreign.backward(x, x, None, training=training, **keywords)
        assert call.run() == status


def test_no_memory():
    """Sums of so many channels fit nowhere; nothing is touched, so that no x has to be there."""
    x = np.broadcast_to(np.float32(0), (4, 1 << 50))
    mean, m2 = np.zeros(1), np.zeros(1)
    call = Call(c.StatisticsCall, x, 1, x=x, mean=mean, m2=m2)
    assert call.run() == c.Status.MEMORY


def test_every_status_has_a_text():
    assert list(structs.MESSAGES) == list(c.Status) == list(range(len(c.Status)))
    table = c.table("float64", "statistics")
    texts = [table.messages[k].decode() for k in range(table.message_count)]
    assert texts == list(structs.MESSAGES.values())
    assert {case.split()[0] for case in WRONG} | {"VALUES", "MEMORY", "OK", "NOT_LOADED"} == {
        status.name for status in c.Status
    }


def test_a_table_grows():
    table = c.table("float64", "statistics")
    assert c.table("float64", "statistics inference") is table
    assert table.statistics
    assert table.inference
    assert (table.abi, table.size) == (structs.ABI, ctypes.sizeof(table))
    assert (table.dtype, table.itemsize) == (b"float64", 8)
    kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer = kind(("PyCapsule_GetPointer", ctypes.pythonapi))
    capsule = c.capsule(structs.ABI, "float64", "statistics")
    assert pointer(capsule, b"numbabn.c.table") == ctypes.addressof(table)


def test_a_capsule_whatever_others_say_of_pythons_functions(monkeypatch):
    shared = ctypes.pythonapi.PyCapsule_New
    monkeypatch.setattr(
        shared, "argtypes", (ctypes.c_void_p, ctypes.c_char_p, ctypes.CFUNCTYPE(None))
    )
    monkeypatch.setattr(shared, "restype", ctypes.c_int)
    assert type(c.capsule(structs.ABI, "float64", "statistics")).__name__ == "PyCapsule"


def test_wrong_tables():
    with pytest.raises(ValueError, match=r"dtype: expected one of float32.*, got 'int8'"):
        c.table("int8")
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got dtype\('float32'\)"):
        c.table(np.dtype("float32"))
    with pytest.raises(ValueError, match=r"operations: expected some of .*, got \['forward'\]"):
        c.table("float32", ["forward"])
    with pytest.raises(ValueError, match=r"operations: expected some of .*, got 'forward fold'"):
        c.table("float32", "forward fold")
    with pytest.raises(ValueError, match=r"operations: expected some of stat.*, got ''"):
        c.table("float32", "", parallel=True)
    with pytest.raises(ImportError, match=r"numbabn.h: expected edition 1, got 2"):
        c.capsule(2, "float32")


FORKED = """
import os
import numpy as np
import foreign
from numbabn import c
x = np.random.default_rng(0).standard_normal((16, 64, 28, 28), np.float32)
keywords = {"axis": 1, "activation": None, "eps": 1e-5, "correction": 1.0, "threads": 2}
call, here = foreign.forward(x, **keywords)
assert call.run(parallel=True) == c.Status.OK
child = os.fork()
call, there = foreign.forward(x, **keywords)
assert call.run(parallel=True) == c.Status.OK
assert np.array_equal(here.y, there.y)
if not child:
    assert c.table("float32", "forward").threads == 1
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
WORKQUEUE = """
import threading
import numpy as np
import foreign
from numbabn import c
x = np.random.default_rng(0).standard_normal((16, 64, 28, 28), np.float32)
assert c.table("float32", "statistics", parallel=True).threads == 1
def run():
    for _ in range(50):
        call, _ = foreign.statistics(x, threads=2, axis=1)
        assert call.run() == c.Status.OK
threads = [threading.Thread(target=run) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


BOUND = """
import os
import numba
import numpy as np
import foreign
from numbabn import c
x = np.random.default_rng(0).standard_normal((16, 64, 28, 28), np.float32)
assert c.table("float32", "statistics", parallel=True).threads == 8
before = len(os.listdir("/proc/self/task"))
call, _ = foreign.statistics(x, threads=2, axis=1)
assert call.run() == c.Status.OK
assert len(os.listdir("/proc/self/task")) <= before + 1
assert numba.get_num_threads() == 8
"""


def run_python(code, **environment):
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | environment | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_child_keeps_to_its_thread():
    """OpenMP would abort."""
    run_python(FORKED)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system lists no threads")
def test_a_call_starts_no_more_threads_than_it_asks_for():
    run_python(BOUND, NUMBA_NUM_THREADS="8", **environment_of("omp"))


def test_a_workqueue_is_never_entered():
    """It would abort when two threads are in it."""
    run_python(WORKQUEUE, NUMBA_THREADING_LAYER="workqueue")


def test_the_header_says_what_structs_say():
    text = (Path(c.get_include()) / "numbabn.h").read_text()
    enum = dict(re.findall(r"^    NUMBABN_(\w+) = (\d+)", text, re.MULTILINE))
    assert {name: int(number) for name, number in enum.items()} == dict(c.Status.__members__)
    assert re.search(r"#define NUMBABN_ABI (\d+)", text)[1] == str(structs.ABI)
    assert re.search(r"#define NUMBABN_MAX_NDIM (\d+)", text)[1] == str(structs.MAX_NDIM)


def test_what_the_header_says_may_be_null():
    text = (Path(c.get_include()) / "numbabn.h").read_text()
    for operation in structs.CALLS:
        struct = re.search(rf"struct numbabn_{operation}_call {{(.*?)^}}", text, re.M | re.S)[1]
        for name in re.findall(r"\*(\w+); +/\* .*or NULL", struct):
            call, _ = _calls()[operation]
            setattr(call.struct, name, None)
            assert call.run() == c.Status.OK, (operation, name)


# What the header declares by other names.
DECLARED = {
    "numbabn_input": structs.Input,
    "numbabn_output": structs.Output,
    "numbabn_batch": structs.Batch,
    "numbabn_api": structs.Table,
    **{f"numbabn_{name}_call": call for name, call in structs.CALLS.items()},
}
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")


def build(source, target, *flags, embed=False):
    """Compile with C's or C++'s compiler."""
    cpp = source.suffix == ".cpp"
    compiler = shutil.which("c++" if cpp else "cc")
    if compiler is None:
        pytest.skip("no compiler on the path")
    include = sysconfig.get_path("include")
    command = [compiler, "-std=c++11" if cpp else "-std=c99", *WARNINGS, *flags, str(source)]
    command += ["-o", str(target), f"-I{c.get_include()}"]
    if embed:
        values = sysconfig.get_config_vars()
        version, folder = values["LDVERSION"], values["LIBDIR"]
        if not values["Py_ENABLE_SHARED"] or not Path(include, "Python.h").exists():
            pytest.skip("Python has no shared library, or no headers")
        command += [f"-I{include}", f"-L{folder}", f"-Wl,-rpath,{folder}", f"-lpython{version}"]
        command += ["-lpthread", "-lm"]
    subprocess.run(command, check=True)


def run_embedded(program):
    """Run a program whose Python finds what this one finds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(program), sys.executable],
        env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("suffix", [".c", ".cpp"])
def test_the_header_lays_out_structs_as_ctypes_does(suffix, tmp_path):
    lines = ["#include <stdio.h>", "#include <numbabn.h>", "int main(void) {"]
    expected = []
    for name, struct in DECLARED.items():
        lines.append(f'printf("%d\\n", (int)sizeof({name}));')
        expected.append(ctypes.sizeof(struct))
        for field, _ in struct._fields_:
            lines.append(f'printf("%d\\n", (int)offsetof({name}, {field}));')
            expected.append(getattr(struct, field).offset)
    source, program = tmp_path / f"layout{suffix}", tmp_path / "layout"
    source.write_text("\n".join([*lines, "return 0; }\n"]))
    build(source, program)
    printed = subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert [int(number) for number in printed.split()] == expected


START = r"""
#include <Python.h>
#include <numbabn.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    PyConfig_SetBytesString(&config, &config.program_name, argv[argc - 1]);
    PyStatus status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
"""
TABLE = r"""
    if (numbabn_import("int8", NULL, 0) || !PyErr_ExceptionMatches(PyExc_ValueError))
        return 1;
    PyErr_Clear();
    const numbabn_api *api = numbabn_import("float64", "statistics", 0);
    if (!api)
        return 2;
    numbabn_forward_call forward = {{NULL, 0, 0, 0, 0}, {NULL, NULL}, {NULL, NULL}, {NULL, NULL},
        NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, 0, 0};
    printf("%s\n", numbabn_message(api, numbabn_forward(api, &forward)));
    printf("%s\n%s\n", numbabn_message(api, 99), numbabn_message(api, -1));

    double x[] = {1, 10, 3, 30}, mean[2], m2[2];
    int64_t shape[] = {2, 2}, transposed[] = {8, 16};
    numbabn_statistics_call call = {{shape, 2, 1, 0, 0}, {x, NULL}, mean, m2};
    int first = numbabn_statistics(api, &call);
    printf("%d %g %g %g %g\n", first, mean[0], mean[1], m2[0], m2[1]);
    call.x.strides = transposed;
    int second = numbabn_statistics(api, &call);
    printf("%d %g %g %g %g\n", second, mean[0], mean[1], m2[0], m2[1]);
    return 0;
}
"""


@pytest.mark.parametrize("suffix", [".c", ".cpp"])
def test_an_embedded_table(suffix, tmp_path):
    source, program = tmp_path / f"table{suffix}", tmp_path / "table"
    source.write_text(START + TABLE)
    build(source, program, embed=True)
    assert run_embedded(program).splitlines() == [
        structs.MESSAGES[c.Status.NOT_LOADED],
        "unknown status",
        "unknown status",
        "0 2 20 2 200",
        "0 5.5 16.5 40.5 364.5",
    ]


PAGE = r"""
    static float x[32 * 64 * 56 * 56], y[32 * 64 * 56 * 56], running_mean[64], running_var[64];
    x[0] = 3;
    running_var[0] = 4;
    {
        BLOCK
    }
    printf("%.3f\n", (double)y[0]);
    return 0;
}
"""


@pytest.mark.parametrize("importable", [True, False])
def test_the_page(importable, tmp_path):
    """Its first block runs, and ends with Python's message where numbabn cannot be imported."""
    page = (EXAMPLES.parent / "docs" / "c.md").read_text()
    block = re.search(r"```c\n(.*?)```", page, re.DOTALL)[1]
    source, program = tmp_path / "page.c", tmp_path / "page"
    source.write_text(START + PAGE.replace("BLOCK", block))
    build(source, program, embed=True)
    if importable:
        assert run_embedded(program) == "1.500\n"
        return
    (tmp_path / "numbabn.py").write_text("raise ImportError('not today')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [program, sys.executable],
        env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ImportError: not today")


@pytest.mark.parametrize("name", ["batch_norm.c", "batch_norm.cpp"])
def test_embedding_examples(name, tmp_path):
    source, program = EXAMPLES / "embedding" / name, tmp_path / "program"
    build(source, program, "-D_POSIX_C_SOURCE=200809L", "-O2", embed=True)
    printed = run_embedded(program)
    assert "expected" in printed  # the text of the call that is wrong on purpose
