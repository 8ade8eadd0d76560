"""What numba cannot say by itself: pointers, and sixteen numbers at once in registers.

Numbers are loaded as `Lanes`: sixteen at a time, and, whatever memory stores, as they are computed
with. numba compiles no arrays of 16-bit floats; they come as the integers that hold their bits,
float16 as uint16 and bfloat16 as int16.
"""

import operator
import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
LINE = 64  # bytes of a cache line
X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")

_BOOL, _BYTE, _HALF, _I16 = ir.IntType(1), ir.IntType(8), ir.HalfType(), ir.IntType(16)
_I32, _I64, _FLOAT, _DOUBLE = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
_COMPUTED = {types.float32: _FLOAT, types.float64: _DOUBLE}
FLOAT16, BFLOAT16 = types.uint16, types.int16
# Rounding differs with contraction, so every operation has the same flags wherever it stands.
_FLAGS = ("contract", "nsz")


# Pointers.


@intrinsic
def moved(typing_context, pointer, elements):
    """``pointer + elements``."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic
def missing(typing_context, pointer):
    """Whether a pointer is null: its argument was None."""

    def codegen(context, builder, signature, args):
        return cgutils.is_null(builder, args[0])

    return types.boolean(pointer), codegen


def _line_bytes(pointer):
    """Bytes to which sixteen numbers are streamed: a line, or what they take of one."""
    return min(LINE, LANES * pointer.dtype.bitwidth // 8)


@intrinsic
def line_numbers(typing_context, pointer):
    """Numbers of a line, at most sixteen."""

    def codegen(context, builder, signature, args):
        kind = signature.args[0]
        return ir.Constant(_I64, _line_bytes(kind) * 8 // kind.dtype.bitwidth)

    return types.intp(pointer), codegen


@intrinsic
def front(typing_context, pointer):
    """How many numbers lie between an address that can be streamed to and this one."""

    def codegen(context, builder, signature, args):
        kind = signature.args[0]
        within = builder.and_(
            builder.ptrtoint(args[0], _I64), ir.Constant(_I64, _line_bytes(kind) - 1)
        )
        size = kind.dtype.bitwidth // 8
        return builder.lshr(within, ir.Constant(_I64, size.bit_length() - 1))

    return types.intp(pointer), codegen


@intrinsic
def get(typing_context, pointer, index):
    """``pointer[index]``, as it is stored."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(args[0], [args[1]]), align=1)

    return pointer.dtype(pointer, types.intp), codegen


@intrinsic
def put(typing_context, pointer, index, value):
    """``pointer[index] = value``."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], builder.gep(args[0], [args[1]]), align=1)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, pointer.dtype), codegen


def _fetch(builder, at, write=0):
    """Fetch a line into L2; L1 is too small for what is kilobytes ahead."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    intent, l2, data = (ir.Constant(_I32, k) for k in (write, 2, 1))
    builder.call(function, [at, intent, l2, data])


