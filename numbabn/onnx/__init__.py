"""ONNX: batch norm of its reference evaluator, layers read from a model, and a model folded."""

from ..extras import needed

with needed("onnx", "onnx"):
    from .files import fold_file
    from .folding import Folded, fold
    from .operator import BatchNormalization
    from .reading import layers

__all__ = ["BatchNormalization", "Folded", "fold", "fold_file", "layers"]
