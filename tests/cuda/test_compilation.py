"""Kernels compiled for GPUs that are not here, and what their machine code must hold to.

`gates` says to what. Each gate is shown to find what it is there for, in small kernels that break
it and nothing else.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("numba simulates a GPU", allow_module_level=True)
pytest.importorskip("cuda.core", reason="numba-cuda is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import sass

if sass.disassembler() is None:
    pytest.skip("nvdisasm is not installed", allow_module_level=True)

import gates
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from numbabn.cuda import compilation, intrinsics
from numbabn.cuda.compilation import RESIDENT, Variant
from numbabn.cuda.formats import FORMATS, THREADS
from numbabn.cuda.intrinsics import (
    Global,
    awaited,
    device,
    float64_at,
    get,
    keep,
    kept,
    narrow,
    nothing,
    passing,
    pause,
    put,
    quotient,
    read_lanes,
    shared_lanes,
    slots,
    thread,
    threads,
    total,
    unpack,
    wide,
    width,
)

CAPABILITIES = (8, 0), (9, 0), (10, 0)
PROCESSES = 2  # Numba compiles one kernel at a time in each
# Variants that need all registers of a multiprocessor, by capability.
ALONE = {(8, 0): 53, (9, 0): 0, (10, 0): 14}


def _selection():
    """List all variants for each capability; most of the narrow ones are slow."""
    for variant in compilation.variants():
        for capability in CAPABILITIES:
            ordinary = gates.is_full(variant) or (variant.width == 1 and capability == (9, 0))
            marks = [] if ordinary else [pytest.mark.slow]
            name = f"{variant} sm_{capability[0]}{capability[1]}".replace(" ", "-")
            yield pytest.param(variant, capability, id=name, marks=marks)


every_variant = pytest.mark.parametrize(("variant", "capability"), [*_selection()])
every_capability = pytest.mark.parametrize("capability", CAPABILITIES, ids=str)


def _compiled(keys):
    return {key: gates.compiled(*key) for key in keys}


class _Pending:
    """Variants that are being compiled, by variant and capability."""

    def __init__(self, pool, keys):
        # Those of a view, format and width by one process, which types what they share but once.
        groups = {}
        for key in keys:
            groups.setdefault(key[0][1:], []).append(key)
        self.keys = keys
        self._futures = {of: pool.submit(_compiled, group) for of, group in groups.items()}

    def __getitem__(self, key):
        return self._futures[key[0][1:]].result()[key]


@pytest.fixture(scope="module")
def pending(request):
    """Begin to compile all variants that tests of this run ask for."""
    wanted = [
        (item.callspec.params["variant"], item.callspec.params["capability"])
        for item in request.session.items
        if getattr(item, "function", None) is test_machine_code
    ]
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NUMBA_DISABLE_CUDA", "1")  # no driver takes part, where there is one
            kernels = _Pending(pool, wanted)
        yield kernels
        pool.shutdown(cancel_futures=True)


@every_variant
def test_machine_code(variant, capability, pending):
    _, kernel, due = pending[variant, capability]
    assert [*map(str, gates.findings(kernel, due))] == []


@every_capability
def test_few_variants_take_a_multiprocessor_alone(capability, pending):
    alone = [
        str(variant)
        for variant, of in pending.keys
        if of == capability and pending[variant, of][0].resident < RESIDENT[0]
    ]
    assert len(alone) <= ALONE[capability], alone


# Kernels in which nothing is found, and those that each break one gate: 1 is added to all of x.


@intrinsic
def after(typing_context, index):
    """Give the index of a next step, and LLVM no chance to count steps and unroll the loop."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        return builder.asm(kind, "mov.b64 $0, $1;", "=l,l", args, side_effect=True)

    return types.int64(types.int64), codegen


@device
def first(x):
    return thread() * width(x)


@device
def load(x, index):
    return intrinsics.load(x, index, passing())


@device
def store(y, index, lanes):
    intrinsics.store(y, index, lanes, passing())


@device
def load_four(x, i, step):
    return load(x, i), load(x, i + step), load(x, i + 2 * step), load(x, i + 3 * step)


@device
def store_three(y, i, step, a, b, c, one):
    store(y, i, unpack(a) + one)
    store(y, i + step, unpack(b) + one)
    store(y, i + 2 * step, unpack(c) + one)


@device
def keep_four(memory, i, a, b, c, d):
    keep(memory, i, a)
    keep(memory, i + 1, b)
    keep(memory, i + 2, c)
    keep(memory, i + 3, d)


