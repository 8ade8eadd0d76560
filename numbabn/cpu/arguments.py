"""How Python's arrays reach a kernel: as addresses and steps, whatever their rank.

A view of an array is a `Strided`, which Python passes as a `layout.View`; a per-channel array of
any float dtype is a `Numbers`. Either may be None. Both are read straight from NumPy's array
object, so that a call costs a fraction of a microsecond and one compiled kernel serves every rank,
order of axes, and dtype of parameters.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import (
    NativeValue,
    intrinsic,
    make_attribute_wrapper,
    models,
    register_model,
    unbox,
)

from .intrinsics import BFLOAT16, FLOAT16, computed_type, narrow, widen

_BYTE, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()


class Forward(NamedTuple):
    """Views of a forward pass."""

    y: Any  # [N, C, S], written
    x: Any  # [N, C, S]
    residual: Any  # [N, C, S] or None
    mask: Any  # bits [N, C, S], written, or None


class Backward(NamedTuple):
    """Views of a backward pass."""

    dx: Any  # [N, C, S], written
    dresidual: Any  # [N, C, S], written, or None
    dy: Any  # [N, C, S]
    x: Any  # [N, C, S]
    mask: Any  # bits [N, C, S] or None


class Parameters(NamedTuple):
    """What a forward pass or inference has per channel; any may be None."""

    weight: Any
    bias: Any
    running_mean: Any  # read in inference, updated in a forward pass, as running_var
    running_var: Any
    mean: Any  # float64, written, as invstd
    invstd: Any


class Gradients(NamedTuple):
    """What a backward pass has per channel."""

    weight: Any  # or None
    mean: Any
    invstd: Any
    dweight: Any  # written, as dbias
    dbias: Any


class Settings(NamedTuple):
    """Numbers of a forward pass or inference."""

    eps: float
    momentum: float
    correction: float
    rectify: bool  # whether a ReLU comes last


class Memory(NamedTuple):
    """Room to work in.

    `spares` and `sums` are by threads; the others too, unless all work on one block together.
    """

    slab: Any  # what was summed of a block, for the sweep that writes; or None
    spares: Any  # tiles for elements that lie apart; or None
    sums: Any  # float64: sums of sixteen lanes, or of each column, of a block
    constants: Any  # as data are computed with: what writing takes of a block's channels
    partials: Any  # float64: what is left of each piece of each channel of a block


class Shape(NamedTuple):
    """Sizes of a view, and how a kernel cuts it."""

    N: int
    C: int
    S: int
    block: int  # channels of planes that are summed before they are written; columns of a task
    group: int  # channels of a block that are taken side by side; rows that are written as one
    together: bool  # whether all threads work on one block
    threads: int
    streaming: bool  # whether results go past the caches
    adjoining: bool  # whether planes or rows of a line or more lie without a gap in every map
    tile: int  # elements of a plane, or rows, that are taken in one go
    cuts: int  # tiles of one n
    piece: int  # tiles of a channel, or of rows, that are summed together
    pieces: int
    ahead: int  # tiles from what is summed to what is fetched
    row: int  # elements that the slab has for a group of planes
    fold: int  # rows that are summed as one


class Strided(types.Type):
    """A view's memory: ``data`` points at element (0, 0, 0); steps count elements."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(f"Strided({dtype})")


class Numbers(types.Type):
    """One number per channel: address, bytes from one to the next, NumPy's number of the dtype."""

    def __init__(self):
        super().__init__("Numbers")


numbers = Numbers()
_SIZES = {int: types.intp, bool: types.boolean}


@register_model(Strided)
class _StridedModel(models.StructModel):
    def __init__(self, manager, kind):
        members = [("data", types.CPointer(kind.dtype)), ("dn", types.intp)]
        super().__init__(manager, kind, [*members, ("dc", types.intp), ("ds", types.intp)])


@register_model(Numbers)
class _NumbersModel(models.StructModel):
    def __init__(self, manager, kind):
        members = [("data", types.CPointer(types.uint8)), ("step", types.intp)]
        super().__init__(manager, kind, [*members, ("dtype", types.int32)])


for _name in ("data", "dn", "dc", "ds"):
    make_attribute_wrapper(Strided, _name, _name)
for _name in ("data", "step", "dtype"):
    make_attribute_wrapper(Numbers, _name, _name)