@intrinsic
def prefetch(typing_context, pointer, index):
    """Fetch as many lines as sixteen numbers fill, from that of the first on."""

    def codegen(context, builder, signature, args):
        at = builder.bitcast(builder.gep(args[0], [args[1]]), _BYTE.as_pointer())
        for line in range(0, LANES * signature.args[0].dtype.bitwidth // 8, LINE):
            _fetch(builder, builder.gep(at, [ir.Constant(_I64, line)]))
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def prefetch_line(typing_context, pointer, index):
    """Fetch the line of one number."""

    def codegen(context, builder, signature, args):
        _fetch(builder, builder.bitcast(builder.gep(args[0], [args[1]]), _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def prefetch_target(typing_context, pointer, index):
    """Fetch the line of one number that will be written, but not the whole line."""

    def codegen(context, builder, signature, args):
        at = builder.bitcast(builder.gep(args[0], [args[1]]), _BYTE.as_pointer())
        _fetch(builder, at, write=1)
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def or_byte(typing_context, mask, index, bits):
    """``mask[index] |= bits`` as one atomic step: the byte may belong to two threads' rows."""

    def codegen(context, builder, signature, args):
        builder.atomic_rmw("or", builder.gep(args[0], [args[1]]), args[2], "monotonic")
        return context.get_dummy_value()

    return types.void(mask, types.intp, types.uint8), codegen


@intrinsic
def store_fence(typing_context):
    """Wait until streamed stores can be seen by other cores."""

    def codegen(context, builder, signature, args):
        if X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse.sfence"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


# Sixteen numbers at once.


class Lanes(types.Type):
    """Sixteen numbers in registers, as they are computed with: float32 or float64."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_COMPUTED[kind.dtype], LANES))


def _arithmetic(symbol, instruction):
    @infer_global(symbol)
    class _Template(AbstractTemplate):
        key = symbol

        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Lanes) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(symbol, Lanes, Lanes)
    def _lower(context, builder, signature, args):
        return getattr(builder, instruction)(*args, flags=_FLAGS)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


def _vector(scalar):
    return ir.VectorType(scalar, LANES)


def _every(builder, number):
    """Spread one number over all lanes."""
    undefined = ir.Constant(_vector(number.type), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_vector(_I32), None))


def _constant(scalar, number):
    return ir.Constant(_vector(scalar), [number] * LANES)


def computed_type(stored):
    """Choose what numbers of a stored type are computed with."""
    return types.float64 if stored == types.float64 else types.float32


def widen(builder, stored, value):
    """Convert stored lanes, or one stored number, to what they are computed with."""
    many = isinstance(value.type, ir.VectorType)
    kind = _vector if many else lambda scalar: scalar
    if stored == FLOAT16:
        return builder.fpext(builder.bitcast(value, kind(_HALF)), kind(_FLOAT))
    if stored == BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        sixteen = _constant(_I32, 16) if many else ir.Constant(_I32, 16)
        high = builder.shl(builder.zext(value, kind(_I32)), sixteen)
        return builder.bitcast(high, kind(_FLOAT))
    return value


def narrow(builder, stored, value):
    """Convert computed lanes, or one number, to a stored type: to the nearest, ties to even."""
    many = isinstance(value.type, ir.VectorType)
    kind = _vector if many else lambda scalar: scalar
    constant = _constant if many else ir.Constant
    if stored == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, kind(_HALF)), kind(_I16))
    if stored == BFLOAT16:
        bits = builder.bitcast(value, kind(_I32))
        odd = builder.and_(builder.lshr(bits, constant(_I32, 16)), constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, constant(_I32, 0x7FFF)))
        # Rounding could carry a NaN's payload away; setting its quiet bit keeps it one.
        quiet = builder.or_(bits, constant(_I32, 0x00400000))
        is_nan = builder.fcmp_unordered("uno", value, value)
        kept = builder.select(is_nan, quiet, rounded)
        if many:
            words = builder.bitcast(kept, ir.VectorType(_I16, 2 * LANES))
            upper = ir.Constant(_vector(_I32), list(range(1, 2 * LANES, 2)))
            return builder.shuffle_vector(words, words, upper)
        return builder.trunc(builder.lshr(kept, constant(_I32, 16)), kind(_I16))
    return value


def _lanes_at(context, builder, pointer_type, pointer, index):
    """Address of sixteen stored numbers, and their bytes each."""
    scalar = context.get_value_type(pointer_type.dtype)
    at = builder.gep(pointer, [index])
    return builder.bitcast(at, _vector(scalar).as_pointer()), pointer_type.dtype.bitwidth // 8


def _first_lanes(builder, count):
    """Which lanes are the first `count`."""
    steps = ir.Constant(_vector(_I32), list(range(LANES)))
    return builder.icmp_signed("<", steps, _every(builder, builder.trunc(count, _I32)))


def _lanes_between(builder, first, last):
    """Which lanes are from `first` on, and before `last`."""
    before = _first_lanes(builder, first)
    return builder.and_(builder.not_(before), _first_lanes(builder, last))


def _masked(builder, name, result, at, *rest):
    """Call LLVM's masked load or store."""
    scalar = at.type.pointee.element
    suffix = (
        f"i{scalar.width}"
        if isinstance(scalar, ir.IntType)
        else ("f32", "f64")[isinstance(scalar, ir.DoubleType)]
    )
    kind = ir.FunctionType(result, [value.type for value in rest])
    full = f"llvm.masked.{name}.v{LANES}{suffix}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, full), rest)


@intrinsic
def load(typing_context, pointer, index):
    """Sixteen numbers from ``pointer[index]`` on; Lanes stand for themselves."""
    if isinstance(pointer, Lanes):
        return pointer(pointer, types.intp), lambda context, builder, signature, args: args[0]

    def codegen(context, builder, signature, args):
        at, itemsize = _lanes_at(context, builder, signature.args[0], *args)
        return widen(builder, signature.args[0].dtype, builder.load(at, align=itemsize))

    return Lanes(computed_type(pointer.dtype))(pointer, types.intp), codegen


@intrinsic
def load_part(typing_context, pointer, index, first, last):
    """`load`, of which only lanes `first` to `last` are read; the others are 0."""
    if isinstance(pointer, Lanes):
        kind = pointer(pointer, types.intp, types.intp, types.intp)
        return kind, lambda context, builder, signature, args: args[0]

    def codegen(context, builder, signature, args):
        at, itemsize = _lanes_at(context, builder, signature.args[0], *args[:2])
        align, zeros = ir.Constant(_I32, itemsize), ir.Constant(at.type.pointee, None)
        kept = _lanes_between(builder, *args[2:])
        value = _masked(builder, "load", at.type.pointee, at, at, align, kept, zeros)
        return widen(builder, signature.args[0].dtype, value)

    result = Lanes(computed_type(pointer.dtype))
    return result(pointer, types.intp, types.intp, types.intp), codegen


@intrinsic
def transfer(typing_context, target, to, source, start):
    """Copy sixteen numbers as they are stored."""

    def codegen(context, builder, signature, args):
        at, itemsize = _lanes_at(context, builder, signature.args[2], *args[2:])
        into, _ = _lanes_at(context, builder, signature.args[0], *args[:2])
        builder.store(builder.load(at, align=itemsize), into, align=itemsize)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), codegen


@intrinsic
def transfer_first(typing_context, target, to, source, start, count):
    """Copy `count` numbers, at most sixteen, as they are stored."""

    def codegen(context, builder, signature, args):
        at, itemsize = _lanes_at(context, builder, signature.args[2], *args[2:4])
        into, _ = _lanes_at(context, builder, signature.args[0], *args[:2])
        align, zeros = ir.Constant(_I32, itemsize), ir.Constant(at.type.pointee, None)
        kept = _first_lanes(builder, args[4])
        value = _masked(builder, "load", at.type.pointee, at, at, align, kept, zeros)
        _masked(builder, "store", ir.VoidType(), at, value, into, align, kept)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp), codegen


def _hidden_zero(builder):
    """Give a 0 of sixteen bits of which LLVM does not know that it is 0."""
    kind = ir.FunctionType(_I64, [_I64])
    return builder.trunc(builder.asm(kind, "", "=r,0", [ir.Constant(_I64, 0)], False), _I16)


def _storing(streaming):
    @intrinsic
    def store(typing_context, pointer, index, lanes):
        def codegen(context, builder, signature, args):
            at, itemsize = _lanes_at(context, builder, signature.args[0], *args[:2])
            value = narrow(builder, signature.args[0].dtype, args[2])
            align = _line_bytes(signature.args[0]) if streaming else itemsize
            if streaming and signature.args[0].dtype in (FLOAT16, BFLOAT16):
                # LLVM loses the wish to stream halves, or what it chose from other vectors.
                value = builder.or_(value, _every(builder, _hidden_zero(builder)))
            instruction = builder.store(value, at, align=align)
            if streaming:
                one = builder.module.add_metadata([ir.Constant(_I32, 1)])
                instruction.set_metadata("nontemporal", one)
            return context.get_dummy_value()

        return types.void(pointer, types.intp, lanes), codegen

    return store


store = _storing(streaming=False)
# Past the caches, to an address that sixteen numbers, or a line, divide: a plain store would first
# read the line that it overwrites.
stream = _storing(streaming=True)


@intrinsic
def store_part(typing_context, pointer, index, lanes, first, last):
    """`store`, of which only lanes `first` to `last` are written.

    A line that is streamed to must not be touched, be it by lanes that are left out: that takes
    some 50 ns.
    """

    def codegen(context, builder, signature, args):
        at, itemsize = _lanes_at(context, builder, signature.args[0], *args[:2])
        value = narrow(builder, signature.args[0].dtype, args[2])
        align, kept = ir.Constant(_I32, itemsize), _lanes_between(builder, *args[3:])
        _masked(builder, "store", ir.VoidType(), at, value, at, align, kept)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, lanes, types.intp, types.intp), codegen


