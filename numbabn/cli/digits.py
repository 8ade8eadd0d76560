"""The demo's images: scikit-learn's handwritten digits, or MNIST and its kin from IDX files."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .command import CommandError

# The third byte of an IDX file's magic number, and the big-endian type it stands for.
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.intp]


class Digits(NamedTuple):
    """Images [N, 1, H, W] between 0 and 1 and their labels [N], to train on and to test on."""

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.train_images.shape[2])

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return int(self.train_images.shape[3])

    @property
    def classes(self) -> int:
        """One more than the highest label."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def load_digits(rng: np.random.Generator, test_share: float = 0.25) -> Digits:
    """Split scikit-learn's 1797 images of 8x8 pixels, each digit by the same share."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    labels = labels.astype(np.intp)
    chosen = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    test = np.concatenate([each[: round(test_share * len(each))] for each in chosen])
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Digits("scikit-learn digits", images[train], labels[train], images[test], labels[test])


def load_folder(folder: Path) -> Digits:
    """Read the four IDX files that MNIST and its kin come in, gzipped or not."""
    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder")
    parts = []
    for role in ("train",), ("t10k", "test"):
        images_file, labels_file = (_find(folder, role, kind) for kind in ("images", "labels"))
        images, labels = read_idx(images_file), read_idx(labels_file)
        _check(images_file, images.dtype == np.uint8, "unsigned bytes", images.dtype)
        _check(images_file, images.ndim == 3, "3 dimensions", images.ndim)
        _check(images_file, images.size > 0, "images", f"none: its shape is {images.shape}")
        _check(labels_file, labels.ndim == 1, "1 dimension", labels.ndim)
        _check(labels_file, labels.dtype.kind in "iu", "integers", labels.dtype)
        _check(labels_file, len(labels) == len(images), f"{len(images)} labels", len(labels))
        _check(labels_file, bool(labels.min() >= 0), "labels of 0 or more", labels.min())
        parts.append((images_file, images[:, np.newaxis] / np.float32(255), labels))
    (_, train_images, train_labels), (test_file, test_images, test_labels) = parts
    sizes = [f"{h}x{w} pixels" for _, _, h, w in (train_images.shape, test_images.shape)]
    _check(test_file, sizes[1] == sizes[0], sizes[0], sizes[1])
    return Digits(
        folder.resolve().name,
        train_images,
        train_labels.astype(np.intp),
        test_images,
        test_labels.astype(np.intp),
    )


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Read one IDX file, gzipped or not, in the machine's byte order."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{path}: cannot be read: {error}") from error
    magic = data[:4]
    known = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in IDX_DTYPES and magic[3] > 0
    _check(path, known, "an IDX magic number such as 00000803", magic.hex() or "an empty file")
    dtype, ndim = np.dtype(IDX_DTYPES[magic[2]]), magic[3]
    start = 4 + 4 * ndim
    _check(path, len(data) >= start, f"a header of {start} bytes", f"{len(data)} bytes")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", ndim, 4))
    expected = start + math.prod(shape) * dtype.itemsize
    size = "x".join(map(str, shape))
    _check(path, len(data) == expected, f"{expected} bytes for {size} values", len(data))
    array = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _find(folder: Path, roles: tuple[str, ...], kind: str) -> Path:
    found = {
        path.name.removesuffix(".gz"): path
        # In this order a plain file takes the place of its gzipped twin.
        for path in sorted(folder.iterdir(), reverse=True)
        if path.is_file() and kind in path.name and any(role in path.name for role in roles)
    }
    pattern = " or ".join(f"*{role}*{kind}*" for role in roles)
    _check(folder, len(found) == 1, f"one file {pattern}", ", ".join(sorted(found)) or "none")
    return next(iter(found.values()))


def _check(path: Path, holds: bool, expected: str, found: object) -> None:
    if not holds:
        raise CommandError(f"{path}: expected {expected}, found {found}")
