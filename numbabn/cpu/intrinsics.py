"""What numba cannot say by itself: eight comparisons packed into one byte, and back.

A mask holds one bit per element, bit ``i`` of the flat index in bit ``i % 8`` of byte ``i // 8``.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

OCTET = 8  # elements per byte of a mask
_BYTE = ir.IntType(8)
_BITS = ir.VectorType(ir.IntType(1), OCTET)


def _octet(context, builder, array_type, array, index):
    """Address of ``array[index : index + 8]`` as one vector, and the vector's type."""
    data = context.make_array(array_type)(context, builder, array).data
    element = context.get_value_type(array_type.dtype)
    vector = ir.VectorType(element, OCTET)
    address = builder.gep(data, [index])
    return builder.bitcast(address, vector.as_pointer()), vector


def _is_row(array, dtype=types.Float):
    return isinstance(array, types.Array) and array.ndim == 1 and isinstance(array.dtype, dtype)


@intrinsic
def positive_bits(typing_context, y, index):
    """Eight bits of ``not y[index + k] <= 0``: NaN counts as passed, as in ``max(z, 0)``."""
    if not (_is_row(y) and isinstance(index, types.Integer)):
        return None

    def codegen(context, builder, signature, args):
        address, vector = _octet(context, builder, signature.args[0], *args)
        values = builder.load(address, align=1)
        zero = ir.Constant(vector, None)
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
    if not (_is_row(mask, types.Integer) and isinstance(index, types.Integer)):
        return None

    def codegen(context, builder, signature, args):
        array, at, byte = args
        data = context.make_array(signature.args[0])(context, builder, array).data
        builder.atomic_rmw("or", builder.gep(data, [at]), byte, "monotonic")
        return context.get_dummy_value()

    return types.void(mask, types.intp, types.uint8), codegen
