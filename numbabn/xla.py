"""Python functions on NumPy arrays as targets of XLA's foreign function interface, on the CPU.

XLA calls a target with the addresses of its buffers: arguments are read where they are, results are
written where they belong. The structures are those of ``xla/ffi/api/c_api.h``, which jaxlib brings.
"""

import atexit
import ctypes
import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import jax
import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

Arrays = list[Any]
Function = Callable[[Any, Arrays, Arrays], None]

MAJOR = 0  # the version of the structures below; minor ones add to their ends

_METADATA = 1  # XLA_FFI_Extension_Metadata
_INTERNAL = 13  # XLA_FFI_Error_Code_INTERNAL
_DTYPES = {
    6: np.dtype(np.uint8),
    8: np.dtype(np.uint32),
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    12: np.dtype(np.float64),
    16: np.dtype(ml_dtypes.bfloat16),
}


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
    )


class _Sized(ctypes.Structure):
    _fields_: ClassVar[Any] = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
    )


class _Version(_Sized):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("version", _Version),
        ("traits", ctypes.c_uint32),
    )


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _Failure(_Sized):
    _fields_ = (("message", ctypes.c_char_p), ("code", ctypes.c_int))


class _Api(_Sized):
    _fields_ = (
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("create_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Failure))),
    )


class _Buffer(_Sized):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("address", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(_Sized):
    _fields_ = (
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("each", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _String(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Attributes(_Sized):
    _fields_ = (
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("each", ctypes.POINTER(ctypes.POINTER(_String))),
    )


class _Call(_Sized):
    _fields_ = (
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_registered: list[Any] = []  # XLA keeps their addresses for good

_settings = lru_cache(maxsize=1024)(json.loads)

_gate = np.zeros(3, np.int64)  # calls inside, whether it is closed, and whether programs have calls
_INSIDE, _CLOSED = (_gate[i:].ctypes.data for i in range(2))
_ended = _Failure(  # what calls are told then
    struct_size=ctypes.sizeof(_Failure),
    message=b"numbabn: expected calls before the interpreter ends, got one as it does: "
    b"register exit handlers after importing numbabn.jax",
    code=_INTERNAL,
)
_ENDED = ctypes.addressof(_ended)


@intrinsic
def _add(typing_context: Any, address: Any, number: Any) -> Any:
    """Add to an integer at an address, in one step, and give what was there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, number = arguments
        pointer = builder.inttoptr(address, number.type.as_pointer())
        return builder.atomic_rmw("add", pointer, number, "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _create_error(typing_context: Any, call: Any, failure: Any) -> Any:
    """Make an error as `_Failure` says, by XLA's function and without the interpreter."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call, failure = arguments
        word = failure.type

        def load(address: Any, offset: int) -> Any:
            address = builder.add(address, word(offset))
            return builder.load(builder.inttoptr(address, word.as_pointer()))

        api = load(builder.ptrtoint(call, word), _Call.api.offset)
        create = ir.FunctionType(word, [word]).as_pointer()
        return builder.call(
            builder.inttoptr(load(api, _Api.create_error.offset), create), [failure]
        )

    return types.int64(types.voidptr, types.int64), generate


def _gated(handler: Any) -> Any:
    """Call a handler, but not once the interpreter ends: who waits for it then never returns."""

    @cfunc(types.intp(types.voidptr))
    def enter(call: Any) -> Any:
        _add(_INSIDE, 1)
        closed = _add(_CLOSED, 0)
        error = _create_error(call, _ENDED) if closed else types.intp(handler(call))
        _add(_INSIDE, -1)
        return error

    return enter


@atexit.register
def _finish() -> None:
    """Have programs end before the interpreter does, if anybody may still see their results.

    JAX does not wait for those that are under way, and they need the interpreter in between.
    """
    if _gate[2]:  # otherwise JAX may not have started, and need not
        jax.effects_barrier()
        for array in jax.live_arrays():
            with suppress(RuntimeError):  # that nobody has seen, nor will
                array.block_until_ready()
    _gate[1] = 1
    while _gate[0]:
        time.sleep(1e-3)


def _arrays(buffers: _Buffers) -> Arrays:
    """View buffers, which XLA lays out in C order."""
    arrays = []
    for i in range(buffers.size):
        buffer = buffers.each[i].contents
        dtype, shape = _DTYPES[buffer.dtype], tuple(buffer.shape[: buffer.rank])
        nbytes = dtype.itemsize * prod(shape)
        if nbytes:
            memory = (ctypes.c_char * nbytes).from_address(buffer.address)
            arrays.append(np.frombuffer(memory, dtype).reshape(shape))
        else:
            arrays.append(np.empty(shape, dtype))
    return arrays


def _run(function: Function, call: _Call) -> None:
    (text,) = call.attributes.each[: call.attributes.size]
    settings = _settings(ctypes.string_at(text.contents.address, text.contents.size))
    function(settings, _arrays(call.arguments), _arrays(call.results))


@cache
def _version() -> tuple[int, int]:
    """Read which version jaxlib's own header is of, as a compiler would."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    defined = dict(re.findall(r"#define XLA_FFI_API_(M\w+) (\d+)", header.read_text()))
    major, minor = int(defined["MAJOR"]), int(defined["MINOR"])
    if major != MAJOR:
        raise ImportError(f"jaxlib: expected version {MAJOR} of XLA's FFI, got {major}.{minor}")
    return major, minor


def _describe(call: _Call) -> None:
    """Answer XLA's question, asked as a target is registered, which version it is of."""
    extension = ctypes.cast(call.extension, ctypes.POINTER(_MetadataExtension))
    metadata = extension.contents.metadata.contents
    metadata.version.major, metadata.version.minor = _version()
    metadata.traits = 0


def register(name: str, function: Function) -> None:
    """Make a function a target of `call`.

    Parameters
    ----------
    name : str
        The target's.
    function : callable
        Is given settings, arrays to read, and arrays to write. It must not call JAX, whose threads
        may all wait for it.
    """

    def handle(address: int) -> Any:
        call = _Call.from_address(address)
        if call.extension and call.extension.contents.type == _METADATA:
            _describe(call)
            return None
        _gate[2] = 1
        try:
            _run(function, call)
        except BaseException as error:
            failure = _Failure(
                struct_size=ctypes.sizeof(_Failure),
                message=f"{type(error).__name__}: {error}".encode(),
                code=_INTERNAL,
            )
            return call.api.contents.create_error(failure)
        return None

    _version()
    handler = _Handler(handle)
    entry = _gated(handler)
    _registered.append((handler, entry))
    capsule = jax.ffi.pycapsule(ctypes.c_void_p(entry.address))
    jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def call(name: str, outputs: tuple[Any, ...], settings: Any, *given: Any) -> tuple[Any, ...]:
    """Call a target from a program.

    Parameters
    ----------
    name : str
        The target's.
    outputs : tuple of jax.ShapeDtypeStruct
        What it writes.
    settings : object
        What JSON can hold, so that what is compiled means the same in any process.
    *given : jax.Array
        What it reads.

    Returns
    -------
    tuple of jax.Array
        Under ``vmap`` arrays have further axes in front, of size 1 where an array is not mapped.
    """
    _gate[2] = 1
    target = jax.ffi.ffi_call(name, outputs, vmap_method="expand_dims")
    return tuple(target(*given, settings=json.dumps(settings)))
