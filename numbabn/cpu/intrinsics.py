"""What numba cannot say by itself: 16-bit floats, and eight comparisons packed into one byte.

numba compiles no arrays of 16-bit floats. They come as the integers that hold their bits, float16
as uint16 and bfloat16 as int16, and are converted in registers.

A mask holds one bit per element, bit ``i`` of the flat index in bit ``i % 8`` of byte ``i // 8``.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

OCTET = 8  # elements per byte of a mask
_BYTE = ir.IntType(8)
_BITS = ir.VectorType(ir.IntType(1), OCTET)

_FLOAT16, _BFLOAT16 = types.uint16, types.int16
_STORED = (types.float32, types.float64, _FLOAT16, _BFLOAT16)


def _wide_type(stored):
    """Choose what numbers of a stored type are computed in."""
    return types.float64 if stored == types.float64 else types.float32


def _widen(builder, stored, value, lanes=0):
    """Convert a stored number, or a vector of ``lanes`` of them, to what it is computed in."""

    def kind(scalar):
        return ir.VectorType(scalar, lanes) if lanes else scalar

    if stored == _FLOAT16:
        return builder.fpext(builder.bitcast(value, kind(ir.HalfType())), kind(ir.FloatType()))
    if stored == _BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        bits = kind(ir.IntType(32))
        sixteen = ir.Constant(bits, [16] * lanes if lanes else 16)
        high = builder.shl(builder.zext(value, bits), sixteen)
        return builder.bitcast(high, kind(ir.FloatType()))
    return value


def _narrow(builder, stored, value):
    """Convert a computed number to a stored type, to the nearest, ties to even."""
    if stored == _FLOAT16:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
    if stored == _BFLOAT16:
        bits = builder.bitcast(value, ir.IntType(32))

        def constant(number):
            return ir.Constant(ir.IntType(32), number)

        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
        # Rounding could carry a NaN's payload away; setting its quiet bit keeps it one.
        quiet = builder.or_(bits, constant(0x00400000))
        is_nan = builder.fcmp_unordered("uno", value, value)
        kept = builder.select(is_nan, quiet, rounded)
        return builder.trunc(builder.lshr(kept, constant(16)), ir.IntType(16))
    return value


@intrinsic
def wide(typing_context, value):
    """Convert a stored number to what it is computed in: float32 for 16 bits, else itself."""
    if value not in _STORED:
        return None

    def codegen(context, builder, signature, args):
        return _widen(builder, signature.args[0], args[0])

    return _wide_type(value)(value), codegen


@intrinsic
def narrow(typing_context, value, row):
    """Convert a computed number to what ``row`` stores."""
    if not (isinstance(value, types.Float) and _is_row(row)):
        return None

    def codegen(context, builder, signature, args):
        return _narrow(builder, signature.args[1].dtype, args[0])

    return row.dtype(_wide_type(row.dtype), row), codegen


@intrinsic
def as_computed(typing_context, number, row):
    """Round a float64 to what numbers of ``row`` are computed in."""
    if not (isinstance(number, types.Float) and _is_row(row)):
        return None
    result = _wide_type(row.dtype)

    def codegen(context, builder, signature, args):
        if result == types.float64:
            return args[0]
        return builder.fptrunc(args[0], ir.FloatType())

    return result(types.float64, row), codegen


def _octet(context, builder, array_type, array, index):
    """Address of ``array[index : index + 8]`` as one vector, and the vector's type."""
    data = context.make_array(array_type)(context, builder, array).data
    element = context.get_value_type(array_type.dtype)
    vector = ir.VectorType(element, OCTET)
    address = builder.gep(data, [index])
    return builder.bitcast(address, vector.as_pointer()), vector


def _is_row(array, dtypes=_STORED):
    return isinstance(array, types.Array) and array.ndim == 1 and array.dtype in dtypes


@intrinsic
def positive_bits(typing_context, y, index):
    """Eight bits of ``not y[index + k] <= 0``: NaN counts as passed, as in ``max(z, 0)``."""
    if not (_is_row(y) and isinstance(index, types.Integer)):
        return None

    def codegen(context, builder, signature, args):
        address, _ = _octet(context, builder, signature.args[0], *args)
        stored = signature.args[0].dtype
        values = _widen(builder, stored, builder.load(address, align=1), OCTET)
        zero = ir.Constant(values.type, None)
        return builder.bitcast(builder.fcmp_unordered(">", values, zero), _BYTE)

    return types.uint8(y, types.intp), codegen


@intrinsic
def keep_where(typing_context, dy, bits, out, index):
    """``out[index + k] = dy[index + k]`` where bit ``k`` of ``bits`` is set, else 0."""
    if not (_is_row(dy) and _is_row(out) and isinstance(index, types.Integer)):
        return None

    def codegen(context, builder, signature, args):
        dy_array, byte, out_array, at = args
        source, vector = _octet(context, builder, signature.args[0], dy_array, at)
        target, _ = _octet(context, builder, signature.args[2], out_array, at)
        passed = builder.bitcast(byte, _BITS)
        kept = builder.select(passed, builder.load(source, align=1), ir.Constant(vector, None))
        builder.store(kept, target, align=1)
        return context.get_dummy_value()

    return types.void(dy, types.uint8, out, types.intp), codegen


@intrinsic
def or_byte(typing_context, mask, index, bits):
    """``mask[index] |= bits`` as one atomic step: the byte may belong to two threads' rows."""
    if not (_is_row(mask, (types.uint8,)) and isinstance(index, types.Integer)):
        return None

    def codegen(context, builder, signature, args):
        array, at, byte = args
        data = context.make_array(signature.args[0])(context, builder, array).data
        builder.atomic_rmw("or", builder.gep(data, [at]), byte, "monotonic")
        return context.get_dummy_value()

    return types.void(mask, types.intp, types.uint8), codegen
