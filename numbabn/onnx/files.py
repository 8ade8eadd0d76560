"""Models folded from file to file."""

import os
import tempfile
from pathlib import Path

import onnx

from .folding import Folded, fold_in_place
from .graph import loaded

_ONE_FILE = 2**31 - 2**24  # bytes of weights that leave a protobuf room for all else


def fold_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Folded:
    """Fold a model as `fold` does, from one file to another, which may be the same.

    Weights are written beside the target, in a file of its name and ".data", if those of the
    source were in files of their own, or if the model would not fit in one file (2 GiB). Both are
    written whole before they take the place of what is there.

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
    target = Path(target)
    outside = any(
        onnx.external_data_helper.uses_external_data(tensor)
        for tensor in onnx.load(source, load_external_data=False).graph.initializer
    )
    model = loaded(source)
    folded, kept = fold_in_place(model)
    data = f"{target.name}.data"
    if outside or sum(tensor.ByteSize() for tensor in model.graph.initializer) > _ONE_FILE:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= 1024:  # as onnx.save
                onnx.external_data_helper.set_external_data(tensor, data)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name) as folder:
        saved = Path(folder) / target.name
        onnx.save(model, saved)
        for name in (data, target.name):
            if (saved.parent / name).exists():
                (saved.parent / name).replace(target.parent / name)
    return Folded(model, folded, kept)
