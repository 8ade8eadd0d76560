"""Memory and kernels by their addresses, which are integers, where there are no arrays."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from ..cpu.arguments import Strided, numbers
from ..cpu.compilation import Kernel

# Views look alike whatever they point to; the kernel at an address knows.
ANY = types.float32
_strided = Strided(ANY)


@intrinsic
def view(typing_context, address, dn, dc, ds):
    """Give the `Strided` at an address; steps count elements."""

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(_strided)(context, builder)
        struct.data = builder.inttoptr(args[0], struct.data.type)
        struct.dn, struct.dc, struct.ds = args[1:]
        return struct._getvalue()

    return _strided(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def channel_numbers(typing_context, address, step, type_number):
    """Give the `Numbers` at an address."""

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(numbers)(context, builder)
        struct.data = builder.inttoptr(args[0], struct.data.type)
        struct.step = args[1]
        struct.dtype = builder.trunc(args[2], struct.dtype.type)
        return struct._getvalue()

    return numbers(types.int64, types.int64, types.int64), codegen


def _parts(kind):
    return len(kind) if isinstance(kind, ir.LiteralStructType | ir.ArrayType) else 0


def _leaves(builder, value):
    """Give the numbers and pointers that a tuple of tuples consists of."""
    if not _parts(value.type):
        yield value
    for i in range(_parts(value.type)):
        yield from _leaves(builder, builder.extract_value(value, i))


def _filled(builder, kind, leaves):
    """Make a tuple of tuples of another type from the same numbers and pointers."""
    if not _parts(kind):
        leaf = next(leaves)
        return builder.bitcast(leaf, kind) if isinstance(kind, ir.PointerType) else leaf
    value = ir.Constant(kind, ir.Undefined)
    for i in range(_parts(kind)):
        part = kind.element if isinstance(kind, ir.ArrayType) else kind.elements[i]
        value = builder.insert_value(value, _filled(builder, part, leaves), i)
    return value


def launcher(kernel: Kernel):
    """Make the function that calls such a kernel, by its address and a tuple of its arguments."""
    wanted = kernel.signature(ANY)

    @intrinsic
    def launch(typing_context, address, arguments):
        def codegen(context, builder, signature, args):
            kinds = [context.get_value_type(kind) for kind in wanted]
            function = ir.FunctionType(context.get_value_type(types.none), kinds)
            leaves = _leaves(builder, args[1])
            values = [_filled(builder, kind, leaves) for kind in kinds]
            builder.call(builder.inttoptr(args[0], function.as_pointer()), values)
            return context.get_dummy_value()

        return types.void(types.int64, arguments), codegen

    return launch


@intrinsic
def allocate(typing_context, nbytes):
    """Give the address of new memory; 0 if there is none left."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(context.nrt.allocate_unchecked(builder, args[0]), args[0].type)

    return types.int64(types.int64), codegen


@intrinsic
def free(typing_context, address):
    """Give memory back."""

    def codegen(context, builder, signature, args):
        context.nrt.free(builder, builder.inttoptr(args[0], cgutils.voidptr_t))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def clear(typing_context, address, nbytes):
    """Set bytes to 0."""

    def codegen(context, builder, signature, args):
        target = builder.inttoptr(args[0], cgutils.voidptr_t)
        cgutils.memset(builder, target, args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def get_through(typing_context, address):
    """Call the C function ``int f(void)`` at an address."""

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(cgutils.int32_t, ())
        value = builder.call(builder.inttoptr(args[0], function.as_pointer()), ())
        return builder.sext(value, args[0].type)

    return types.int64(types.int64), codegen


@intrinsic
def set_through(typing_context, address, value):
    """Call the C function ``void f(int)`` at an address."""

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), (cgutils.int32_t,))
        value = builder.trunc(args[1], cgutils.int32_t)
        builder.call(builder.inttoptr(args[0], function.as_pointer()), (value,))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def read(typing_context, address):
    """Read an int64."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], args[0].type.as_pointer()))

    return types.int64(types.int64), codegen


@intrinsic
def _move(typing_context, target, source, itemsize):
    """Copy 2, 4 or 8 bytes, which may lie anywhere."""

    def codegen(context, builder, signature, args):
        target, source, itemsize = args
        for size in (2, 4, 8):
            with builder.if_then(builder.icmp_signed("==", itemsize, itemsize.type(size))):
                kind = ir.IntType(8 * size).as_pointer()
                value = builder.load(builder.inttoptr(source, kind), align=1)
                builder.store(value, builder.inttoptr(target, kind), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@register_jitable
def copy(shape, itemsize, target, target_strides, source, source_strides):
    """Copy an array from address to address; strides are in bytes."""
    last = len(shape) - 1
    index = np.zeros(last, np.int64)
    runs = 1
    for k in range(last):
        runs *= shape[k]
    for _ in range(runs):
        for i in range(shape[last]):
            _move(target + i * target_strides[last], source + i * source_strides[last], itemsize)
        for k in range(last - 1, -1, -1):
            index[k] += 1
            target += target_strides[k]
            source += source_strides[k]
            if index[k] < shape[k]:
                break
            target -= shape[k] * target_strides[k]
            source -= shape[k] * source_strides[k]
            index[k] = 0