@intrinsic
def rounded(typing_context, value):
    """Round a float32 to float16 by itself."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        text = "{.reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.f32.f16 $0, h;}"
        return builder.asm(kind, text, "=f,f", args, side_effect=True)

    return types.float32(types.float32), codegen


@intrinsic
def add_at(typing_context, y, value):
    """Add a float32 to y's first number, in whatever order threads come."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64), ir.FloatType()])
        builder.asm(kind, "red.global.add.f32 [$0], $1;", "l,f", args, side_effect=True)
        return context.get_dummy_value()

    return types.void(y, types.float32), codegen


def good(x, y, many, one, size):
    step = threads() * width(x)
    i = first(x)
    while i < size:
        a, b, c, d = load_four(x, i, step)
        store_three(y, i, step, a, b, c, one)
        store(y, i + 3 * step, unpack(d) + one)
        i = after(i + 4 * step)


_good = device(good)


def with_float64(x, y, many, one, size):
    step = threads() * width(x)
    i = first(x)
    while i < size:
        a, b, c, d = load_four(x, i, step)
        store_three(y, i, step, a, b, c, one)
        store(y, i + 3 * step, narrow(y, wide(unpack(d)) + 0.1))
        i = after(i + 4 * step)


def by_threes(x, y, many, one, size):
    step = threads() * width(x)
    i = first(x)
    while i < size:
        a, b, c = load(x, i), load(x, i + step), load(x, i + 2 * step)
        store_three(y, i, step, a, b, c, one)
        i = after(i + 3 * step)


def with_division(x, y, many, one, size):
    step = threads() * width(x)
    i = first(x)
    while i < size:
        a, b, c, d = load_four(x, i, step)
        store_three(y, i, step, a, b, c, one)
        store(y, quotient(size * i, step), unpack(d) + one)
        i = after(i + 4 * step)


def with_float_atomics(x, y, many, one, size):
    _good(x, y, many, one, size)
    add_at(y, one)


def with_single_roundings(x, y, many, one, size):
    step = threads() * width(x)
    i = first(x)
    while i < size:
        a, b, c, d = load_four(x, i, step)
        store_three(y, i, step, a, b, c, one)
        store(y, i + 3 * step, unpack(d) + rounded(total(unpack(c))))
        i = after(i + 4 * step)


def with_many_held(x, y, many, one, size):
    memory = shared_lanes()
    held = narrow(many, read_lanes(many, memory, thread(), 1, width(many)))
    step = threads() * width(x)
    i = first(x)
    while i < size:
        a, b, c, d = load_four(x, i, step)
        held = held * total(unpack(a)) + one
        store_three(y, i, step, a, b, c, one)
        store(y, i + 3 * step, unpack(d) + one)
        i = after(i + 4 * step)
    store(y, size, unpack(load(x, size)) * total(held))


def with_waste(x, y, many, one, size):
    step = threads() * width(x)
    i = first(x)
    while i < size:
        a, b, c, d = load_four(x, i, step)
        store_three(y, i, step, a, b, c, one)
        wasted = unpack(d)
        for _ in range(40):
            wasted = (wasted + one) * one
        store(y, i + 3 * step, wasted)
        i = after(i + 4 * step)


def with_waiting(x, y, many, one, size):
    _good(x, y, many, one, size)
    while awaited(y, size):
        pause()


def with_restless_waiting(x, y, many, one, size):
    _good(x, y, many, one, size)
    while awaited(y, size):
        pass


def with_sums_of_pieces(x, y, many, one, size):
    _good(x, y, many, one, size)
    total, i = 0.0, thread()
    while i < size:
        total += get(float64_at(size), i)
        i = after(i + 1)
    put(float64_at(size), 0, total)


def holding(x, y, many, one, size):
    step, memory = threads() * width(x), slots()
    i = first(x)
    while i < size:
        a, b, c, d = load_four(x, i, step)
        store_three(y, i, step, a, b, c, one)
        store(y, i + 3 * step, unpack(d) + one)
        keep_four(memory, i, a, b, c, d)
        i = after(i + 4 * step)


def holding_four_in_registers(x, y, many, one, size):
    step, memory = threads() * width(x), slots()
    i = first(x)
    a = b = c = d = nothing(x)
    while i < size:
        keep_four(memory, i, a, b, c, d)
        a, b, c, d = load_four(x, i, step)
        store_three(y, i, step, a, b, c, one)
        store(y, i + 3 * step, unpack(d) + one)
        i = after(i + 4 * step)


def taking(x, y, many, one, size):
    step, memory = threads() * width(x), slots()
    i = first(x)
    while i < size:
        store_three(
            y, i, step, kept(memory, i, x), kept(memory, i + 1, x), kept(memory, i + 2, x), one
        )
        store(y, i + 3 * step, unpack(kept(memory, i + 3, x)) + one)
        i = after(i + 4 * step)