# Where NumPy's C API has kept an array's fields since 1.7, and a dtype's, behind the object's head.
_HEAD = object.__basicsize__
_DATA, _STRIDES, _DESCR, _TYPE_NUM = _HEAD, _HEAD + 24, _HEAD + 40, _HEAD + 12
_FLOAT16_NUM, FLOAT32_NUM, _FLOAT64_NUM = 23, 11, 12


def _field(builder, thing, offset, kind):
    """Read a field of a C struct."""
    address = builder.gep(builder.bitcast(thing, _BYTE.as_pointer()), [ir.Constant(_I64, offset)])
    return builder.load(builder.bitcast(address, kind.as_pointer()))


def _unboxed(c, kind, thing, fill):
    """Unbox `thing` by `fill`, which sets the members of a struct; all are 0 for None."""
    value_type = c.context.get_value_type(kind)
    slot = cgutils.alloca_once_value(c.builder, ir.Constant(value_type, None))
    with c.builder.if_then(c.builder.icmp_unsigned("!=", thing, c.pyapi.borrow_none())):
        struct = cgutils.create_struct_proxy(kind)(c.context, c.builder)
        fill(struct)
        c.builder.store(struct._getvalue(), slot)
    failed = cgutils.is_not_null(c.builder, c.pyapi.err_occurred())
    return NativeValue(c.builder.load(slot), is_error=failed)


@unbox(Strided)
def _unbox_strided(kind, thing, c):
    def fill(view):
        array, *steps = (c.pyapi.tuple_getitem(thing, k) for k in range(4))
        view.dn, view.dc, view.ds = map(c.pyapi.long_as_longlong, steps)
        pointer = c.context.get_value_type(kind.dtype).as_pointer()
        view.data = _field(c.builder, array, _DATA, pointer)

    return _unboxed(c, kind, thing, fill)


@unbox(Numbers)
def _unbox_numbers(kind, thing, c):
    pointer = _BYTE.as_pointer()

    def fill(array):
        array.data = _field(c.builder, thing, _DATA, pointer)
        array.step = c.builder.load(_field(c.builder, thing, _STRIDES, _I64.as_pointer()))
        descr = _field(c.builder, thing, _DESCR, pointer)
        array.dtype = _field(c.builder, descr, _TYPE_NUM, _I32)

    return _unboxed(c, kind, thing, fill)


_NUMBERS = {types.float32: FLOAT32_NUM, types.float64: _FLOAT64_NUM}


def _array(context, builder, kind, value):
    return context.make_array(kind)(context, builder, value=value)


@intrinsic
def strided(typing_context, array, like):
    """See a compiled function's array, or None, as a view of what is like `like`; steps follow.

    What the view points at lives no longer than the array.
    """
    view = Strided(like.dtype)

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(view)(context, builder)
        struct.dn = struct.dc = struct.ds = ir.Constant(_I64, 0)
        data = ir.Constant(struct.data.type, None)
        if array != types.none:
            data = builder.bitcast(_array(context, builder, array, args[0]).data, data.type)
        struct.data = data
        return struct._getvalue()

    return view(array, like), codegen


@intrinsic
def address_of(typing_context, array):
    """Give the address of a view's, or of numbers', first element; 0 of None."""

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(array)(context, builder, value=args[0])
        return builder.ptrtoint(struct.data, _I64)

    return types.intp(array), codegen


