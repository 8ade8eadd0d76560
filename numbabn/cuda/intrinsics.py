"""What a kernel cannot say in Python: 16 bytes of memory at a time, and what warps and grids share.

Numbers are loaded as `Lanes`: as many as one access moves, and, whatever memory stores, as they are
computed with. `simulator` has a twin of everything here under the same name.
"""

import operator

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.cudadecl import registry as declarations
from numba.cuda.cudaimpl import registry as implementations
from numba.cuda.extending import intrinsic, models, register_model
from numba.cuda.typing.templates import AbstractTemplate, signature

from .formats import ACCESS, CONSTANTS, CREWS, FORMATS, STAGE, THREADS

_BOOL, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_HALF, _FLOAT, _DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_IR = {types.float32: _FLOAT, types.float64: _DOUBLE}
_COMPUTED = {"float32": types.float32, "float64": types.float64}
_SHARED = 3  # address space of NVVM
# What one instruction moves, by its bytes: suffix, a register that takes it, and its letter.
_ACCESS = {
    16: ("v4.b32", _I32, "r"), 8: ("b64", _I64, "l"), 4: ("b32", _I32, "r"), 2: ("b16", _I16, "h")
}  # fmt: skip
# Every operation has the same flags wherever it stands, so that the same numbers round alike.
_FLAGS = ("contract", "nsz")


class Global(types.Type):
    """An address in global memory, whose numbers are moved `width` at a time."""

    def __init__(self, format_name: str, width: int) -> None:
        self.format = FORMATS[format_name]
        self.width = width
        self.computed = _COMPUTED[self.format.computed]
        super().__init__(name=f"Global({format_name}, {width})")


class Lanes(types.Type):
    """Numbers in registers, all of one vector."""

    def __init__(self, dtype, width: int) -> None:
        self.dtype = dtype
        self.width = width
        super().__init__(name=f"Lanes({dtype}, {width})")


class Packed(types.Type):
    """Numbers in registers as they are stored."""

    def __init__(self, x: Global) -> None:
        self.stored = x
        super().__init__(name=f"Packed({x})")


class Shared(types.Type):
    """An address in a block's shared memory, of float64."""

    def __init__(self) -> None:
        super().__init__(name="Shared")


class Slots(types.Type):
    """The shared memory in which a block's threads hold what they have loaded, each its own."""

    def __init__(self, there: bool) -> None:
        self.there = there
        super().__init__(name=f"Slots({there})")


def _vector(kind):
    return ir.VectorType(_IR[kind.dtype], kind.width)


def _raw(kind):
    """Give the type of the bits that one access moves."""
    _, register, _ = _access(kind)
    return ir.VectorType(register, 4) if _is_vector(kind) else register


@register_model(Global)
class _GlobalModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _I64)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _vector(kind))


@register_model(Packed)
class _PackedModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _raw(kind.stored))


@register_model(Slots)
class _SlotsModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.IntType(8).as_pointer(_SHARED))


@register_model(Shared)
class _SharedModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _DOUBLE.as_pointer(_SHARED))


def _lanes(kind):
    """Give the type of what is loaded from a `Global`."""
    return Lanes(kind.computed, kind.width)


