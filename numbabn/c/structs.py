"""What `include/numbabn.h` declares, field by field, for ctypes and for numba."""

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any

import numpy as np
from numba import types
from numba.np.numpy_support import from_dtype

ABI = 1
MAX_NDIM = 32


class Status(IntEnum):
    """What a call returns."""

    OK = 0
    NOT_LOADED = 1
    NDIM = 2
    SHAPE = 3
    AXIS = 4
    MISSING_X = 5
    MISSING_Y = 6
    MISSING_RUNNING = 7
    MISSING_DY = 8
    MISSING_DX = 9
    MISSING_STATISTICS = 10
    MISSING_GRADIENTS = 11
    PARAMETERS = 12
    EPS = 13
    MOMENTUM = 14
    CORRECTION = 15
    VALUES = 16
    MASK = 17
    MEMORY = 18


MESSAGES = {
    Status.OK: "all went well",
    Status.NOT_LOADED: "operation: expected one that was imported for this dtype",
    Status.NDIM: f"ndim: expected 2 to {MAX_NDIM}",
    Status.SHAPE: "shape: expected sizes of 0 or more, and a channel or more",
    Status.AXIS: "axis: expected -ndim to ndim - 1",
    Status.MISSING_X: "x: expected an address, got NULL",
    Status.MISSING_Y: "y: expected an address, got NULL",
    Status.MISSING_RUNNING: "running_mean, running_var: expected addresses in inference, got NULL",
    Status.MISSING_DY: "dy: expected an address, got NULL",
    Status.MISSING_DX: "dx: expected an address, got NULL",
    Status.MISSING_STATISTICS: "mean, and m2 or invstd: expected addresses, got NULL",
    Status.MISSING_GRADIENTS: "dweight, dbias: expected addresses, got NULL",
    Status.PARAMETERS: "float32_parameters: expected 0 beside float64",
    Status.EPS: "eps: expected a finite number, 0 or more",
    Status.MOMENTUM: "momentum: expected a finite number",
    Status.CORRECTION: "correction: expected a finite number, less than the values per channel",
    Status.VALUES: "x: expected more than one value per channel in training",
    Status.MASK: "mask: expected NULL without relu",
    Status.MEMORY: "no memory to work in",
}


class Input(ctypes.Structure):
    """An array that is read."""

    _fields_ = (("data", c_void_p), ("strides", c_void_p))


class Output(ctypes.Structure):
    """An array that is written."""

    _fields_ = Input._fields_


class Batch(ctypes.Structure):
    """What all calls begin with."""

    _fields_ = (
        ("shape", c_void_p),
        ("ndim", c_int32),
        ("axis", c_int32),
        ("threads", c_int32),
        ("float32_parameters", c_int32),
    )


class StatisticsCall(ctypes.Structure):
    """Arguments of statistics."""

    _fields_ = (("batch", Batch), ("x", Input), ("mean", c_void_p), ("m2", c_void_p))


class InferenceCall(ctypes.Structure):
    """Arguments of inference."""

    _fields_ = (
        ("batch", Batch),
        ("x", Input),
        ("residual", Input),
        ("y", Output),
        ("running_mean", c_void_p),
        ("running_var", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_double),
        ("relu", c_int32),
    )


class ForwardCall(ctypes.Structure):
    """Arguments of forward."""

    _fields_ = (
        ("batch", Batch),
        ("x", Input),
        ("residual", Input),
        ("y", Output),
        ("mask", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("running_mean", c_void_p),
        ("running_var", c_void_p),
        ("mean", c_void_p),
        ("invstd", c_void_p),
        ("eps", c_double),
        ("momentum", c_double),
        ("correction", c_double),
        ("relu", c_int32),
    )


class BackwardCall(ctypes.Structure):
    """Arguments of backward."""

    _fields_ = (
        ("batch", Batch),
        ("dy", Input),
        ("x", Input),
        ("dx", Output),
        ("dresidual", Output),
        ("mask", c_void_p),
        ("weight", c_void_p),
        ("mean", c_void_p),
        ("invstd", c_void_p),
        ("dweight", c_void_p),
        ("dbias", c_void_p),
        ("eval", c_int32),
    )


class Kernels(ctypes.Structure):
    """What the functions take first: what they call, for which dtype, on which machine."""

    _fields_ = (
        # For each operation: planes, planes in parallel, rows, rows in parallel.
        ("statistics", c_int64 * 4),
        ("inference", c_int64 * 4),
        ("forward", c_int64 * 4),
        ("backward", c_int64 * 4),
        ("itemsize", c_int64),
        ("type_number", c_int64),  # NumPy's, of the dtype
        ("threads", c_int64),
        # Functions that tell and set how many of Numba's the calling thread may use.
        ("told_threads", c_int64),
        ("set_threads", c_int64),
        ("caches", c_int64 * 2),  # bytes of L2 and L3
    )


CALLS = {
    "statistics": StatisticsCall,
    "inference": InferenceCall,
    "forward": ForwardCall,
    "backward": BackwardCall,
}


FUNCTIONS: dict[str, Any] = {
    name: ctypes.CFUNCTYPE(c_int32, c_void_p, POINTER(call)) for name, call in CALLS.items()
}


class Table(ctypes.Structure):
    """The functions for one dtype, those that were asked for."""

    _fields_ = (
        ("abi", c_int32),
        ("size", c_int32),
        ("dtype", c_char_p),
        ("itemsize", c_int32),
        ("threads", c_int32),
        ("kernels", c_void_p),
        *FUNCTIONS.items(),
        ("messages", POINTER(c_char_p)),
        ("message_count", c_int32),
    )


def pointer_to(struct: Any) -> Any:
    """Give numba's type of a pointer to a struct."""
    return types.CPointer(from_dtype(np.dtype(struct)))