@intrinsic
def itemsize_of(typing_context, view):
    """Give the bytes of an element."""

    def codegen(context, builder, signature, args):
        return ir.Constant(_I64, view.dtype.bitwidth // 8)

    return types.intp(view), codegen


@intrinsic
def stepping(typing_context, view, steps, k):
    """Give a view with dn, dc and ds from row `k` of an array of steps."""

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(view)(context, builder, value=args[0])
        table = _array(context, builder, steps, args[1]).data
        first = builder.mul(args[2], ir.Constant(_I64, 3))
        for column, name in enumerate(("dn", "dc", "ds")):
            at = builder.gep(table, [builder.add(first, ir.Constant(_I64, column))])
            setattr(struct, name, builder.load(at))
        return struct._getvalue()

    return view(view, steps, types.intp), codegen


@intrinsic
def numbers_of(typing_context, array):
    """See a compiled function's array of one number per channel, or None, as `Numbers`."""

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(numbers)(context, builder)
        if array == types.none:
            return ir.Constant(struct._getvalue().type, None)
        given = _array(context, builder, array, args[0])
        struct.data = builder.bitcast(given.data, _BYTE.as_pointer())
        struct.step = builder.extract_value(given.strides, 0)
        struct.dtype = ir.Constant(_I32, _NUMBERS[array.dtype])
        return struct._getvalue()

    return numbers(array), codegen


def _rooming(dtype_like):
    @intrinsic
    def room(typing_context, buffer, start, size, like):
        view = Strided(dtype_like(like.dtype))

        def codegen(context, builder, signature, args):
            struct = cgutils.create_struct_proxy(view)(context, builder)
            at = builder.gep(_array(context, builder, buffer, args[0]).data, [args[1]])
            nothing = ir.Constant(struct.data.type, None)
            empty = builder.icmp_signed("==", args[2], ir.Constant(_I64, 0))
            struct.data = builder.select(empty, nothing, builder.bitcast(at, nothing.type))
            struct.dn = struct.dc = struct.ds = ir.Constant(_I64, 0)
            return struct._getvalue()

        return view(buffer, types.intp, types.intp, like), codegen

    return room


# Parts of a compiled function's buffer, from a byte on, for what another view holds; as it is
# computed with; and for float64. None where they have no elements.
room = _rooming(lambda dtype: dtype)
room_computed = _rooming(computed_type)
room_wide = _rooming(lambda dtype: types.float64)


@intrinsic
def displaced(typing_context, view, n):
    """Give the view that starts at element (n, 0, 0); None stays None."""

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(view)(context, builder, value=args[0])
        there = builder.gep(struct.data, [builder.mul(args[1], struct.dn)])
        struct.data = builder.select(cgutils.is_null(builder, struct.data), struct.data, there)
        return struct._getvalue()

    return view(view, types.intp), codegen


def _by_dtype(builder, dtype, act):
    """Switch on NumPy's number of a dtype; what is none of its own is bfloat16."""
    after = builder.append_basic_block("after")
    default = builder.append_basic_block("bfloat16")
    switch = builder.switch(dtype, default)
    cases = (
        (FLOAT32_NUM, types.float32, _FLOAT),
        (_FLOAT64_NUM, types.float64, _DOUBLE),
        (_FLOAT16_NUM, FLOAT16, _I16),
        (None, BFLOAT16, _I16),
    )
    for number, stored, scalar in cases:
        block = default if number is None else builder.append_basic_block(f"dtype{number}")
        if number is not None:
            switch.add_case(ir.Constant(_I32, number), block)
        builder.position_at_end(block)
        act(stored, scalar)
        builder.branch(after)
    builder.position_at_end(after)


@intrinsic
def number(typing_context, array, channel):
    """Give the number of a channel as float64."""

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(numbers)(context, builder, value=args[0])
        at = builder.gep(struct.data, [builder.mul(args[1], struct.step)])
        slot = cgutils.alloca_once(builder, _DOUBLE)

        def act(stored, scalar):
            value = builder.load(builder.bitcast(at, scalar.as_pointer()), align=1)
            value = widen(builder, stored, value)
            builder.store(value if stored == types.float64 else builder.fpext(value, _DOUBLE), slot)

        _by_dtype(builder, struct.dtype, act)
        return builder.load(slot)

    return types.float64(array, types.intp), codegen


@intrinsic
def set_number(typing_context, array, channel, value):
    """Write the number of a channel, rounded once where it is float32, else by way of float32."""

    def codegen(context, builder, signature, args):
        struct = cgutils.create_struct_proxy(numbers)(context, builder, value=args[0])
        at = builder.gep(struct.data, [builder.mul(args[1], struct.step)])

        def act(stored, scalar):
            value = args[2]
            if stored != types.float64:
                value = narrow(builder, stored, builder.fptrunc(value, _FLOAT))
            builder.store(value, builder.bitcast(at, scalar.as_pointer()), align=1)

        _by_dtype(builder, struct.dtype, act)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float64), codegen


def signature(kind: type, dtype: Any) -> types.NamedTuple:
    """Give the numba type of one of the tuples above, for maps of a stored dtype."""
    strided, bits, wide = Strided(dtype), Strided(types.uint8), Strided(types.float64)
    members = {
        Forward: (strided, strided, strided, bits),
        Backward: (strided, strided, strided, strided, bits),
        Parameters: (numbers,) * 6,
        Gradients: (numbers,) * 5,
        Settings: (types.float64, types.float64, types.float64, types.boolean),
        Memory: (strided, strided, wide, Strided(computed_type(dtype)), wide),
        Shape: tuple(_SIZES[kind] for kind in Shape.__annotations__.values()),
    }[kind]
    return types.NamedTuple(members, kind)
