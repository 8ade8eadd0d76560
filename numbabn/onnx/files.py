"""Models folded from file to file."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import (
    ExternalDataInfo,
    load_external_data_for_model,
    set_external_data,
    uses_external_data,
)

from .folding import Folded, fold_in_place
from .graph import loaded, tensors_of

_ONE_FILE = 2**31 - 2**24  # bytes of weights that leave a protobuf room for all else


def fold_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Folded:
    """Fold a model as `fold` does, from one file to another, which may be the same.

    Weights are written beside the target, in a file of its name and ".data", if those of the
    source were in files of their own, or if the model would not fit in one file (2 GiB); where
    there is such a file, and not the target's alone, with a number at the end. Both are written
    whole before they take the place of what is there, and its mode; links are followed.

    Parameters
    ----------
    source, target : path
        Where the model is, and where the folded one goes.

    Returns
    -------
    Folded
        As from `fold`; with external data, the model's weights are in its file, not in memory.

    Raises
    ------
    TypeError, ValueError, OSError
        As `fold`, and where files cannot be read or written.
    """
    for name, path in (("source", source), ("target", target)):
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"{name}: expected a path, got {type(path).__qualname__}")
    source, target = Path(source), Path(target)
    model = onnx.load(source, load_external_data=False)
    outside = _outside(model)
    others = set() if source.resolve() == target.resolve() else _files(outside, source)
    load_external_data_for_model(model, str(source.parent))
    folded, kept = fold_in_place(loaded(model))
    names = [target.name]
    if outside or sum(tensor.ByteSize() for tensor in tensors_of(model)) > _ONE_FILE:
        names.insert(0, _data_name(target, others))
        for tensor in (*model.graph.initializer, *outside):
            if len(tensor.raw_data) >= 1024:  # as onnx.save
                set_external_data(tensor, names[0])
    real = target.resolve()
    with tempfile.TemporaryDirectory(dir=real.parent, prefix=real.name) as folder:
        onnx.save(model, Path(folder) / target.name)
        for name in names:  # whoever opens a link looks for data beside the link
            new, old = Path(folder) / name, target.with_name(name)
            if new.exists():
                if old.exists():
                    shutil.copymode(old, new)
                new.replace(old.resolve())
    return Folded(model, folded, kept)


def _outside(model: ModelProto) -> list[TensorProto]:
    return [tensor for tensor in tensors_of(model) if uses_external_data(tensor)]


def _files(tensors: Iterable[TensorProto], path: Path) -> set[Path]:
    """Give the files of external data of a model at a path."""
    return {(path.parent / ExternalDataInfo(tensor).location).resolve() for tensor in tensors}


def _data_name(target: Path, others: set[Path]) -> str:
    """Name a file for data beside the target: a new one, or one of the model that is there."""
    own: set[Path] = set()
    if target.exists() and target.with_name(f"{target.name}.data").exists():
        own = _files(_outside(onnx.load(target, load_external_data=False)), target) - others
    paths = (target.with_name(f"{target.name}.data{i or ''}") for i in count())
    return next(path.name for path in paths if not path.exists() or path.resolve() in own)
