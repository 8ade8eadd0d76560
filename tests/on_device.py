"""Arrays on a GPU and back, however they lie in memory, for the tests that need one."""

import warnings

import ml_dtypes
import numpy as np
import pytest

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _imported(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing it says is not ours to mend
        return pytest.importorskip(name)


def _memory_of(values, shift):
    """Give the bytes of an array with all gaps, and where its first element is in them.

    `shift` bytes come before it; what lies between is not a number.
    """
    reach = [(n - 1) * step for n, step in zip(values.shape, values.strides, strict=True)]
    low, high = (sum(pick(0, each) for each in reach) for pick in (min, max))
    itemsize = values.itemsize
    offset = shift - low
    memory = np.full(-(-(offset + high + itemsize) // itemsize) * itemsize, 0xFF, np.uint8)
    np.ndarray(values.shape, values.dtype, memory, offset, values.strides)[...] = values
    return memory, offset


class Torch:
    """PyTorch: every dtype, but no step backwards."""

    def __init__(self):
        self.torch = _imported("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("PyTorch sees no GPU")

    def put(self, values, shift=0):
        """Copy, strides and all; addresses are multiples of 256 bytes, plus `shift`."""
        if values is None:
            return None
        memory, offset = _memory_of(values, shift)
        steps = [step // values.itemsize for step in values.strides]
        numbers = self.torch.from_numpy(memory).cuda().view(getattr(self.torch, values.dtype.name))
        return numbers.as_strided(values.shape, steps, offset // values.itemsize)

    def get(self, array):
        """Copy to NumPy, waiting for it."""
        array = array.detach().cpu()
        if array.dtype == self.torch.bfloat16:
            return array.view(self.torch.int16).numpy().view(BFLOAT16)
        return array.numpy()


class CuPy:
    """CuPy: any strides, but nothing that its own kernels would have to convert."""

    def __init__(self):
        self.cupy = _imported("cupy")
        if not self.cupy.cuda.is_available():
            pytest.skip("CuPy sees no GPU")

    def put(self, values, shift=0):
        """Copy, strides and all; addresses are multiples of 256 bytes, plus `shift`."""
        if values is None:
            return None
        memory, offset = _memory_of(values, shift)
        start = self.cupy.asarray(memory).data + offset
        return self.cupy.ndarray(values.shape, values.dtype, start, values.strides)

    def get(self, array):
        """Copy to NumPy, waiting for it."""
        return self.cupy.asnumpy(array.view(f"u{array.itemsize}")).view(array.dtype)


def forget(monkeypatch):
    """Let every call be made anew, as if it were the first."""
    from numbabn.cuda import replay

    monkeypatch.setattr(replay, "_replays", {})  # until the test ends


def poison(monkeypatch):
    """Fill what numbabn allocates with NaN, so that an element left unwritten shows."""
    from numbabn.cuda import adapters

    def poisoning(allocate):
        def poisoned(self, form, place):
            array = allocate(self, form, place)
            if form.dtype.kind in "iu":  # whose every value is one
                return array
            with self._on(place):
                if hasattr(array, "fill_"):
                    array.fill_(float("nan"))
                else:
                    array.view(f"u{form.itemsize}").fill(2 ** (8 * form.itemsize) - 1)
            return array

        return poisoned

    for kind in (adapters._Torch, adapters._CuPy):
        monkeypatch.setattr(kind, "empty", poisoning(kind.empty))