def name_of(value):
    return getattr(value, "__name__", None)


COPY = gates.Part("copy", 1, 1)
KEEP, TAKE = COPY._replace(keeps=1), gates.Part("take", 0, 1, takes=1)
ROOM = {"held": 8, "slots": 8}


def broken(
    kernel,
    capability,
    format_name="float32",
    used_width=None,
    resident=RESIDENT[0],
    part=COPY,
    **due,
):
    """Name the gates that a kernel breaks."""
    each = FORMATS[format_name]
    at = Global(format_name, used_width or each.lanes)
    kinds = at, at, Global("float32", 160), at.computed, types.int64
    code = compilation.assemble(kernel, types.void(*kinds), capability, resident=resident)
    due = gates.Expected(
        (part,), each.itemsize, each.lanes, RESIDENT[0], THREADS, capability, **due
    )
    return {each.gate for each in gates.findings(sass.read(code.cubin, code.report), due)}


@every_capability
@pytest.mark.parametrize("format_name", FORMATS)
def test_nothing_is_found_where_nothing_is_wrong(format_name, capability):
    assert broken(good, capability, format_name) == set()


@every_capability
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (good, {"part": COPY._replace(most=12)}),
        (holding, {"part": KEEP, **ROOM}),
        (holding_four_in_registers, {"part": KEEP, "held": 8, "slots": 4}),
        (taking, {"part": TAKE, **ROOM}),
        (with_waiting, {"waits": 1}),
        (with_sums_of_pieces, {"merges": True}),
    ],
    ids=name_of,
)
def test_what_is_due_is_no_finding(kernel, options, capability):
    assert broken(kernel, capability, **options) == set()


@every_capability
@pytest.mark.parametrize(
    ("gate", "kernel", "options"),
    [
        ("spills", with_many_held, {}),
        ("residence", with_many_held, {"resident": 1}),
        ("access", good, {"used_width": 2}),
        ("access", by_threes, {}),
        ("float64", with_float64, {}),
        ("division", with_division, {}),
        ("atomics", with_float_atomics, {}),
        ("packing", with_single_roundings, {"format_name": "float16"}),
        ("residence", holding, {"part": KEEP, "held": 32, "slots": 32}),
        ("held", good, {"part": KEEP, **ROOM}),
        ("held", holding, {"part": COPY, **ROOM}),
        ("held", holding_four_in_registers, {"part": KEEP, **ROOM}),
        ("held", taking, {"part": TAKE._replace(takes=0)}),
        ("cost", with_waste, {"part": COPY._replace(most=12)}),
        ("waiting", with_waiting, {}),
        ("waiting", good, {"waits": 1}),
        ("access", with_restless_waiting, {"waits": 0}),
        ("access", with_sums_of_pieces, {}),
    ],
    ids=name_of,
)
def test_a_gate_finds_what_breaks_it(gate, kernel, options, capability):
    assert broken(kernel, capability, **options) == {gate}


# Compilation itself.


def test_every_variant_has_a_name_and_a_function_of_that_name():
    variants = compilation.variants()
    assert len({*map(str, variants)}) == len({*variants}) == len(variants)
    for variant in variants:
        name = compilation.function(variant).__name__
        assert name == f"{variant.kernel}_{variant.view}"


def test_names_in_machine_code_differ(pending):
    for capability in CAPABILITIES:
        codes = [pending[key][0] for key in pending.keys if key[1] == capability]
        assert len({code.name for code in codes}) == len(codes)


def test_a_variant_is_compiled_once():
    variant = compilation.variants()[0]
    first = compilation.compiled(variant, (9, 0))
    assert compilation.compiled(variant, (9, 0)) is first
    assert compilation.compiled(variant, (8, 0)).cubin != first.cubin


@pytest.mark.parametrize(
    "variant",
    [Variant("reverse", "planes", "float32", 4), Variant("normalize", "rows", "float128", 1)],
    ids=str,
)
def test_what_is_no_variant_is_not_compiled(variant):
    with pytest.raises((AttributeError, KeyError), match=r"reverse_planes|float128"):
        compilation.compiled(variant, (9, 0))


def test_packed_rounding_needs_the_oldest_capability():
    """Older ones are refused by the assembler, as `launch` refuses them by name."""
    variant = Variant("normalize", "rows", "bfloat16", 8)
    with pytest.raises(Exception, match=r"(?i)sm_80|ptx"):
        compilation.compiled(variant, (7, 5))