def _same(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def _spread(builder, value, kind):
    """Put a number into every lane."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, _same(ir.VectorType(_I32, kind.count), 0))


def _part(builder, value, start, count):
    """Give some lanes of a vector."""
    chosen = ir.Constant(ir.VectorType(_I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), chosen)


def _asm(builder, result, kinds, text, constraints, args, attributes=()):
    kind = ir.FunctionType(result, kinds)
    assembly = ir.InlineAsm(kind, text, constraints, side_effect=True)
    return builder.call(assembly, args, attrs=attributes)


# Arithmetic of lanes, with lanes or with one number for all of them.

_OPERATIONS = {
    operator.add: "fadd",
    operator.sub: "fsub",
    operator.mul: "fmul",
    operator.truediv: "fdiv",
}


def _arithmetic(operation, name):
    @declarations.register_global(operation)
    class _Typing(AbstractTemplate):
        key = operation

        def generic(self, args, kws):
            a, b = args
            kind = a if isinstance(a, Lanes) else b
            if isinstance(kind, Lanes) and a in (kind, kind.dtype) and b in (kind, kind.dtype):
                return signature(kind, a, b)
            return None

    def lower(context, builder, signature, args):
        kind = _vector(signature.return_type)
        a, b = (v if v.type == kind else _spread(builder, v, kind) for v in args)
        return getattr(builder, name)(a, b, flags=_FLAGS)

    for pair in ((Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        implementations.lower(operation, *pair)(lower)


for _operation, _name in _OPERATIONS.items():
    _arithmetic(_operation, _name)


@intrinsic
def width(typing_context, x):
    """How many numbers one access moves, or how many lanes there are."""

    def codegen(context, builder, signature, args):
        return _I64(x.width)

    return types.int64(x), codegen


@intrinsic
def is_wide(typing_context, x):
    """Whether x is computed in float64."""

    def codegen(context, builder, signature, args):
        return _BOOL(x.computed == types.float64)

    return types.boolean(x), codegen


@intrinsic
def present(typing_context, x):
    """Whether there is such an array."""

    def codegen(context, builder, signature, args):
        return builder.icmp_unsigned("!=", args[0], _I64(0))

    return types.boolean(x), codegen


@intrinsic
def as_computed(typing_context, x, value):
    """Convert a number to the type in which x is computed."""

    def codegen(context, builder, signature, args):
        return context.cast(builder, args[1], value, x.computed)

    return x.computed(x, value), codegen


@intrinsic
def zeros(typing_context, x):
    """Lanes of zeros, as x is computed."""

    def codegen(context, builder, signature, args):
        return _same(_vector(_lanes(x)), 0.0)

    return _lanes(x)(x), codegen


@intrinsic
def wide(typing_context, lanes):
    """Convert lanes to float64."""
    result = Lanes(types.float64, lanes.width)

    def codegen(context, builder, signature, args):
        return args[0] if lanes == result else builder.fpext(args[0], _vector(result))

    return result(lanes), codegen


@intrinsic
def narrow(typing_context, x, lanes):
    """Round lanes of float64 to the type in which x is computed."""
    result = Lanes(x.computed, lanes.width)

    def codegen(context, builder, signature, args):
        value = args[1]
        if lanes == result:
            return value
        # Inline assembly, because NVVM moves a conversion into the loop that uses its result.
        rounded = ir.Constant(_vector(result), ir.Undefined)
        for k in range(x.width):
            number = builder.extract_element(value, _I32(k))
            number = _asm(builder, _FLOAT, [_DOUBLE], "cvt.rn.f32.f64 $0, $1;", "=f,d", [number])
            rounded = builder.insert_element(rounded, number, _I32(k))
        return rounded

    return result(x, lanes), codegen


@intrinsic
def total(typing_context, lanes):
    """Sum of all lanes: halves are added until one number is left."""

    def codegen(context, builder, signature, args):
        value = args[0]
        while value.type.count > 1:
            half = value.type.count // 2
            low, high = _part(builder, value, 0, half), _part(builder, value, half, half)
            value = builder.fadd(low, high, flags=_FLAGS)
        return builder.extract_element(value, _I32(0))

    return lanes.dtype(lanes), codegen


@intrinsic
def finite_or_zero(typing_context, lanes):
    """0 in place of what is infinite or not a number."""

    def codegen(context, builder, signature, args):
        value = args[0]
        zero = _same(value.type, 0.0)
        finite = builder.fcmp_ordered("==", builder.fmul(value, zero), zero)
        return builder.select(finite, value, zero)

    return lanes(lanes), codegen


@intrinsic
def median(typing_context, a, b, c):
    """Give the middle one of three in each lane."""

    def codegen(context, builder, signature, args):
        a, b, c = args
        ordered = builder.fcmp_ordered("<", a, b)
        low, high = builder.select(ordered, a, b), builder.select(ordered, b, a)
        high = builder.select(builder.fcmp_ordered("<", high, c), high, c)
        return builder.select(builder.fcmp_ordered("<", low, high), high, low)

    return a(a, b, c), codegen


@intrinsic
def spread(typing_context, x, value):
    """Put a float64 into as many lanes as x has."""
    result = Lanes(types.float64, x.width)

    def codegen(context, builder, signature, args):
        return _spread(builder, args[1], _vector(result))

    return result(x, types.float64), codegen


@intrinsic
def relu(typing_context, lanes):
    """``max(lanes, 0)``; NaN stays NaN."""

    def codegen(context, builder, signature, args):
        zero = _same(args[0].type, 0.0)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[0])

    return lanes(lanes), codegen


@intrinsic
def keep_where(typing_context, bits, lanes):
    """0 in the lanes whose bit is not set."""

    def codegen(context, builder, signature, args):
        bits, value = args
        powers = ir.Constant(ir.VectorType(_I32, lanes.width), [1 << k for k in range(lanes.width)])
        spread = _spread(builder, bits, powers.type)
        unset = builder.icmp_unsigned("==", builder.and_(spread, powers), _same(powers.type, 0))
        return builder.select(unset, _same(value.type, 0.0), value)

    return lanes(types.int32, lanes), codegen


@intrinsic
def anew(typing_context, value):
    """Give an integer of which LLVM knows nothing: what follows from it stays where it is used."""

    def codegen(context, builder, signature, args):
        return _asm(builder, _I64, [_I64], "mov.b64 $0, $1;", "=l,l", args)

    return types.int64(types.int64), codegen


@intrinsic
def apart(typing_context):
    """Keep what a branch does from being done in any case and then, mostly, thrown away."""

    def codegen(context, builder, signature, args):
        _asm(builder, ir.VoidType(), [], "", "", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def small(typing_context, value):
    """Give an integer of which LLVM knows that it is not negative and has 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.trunc(args[0], _I32), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def less(typing_context, a, b):
    """Whether ``a < b``, of integers that are not negative and have 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.icmp_unsigned("<", *(builder.trunc(each, _I32) for each in args))

    return types.boolean(types.int64, types.int64), codegen


@intrinsic
def quotient(typing_context, a, b):
    """Divide numbers that are not negative: ``a // b``."""

    def codegen(context, builder, signature, args):
        return builder.udiv(*args)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def reciprocal(typing_context, value):
    """``1 / value``, of normal float32 in one instruction and to a unit in the last place."""

    def codegen(context, builder, signature, args):
        if value == types.float64:
            return builder.fdiv(_DOUBLE(1.0), args[0])
        kind = ir.FunctionType(_FLOAT, [_FLOAT])
        return builder.asm(kind, "rcp.approx.ftz.f32 $0, $1;", "=f,f", args, side_effect=False)

    return value(value), codegen


@intrinsic
def square_root(typing_context, value):
    """Square root of a float64."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_DOUBLE, [_DOUBLE])
        return builder.asm(kind, "sqrt.rn.f64 $0, $1;", "=d,d", args, side_effect=False)

    return types.float64(types.float64), codegen


# Memory. Inline assembly, because LLVM splits a vector of 16-bit numbers that is taken apart.


def _address(builder, kind, at, index):
    shift = kind.format.itemsize.bit_length() - 1
    return builder.add(at, builder.shl(index, _I64(shift)))


def _access(kind):
    """Give the suffix of what one instruction moves, a register's type, and its letter."""
    return _ACCESS[kind.width * kind.format.itemsize]


def _is_vector(kind):
    """Whether it takes four registers."""
    return kind.width * kind.format.itemsize == ACCESS


def _load_raw(builder, kind, address, policy):
    """Load the bits of some numbers with one instruction: an integer, or a vector of four."""
    suffix, register, letter = _access(kind)
    load = f"ld.global.L1::no_allocate.L2::cache_hint.{suffix}"
    kinds, values = [_I64, _I64], [address, policy]
    if not _is_vector(kind):
        return _asm(builder, register, kinds, f"{load} $0, [$1], $2;", f"={letter},l,l", values)
    result = ir.LiteralStructType([register] * 4)
    text = f"{load} {{$0, $1, $2, $3}}, [$4], $5;"
    words = _asm(builder, result, kinds, text, "=r,=r,=r,=r,l,l", values)
    raw = ir.Constant(ir.VectorType(register, 4), ir.Undefined)
    for k in range(4):
        raw = builder.insert_element(raw, builder.extract_value(words, k), _I32(k))
    return raw


def _store_raw(builder, kind, address, raw, policy):
    suffix, register, letter = _access(kind)
    store = f"st.global.L2::cache_hint.{suffix}"
    if _is_vector(kind):
        text, constraints = f"{store} [$0], {{$1, $2, $3, $4}}, $5;", "l,r,r,r,r,l"
        words = [builder.extract_element(raw, _I32(k)) for k in range(4)]
    else:
        text, constraints, words = f"{store} [$0], $1, $2;", f"l,{letter},l", [raw]
    kinds = [_I64, *[register] * len(words), _I64]
    _asm(builder, ir.VoidType(), kinds, text, constraints, [address, *words, policy])


def _widened(builder, kind, raw):
    """From the bits of stored numbers to numbers that are computed with."""
    count = kind.width
    result = ir.VectorType(_IR[kind.computed], count)
    if kind.format.itemsize > 2:
        return builder.bitcast(raw, result)
    bits = builder.bitcast(raw, ir.VectorType(_I16, count))
    if kind.format.name == "float16":
        return builder.fpext(builder.bitcast(bits, ir.VectorType(_HALF, count)), result)
    words = builder.zext(bits, ir.VectorType(_I32, count))
    return builder.bitcast(builder.shl(words, _same(words.type, 16)), result)


def _rounded(builder, kind, value):
    """From numbers that were computed to the bits that are stored, to nearest even."""
    count = kind.width
    raw_type = _raw(kind)
    if kind.format.itemsize > 2:
        return builder.bitcast(value, raw_type)
    ptx = {"float16": "f16", "bfloat16": "bf16"}[kind.format.name]
    if count == 1:
        kind = ir.FunctionType(_I16, [_FLOAT])
        number = builder.extract_element(value, _I32(0))
        return builder.asm(kind, f"cvt.rn.{ptx}.f32 $0, $1;", "=h,f", [number], side_effect=False)
    kind = ir.FunctionType(_I32, [_FLOAT, _FLOAT])
    words = ir.Constant(ir.VectorType(_I32, count // 2), ir.Undefined)
    for k in range(count // 2):
        low, high = (builder.extract_element(value, _I32(2 * k + i)) for i in (0, 1))
        word = builder.asm(
            kind, f"cvt.rn.{ptx}x2.f32 $0, $1, $2;", "=r,f,f", [high, low], side_effect=False
        )
        words = builder.insert_element(words, word, _I32(k))
    return builder.bitcast(words, raw_type)


def _policy(name):
    @intrinsic
    def policy(typing_context):
        """Say what the L2 cache is to do with a line."""

        def codegen(context, builder, signature, args):
            text = f"createpolicy.fractional.L2::{name}.b64 $0, 1.0;"
            return _asm(builder, _I64, [], text, "=l", [])

        return types.int64(), codegen

    return policy


# Of what is not read again, and of all else.
passing, lasting = _policy("evict_first"), _policy("evict_normal")


@intrinsic
def load(typing_context, x, index, policy):
    """Load numbers of x from an index on."""

    def codegen(context, builder, signature, args):
        return _load_raw(builder, x, _address(builder, x, *args[:2]), args[2])

    return Packed(x)(x, types.int64, types.int64), codegen


@intrinsic
def nothing(typing_context, x):
    """Zeros in place of what `load` gives."""

    def codegen(context, builder, signature, args):
        return ir.Constant(_raw(x), None)

    return Packed(x)(x), codegen


@intrinsic
def unpack(typing_context, packed):
    """Convert what was loaded to what is computed with."""
    x = packed.stored

    def codegen(context, builder, signature, args):
        return _widened(builder, x, args[0])

    return _lanes(x)(packed), codegen


@intrinsic
def store(typing_context, y, index, lanes, policy):
    """Write numbers of y from an index on."""

    def codegen(context, builder, signature, args):
        raw = _rounded(builder, y, args[2])
        _store_raw(builder, y, _address(builder, y, *args[:2]), raw, args[3])
        return context.get_dummy_value()

    return types.void(y, types.int64, lanes, types.int64), codegen


@intrinsic
def passed(typing_context, y, lanes):
    """Bits that say which lanes are not ``<= 0`` once they are stored in y."""

    def codegen(context, builder, signature, args):
        value = args[1]
        if y.format.itemsize == 2:
            value = _widened(builder, y, _rounded(builder, y, value))
        through = builder.fcmp_unordered(">", value, _same(value.type, 0.0))
        bits = _I32(0)
        for k in range(lanes.width):
            bit = builder.zext(builder.extract_element(through, _I32(k)), _I32)
            bits = builder.or_(bits, builder.shl(bit, _I32(k)))
        return bits

    return types.int32(y, lanes), codegen


@intrinsic
def get(typing_context, x, index):
    """Read one number of x."""
    one = Global(x.format.name, 1)

    def codegen(context, builder, signature, args):
        suffix, register, letter = _access(one)
        text, address = f"ld.global.{suffix} $0, [$1];", _address(builder, x, *args)
        raw = _asm(builder, register, [_I64], text, f"={letter},l", [address])
        return builder.extract_element(_widened(builder, one, raw), _I32(0))

    return x.computed(x, types.int64), codegen


@intrinsic
def put(typing_context, y, index, value):
    """Write one number of y."""
    one = Global(y.format.name, 1)

    def codegen(context, builder, signature, args):
        value = _spread(builder, args[2], ir.VectorType(_IR[y.computed], 1))
        raw, address = _rounded(builder, one, value), _address(builder, y, *args[:2])
        suffix, register, letter = _access(one)
        text, kinds = f"st.global.{suffix} [$0], $1;", [_I64, register]
        _asm(builder, ir.VoidType(), kinds, text, f"l,{letter}", [address, raw])
        return context.get_dummy_value()

    return types.void(y, types.int64, y.computed), codegen


# Four neighbours of a caller's own array, of any numbers: see `device`.


def _four(context, builder, array, value, index):
    """Give where four numbers of an array lie, as a pointer to a vector, and their bytes."""
    number = context.get_data_type(array.dtype)
    nbytes = 4 * context.get_abi_sizeof(number)
    data = context.make_array(array)(context, builder, value).data
    first = builder.gep(data, [index], source_etype=number)
    kind = ir.VectorType(number, 4)
    return builder.bitcast(first, kind.as_pointer()), kind, nbytes


def _is_row(array):
    """Whether neighbours of an array are neighbours in memory."""
    return isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C"


@intrinsic
def is_aligned(typing_context, x, index):
    """Whether one access can move four numbers of x from an index on."""

    def codegen(context, builder, signature, args):
        address, _, nbytes = _four(context, builder, x, *args)
        address = builder.ptrtoint(address, _I64)
        return builder.icmp_unsigned("==", builder.and_(address, _I64(nbytes - 1)), _I64(0))

    return (types.boolean(x, types.int64), codegen) if _is_row(x) else None


@intrinsic
def get_four(typing_context, x, index):
    """Load four numbers of x by one access."""

    def codegen(context, builder, signature, args):
        address, kind, nbytes = _four(context, builder, x, *args)
        value = builder.load(address, align=nbytes, typ=kind)
        numbers = [builder.extract_element(value, _I32(k)) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, numbers)

    return (types.UniTuple(x.dtype, 4)(x, types.int64), codegen) if _is_row(x) else None


@intrinsic
def put_four(typing_context, y, index, numbers):
    """Store four numbers of y by one access."""

    def codegen(context, builder, signature, args):
        address, kind, nbytes = _four(context, builder, y, *args[:2])
        value = ir.Constant(kind, ir.Undefined)
        for k in range(4):
            number = builder.extract_value(args[2], k)
            value = builder.insert_element(value, number, _I32(k))
        builder.store(value, address, align=nbytes)
        return context.get_dummy_value()

    four = types.UniTuple(y.dtype, 4) if _is_row(y) else None
    return four and (types.void(y, types.int64, four), codegen)


def _at(format_name):
    @intrinsic
    def numbers_at(typing_context, address):
        """Numbers of this format from an address on."""

        def codegen(context, builder, signature, args):
            return args[0]

        return Global(format_name, 1)(types.int64), codegen

    return numbers_at


float16_at, bfloat16_at, float32_at, float64_at = map(_at, FORMATS)


@intrinsic
def every_bit(typing_context):
    """Bits that are all set."""

    def codegen(context, builder, signature, args):
        return _I32(-1)

    return types.int32(), codegen


@intrinsic
def get_bits(typing_context, mask, bit):
    """Read the bits of a mask from one on to the end of its byte."""

    def codegen(context, builder, signature, args):
        mask, bit = args
        address = builder.add(mask, builder.ashr(bit, _I64(3)))
        byte = _asm(builder, _I32, [_I64], "ld.global.u8 $0, [$1];", "=r,l", [address])
        shift = builder.trunc(builder.and_(bit, _I64(7)), _I32)
        return builder.lshr(byte, shift)

    return types.int32(mask, types.int64), codegen


@intrinsic
def gathered(typing_context, y, bits):
    """Put together the 32 bits of neighbouring threads that hold one word, as many each as y has.

    All threads of a warp must take part.
    """

    def codegen(context, builder, signature, args):
        lane = _asm(builder, _I32, [], "mov.u32 $0, %laneid;", "=r", [])
        shift = builder.and_(builder.mul(lane, _I32(y.width)), _I32(31))
        word = builder.shl(args[1], shift)
        distance = 1
        while distance * y.width < 32:
            text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
            # Convergent: LLVM must not give each branch a copy, as all threads take part in one.
            other = _asm(builder, _I32, [_I32], text, "=r,r", [word], ("convergent",))
            word = builder.or_(word, other)
            distance *= 2
        return word

    return types.int32(y, types.int32), codegen


@intrinsic
def put_word(typing_context, mask, bit, bits):
    """Write 32 bits of a mask, from a bit on that begins a word."""

    def codegen(context, builder, signature, args):
        mask, bit, bits = args
        address = builder.add(mask, builder.ashr(bit, _I64(3)))
        text = "st.global.b32 [$0], $1;"
        _asm(builder, ir.VoidType(), [_I64, _I32], text, "l,r", [address, bits])
        return context.get_dummy_value()

    return types.void(mask, types.int64, types.int32), codegen


@intrinsic
def or_bits(typing_context, mask, bit, bits):
    """Set bits of a mask, none of them beyond the word of the first."""

    def codegen(context, builder, signature, args):
        mask, bit, bits = args
        word = builder.shl(builder.ashr(bit, _I64(5)), _I64(2))
        shift = builder.trunc(builder.and_(bit, _I64(31)), _I32)
        text = "red.relaxed.gpu.global.or.b32 [$0], $1;"
        operands = [builder.add(mask, word), builder.shl(bits, shift)]
        _asm(builder, ir.VoidType(), [_I64, _I32], text, "l,r", operands)
        return context.get_dummy_value()

    return types.void(mask, types.int64, types.int32), codegen


@intrinsic
def arrive(typing_context, counters, index, last):
    """Count a block's arrival; give how many came before. The counter starts anew after `last`."""

    def codegen(context, builder, signature, args):
        address = builder.add(args[0], builder.shl(args[1], _I64(2)))
        old = _asm(
            builder, _I32, [_I64, _I32],
            "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;", "=r,l,r",
            [address, builder.trunc(args[2], _I32)],
        )  # fmt: skip
        return builder.zext(old, _I64)

    return types.int64(counters, types.int64, types.int64), codegen


@intrinsic
def awaited(typing_context, counters, index):
    """Whether a block has yet to arrive; once none has, what they wrote before is seen."""

    def codegen(context, builder, signature, args):
        address = builder.add(args[0], builder.shl(args[1], _I64(2)))
        text = "ld.acquire.gpu.global.u32 $0, [$1];"
        count = _asm(builder, _I32, [_I64], text, "=r,l", [address])
        return builder.icmp_unsigned("!=", count, _I32(0))

    return types.boolean(counters, types.int64), codegen


@intrinsic
def pause(typing_context):
    """Leave the multiprocessor to others for a moment."""

    def codegen(context, builder, signature, args):
        _asm(builder, ir.VoidType(), [], "nanosleep.u32 32;", "", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typing_context, address):
    """Fetch what lies at an address, which need not be waited for."""

    def codegen(context, builder, signature, args):
        _asm(builder, ir.VoidType(), [_I64], "prefetch.global.L1 [$0];", "l", args)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# What a block shares.


def _shared(count):
    @intrinsic
    def shared(typing_context):
        """Shared memory for as many numbers of float64."""

        def codegen(context, builder, signature, args):
            kind = ir.ArrayType(_DOUBLE, count)
            name = builder.module.get_unique_name("shared")
            memory = ir.GlobalVariable(builder.module, kind, name, addrspace=_SHARED)
            memory.linkage = "internal"
            memory.align = ACCESS
            memory.initializer = ir.Constant(kind, ir.Undefined)
            return builder.bitcast(memory, _DOUBLE.as_pointer(_SHARED))

        return Shared()(), codegen

    return shared


shared_sums = _shared(THREADS)
shared_lanes = _shared(STAGE)
shared_constants = _shared(CREWS * CONSTANTS)


@intrinsic
def slots(typing_context):
    """Give the shared memory that a launch has asked for."""

    def codegen(context, builder, signature, args):
        kind = ir.ArrayType(ir.IntType(8), 0)
        memory = ir.GlobalVariable(builder.module, kind, "slots", addrspace=_SHARED)
        memory.linkage = "external"
        memory.align = ACCESS
        return builder.bitcast(memory, ir.IntType(8).as_pointer(_SHARED))

    return Slots(True)(), codegen


@intrinsic
def no_slots(typing_context):
    """Give none: what was loaded is loaded again."""

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(8).as_pointer(_SHARED), ir.Undefined)

    return Slots(False)(), codegen


@intrinsic
def holds(typing_context, slots):
    """Whether what was loaded is kept."""

    def codegen(context, builder, signature, args):
        return _BOOL(slots.there)

    return types.boolean(slots), codegen


def _slot(builder, kind, memory, index):
    """Where a thread keeps an access: beside its neighbours', so that no bank has two."""
    nbytes = kind.width * kind.format.itemsize
    side = _asm(builder, _I32, [], "mov.u32 $0, %tid.x;", "=r", [])
    at = builder.add(builder.mul(builder.trunc(index, _I32), _I32(THREADS)), side)
    at = builder.mul(at, _I32(nbytes))
    slot = builder.gep(memory, [at], source_etype=ir.IntType(8))
    return builder.bitcast(slot, _raw(kind).as_pointer(_SHARED)), nbytes


@intrinsic
def keep(typing_context, slots, index, packed):
    """Put what was loaded into a slot of the thread's own."""
    x = packed.stored

    def codegen(context, builder, signature, args):
        memory, index, raw = args
        if slots.there:
            slot, nbytes = _slot(builder, x, memory, index)
            builder.store(raw, slot, align=nbytes)
        return context.get_dummy_value()

    return types.void(slots, types.int64, packed), codegen


@intrinsic
def kept(typing_context, slots, index, x):
    """Give what a slot holds."""

    def codegen(context, builder, signature, args):
        if not slots.there:
            return ir.Constant(_raw(x), ir.Undefined)
        slot, nbytes = _slot(builder, x, *args[:2])
        return builder.load(slot, align=nbytes, typ=_raw(x))

    return Packed(x)(slots, types.int64, x), codegen


@intrinsic
def read(typing_context, memory, index):
    """Read a number of shared memory."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(args[0], [args[1]], source_etype=_DOUBLE), typ=_DOUBLE)

    return types.float64(memory, types.int64), codegen


@intrinsic
def write(typing_context, memory, index, value):
    """Write a number of shared memory."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], builder.gep(args[0], [args[1]], source_etype=_DOUBLE))
        return context.get_dummy_value()

    return types.void(memory, types.int64, types.float64), codegen


@intrinsic
def read_lanes(typing_context, x, memory, index, between, left):
    """Read lanes of float64, as many as x has: `between` apart, and one more from `left` on."""
    result = Lanes(types.float64, x.width)

    def codegen(context, builder, signature, args):
        _, memory, index, between, left = args
        value = ir.Constant(_vector(result), ir.Undefined)
        for k in range(x.width):
            further = builder.zext(builder.icmp_signed("<=", left, _I64(k)), _I64)
            at = builder.gep(memory, [builder.add(index, further)], source_etype=_DOUBLE)
            value = builder.insert_element(value, builder.load(at, typ=_DOUBLE), _I32(k))
            index = builder.add(index, between)
        return value

    return result(x, memory, types.int64, types.int64, types.int64), codegen


@intrinsic
def write_lanes(typing_context, memory, index, step, lanes):
    """Write lanes of float64, `step` numbers apart."""

    def codegen(context, builder, signature, args):
        memory, index, step, value = args
        for k in range(lanes.width):
            at = builder.gep(memory, [index], source_etype=_DOUBLE)
            builder.store(builder.extract_element(value, _I32(k)), at)
            index = builder.add(index, step)
        return context.get_dummy_value()

    return types.void(memory, types.int64, types.int64, lanes), codegen


def device(function):
    """Compile a function that kernels call."""
    return cuda.jit(function, device=True, forceinline=True)


@intrinsic
def thread(typing_context):
    """Which thread of its block this is.

    Read anew at each use: what follows from it would otherwise be kept in registers throughout.
    """

    def codegen(context, builder, signature, args):
        return builder.zext(_asm(builder, _I32, [], "mov.u32 $0, %tid.x;", "=r", []), _I64)

    return types.int64(), codegen


@device
def block():
    """Which block of the grid this is."""
    return types.int64(cuda.blockIdx.x)


@device
def threads():
    """Threads of a block."""
    return types.int64(cuda.blockDim.x)


@device
def blocks():
    """Blocks of the grid."""
    return types.int64(cuda.gridDim.x)


@device
def barrier():
    """Wait for the block's other threads."""
    cuda.syncthreads()


@device
def any_of(flag):
    """Whether the flag of any thread of the block is set; waits as `barrier` does."""
    return cuda.syncthreads_or(types.int32(flag)) != 0


@device
def from_neighbour(value, distance):
    """Give the value of the thread whose number within the warp differs in these bits."""
    return cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)
