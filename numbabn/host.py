"""Arrays on the host other than plain NumPy arrays: seen as such, and results in the caller's kind.

Nothing is copied on the way in, and nothing on the way back unless the library itself wants to. The
arrays of one call are of one library.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .libraries import ANY, CPU, float64_in_jax, host_of, kind_of, library_of

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class _Kind(NamedTuple):
    """How arrays of a library are seen, and given.

    Attributes
    ----------
    name : str
        The library's.
    view : function of an array
        See it as a NumPy array.
    give : function of a NumPy array and the call's first array
        Give a result of the latter's kind.
    """

    name: str
    view: Callable[[Any], Any]
    give: Callable[[Any, Any], Any]


def _give_subclass(array: Any, x: Any) -> Any:
    """Do as NumPy's functions of whole arrays; what is not of x's shape stays plain."""
    return x.__array_wrap__(array) if array.shape == x.shape else array


def _view_torch(array: Any) -> Any:
    tensor = array.detach()
    if tensor.dtype == sys.modules["torch"].bfloat16:  # which PyTorch gives to no NumPy array
        return tensor.view(sys.modules["torch"].int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def _give_torch(array: Any, x: Any) -> Any:
    torch = sys.modules["torch"]
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _view_jax(array: Any) -> Any:
    if len(array.devices()) > 1:
        raise BufferError(f"it is spread over {len(array.devices())} devices")
    return np.asarray(array)


def _give_jax(array: Any, x: Any) -> Any:
    # Not by DLPack, which has no bfloat16 in NumPy.
    jax = sys.modules["jax"]
    with float64_in_jax():
        return jax.device_put(array, x.device, may_alias=True)


def _has_own_kind(x: Any) -> bool:
    return library_of(x) != ANY or hasattr(x, "__array_namespace__")


def _give_by_dlpack(array: Any, x: Any) -> Any:
    if not _has_own_kind(x):
        return array
    given = x.__array_namespace__().from_dlpack(array)
    return given if given.device == x.device else given.to_device(x.device)


_KINDS = {
    "numpy": _Kind("NumPy", np.asarray, _give_subclass),
    "torch": _Kind("PyTorch", _view_torch, _give_torch),
    "jaxlib": _Kind("JAX", _view_jax, _give_jax),
    ANY: _Kind("DLPack", np.from_dlpack, _give_by_dlpack),
}


def borrow(names: Sequence[str], arrays: Sequence[Any]) -> list[Any]:
    """See the arrays of a call as NumPy arrays; the first says of which library all are.

    Raises
    ------
    TypeError
        If another is of another library or elsewhere, or NumPy cannot read one where it is.
    """
    library = library_of(arrays[0])
    assert library is not None
    kind = _KINDS[library]
    # Results beside arrays that have DLPack alone are NumPy's, and may come back.
    beside = {library} if _has_own_kind(arrays[0]) else {library, "numpy"}
    seen: list[Any] = []
    for name, array in zip(names, arrays, strict=True):
        if array is None:
            seen.append(None)
            continue
        expected = f"{name}: expected a {kind.name} array on {CPU}, as {names[0]} is"
        own = library_of(array)
        if own not in beside:
            raise TypeError(f"{expected}, got {kind_of(array)}")
        if own != "numpy" and (where := host_of(array)) != CPU:
            where = where or "a CUDA device"
            raise TypeError(f"{expected}, got a {type(array).__qualname__} on {where}")
        try:
            seen.append(_KINDS[own].view(array))
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{name}: expected an array that NumPy can read where it is, "
                f"got a {type(array).__qualname__}: {error}"
            ) from error
    return seen


def give(x: Any, array: Any) -> Any:
    """Give a NumPy array as the kind of array that x is."""
    library = library_of(x)
    assert library is not None
    return _KINDS[library].give(array, x)


def run(
    function: Callable[..., Any], names: tuple[str, ...], arguments: tuple[Any, ...]
) -> Sequence[Any]:
    """Call a function on arrays as they are seen in here, and give what it gives to the caller.

    Its first arguments are arrays of these names, the others are settings.
    """
    arrays, settings = arguments[: len(names)], arguments[len(names) :]
    seen = borrow(names, arrays)
    # What was given to be written comes back itself.
    own = {id(view): array for view, array in zip(seen, arrays, strict=True)}
    results = []
    for each in function(*seen, *settings):  # torch.compile fails at such a comprehension
        if id(each) in own:
            results.append(own[id(each)])
        else:
            results.append(give(arrays[0], each) if isinstance(each, np.ndarray) else each)
    return results