@intrinsic
def spread(typing_context, number):
    """Sixteen times the same number."""

    def codegen(context, builder, signature, args):
        return _every(builder, args[0])

    return Lanes(number)(number), codegen


@intrinsic
def wide(typing_context, lanes):
    """As float64."""

    def codegen(context, builder, signature, args):
        if signature.args[0].dtype == types.float64:
            return args[0]
        return builder.fpext(args[0], _vector(_DOUBLE))

    return Lanes(types.float64)(lanes), codegen


@intrinsic
def halves(typing_context, lanes, other):
    """Add the upper half of each to its lower half, and put both results side by side."""

    def codegen(context, builder, signature, args):
        low, high = (
            builder.shuffle_vector(
                *args, ir.Constant(_vector(_I32), [*range(k, k + 8), *range(k + 16, k + 24)])
            )
            for k in (0, LANES // 2)
        )
        return builder.fadd(low, high, flags=_FLAGS)

    return lanes(lanes, other), codegen


@intrinsic
def keep_first(typing_context, lanes, count):
    """Keep the first `count` lanes, and put 0 in the others."""

    def codegen(context, builder, signature, args):
        zeros = ir.Constant(args[0].type, None)
        return builder.select(_first_lanes(builder, args[1]), args[0], zeros)

    return lanes(lanes, types.intp), codegen


@intrinsic
def keep_finite(typing_context, lanes, other):
    """Take the lanes of `other` where those of `lanes` are infinite or not numbers."""

    def codegen(context, builder, signature, args):
        difference = builder.fsub(args[0], args[0])  # a number where the lane is finite
        finite = builder.fcmp_ordered("ord", difference, difference)
        return builder.select(finite, *args)

    return lanes(lanes, other), codegen


@intrinsic
def blend(typing_context, lanes, other, count):
    """Take the first `count` lanes of one, the rest of the other."""

    def codegen(context, builder, signature, args):
        return builder.select(_first_lanes(builder, args[2]), args[0], args[1])

    return lanes(lanes, other, types.intp), codegen


@intrinsic
def relu(typing_context, lanes):
    """``max(lanes, 0)``; NaN stays NaN."""

    def codegen(context, builder, signature, args):
        zeros = ir.Constant(args[0].type, None)
        return builder.select(builder.fcmp_ordered("<=", args[0], zeros), zeros, args[0])

    return lanes(lanes), codegen


@intrinsic
def passed(typing_context, lanes, pointer):
    """Give one bit for each lane, none below 0, that is not 0 as `pointer` stores it.

    What is at most half of the smallest number above 0 is rounded to 0.
    """
    half = {FLOAT16: 2.0**-25, BFLOAT16: 2.0**-134}.get(pointer.dtype, 0.0)

    def codegen(context, builder, signature, args):
        bits = builder.fcmp_unordered(">", args[0], _constant(args[0].type.element, half))
        return builder.zext(builder.bitcast(bits, _I16), _I64)

    return types.intp(lanes, pointer), codegen


@intrinsic
def keep_where(typing_context, lanes, bits):
    """Keep lanes whose bit is set, and put 0 in the others."""

    def codegen(context, builder, signature, args):
        kept = builder.bitcast(builder.trunc(args[1], _I16), _vector(_BOOL))
        return builder.select(kept, args[0], ir.Constant(args[0].type, None))

    return lanes(lanes, types.intp), codegen


# One number at a time.


@intrinsic
def computed(typing_context, pointer, index):
    """``pointer[index]`` as it is computed with."""

    def codegen(context, builder, signature, args):
        stored = builder.load(builder.gep(args[0], [args[1]]))
        return widen(builder, signature.args[0].dtype, stored)

    return computed_type(pointer.dtype)(pointer, types.intp), codegen


@intrinsic
def rounded(typing_context, number, pointer):
    """Round a float64 to what numbers of `pointer` are computed with."""
    result = computed_type(pointer.dtype)

    def codegen(context, builder, signature, args):
        return args[0] if result == types.float64 else builder.fptrunc(args[0], _FLOAT)

    return result(types.float64, pointer), codegen


@intrinsic
def nothing(typing_context, like):
    """Give a null pointer, as of an argument that is None."""

    def codegen(context, builder, signature, args):
        return ir.Constant(args[0].type, None)

    return like(like), codegen
