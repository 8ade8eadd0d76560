"""BatchNormalization of ONNX's reference evaluator, by numbabn's kernels."""

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from .. import checks
from ..functional import batch_norm_forward, batch_norm_inference


class BatchNormalization(OpRun):
    """BatchNormalization of opsets 7 and later for ``onnx.reference``, run by numbabn's kernels.

    In training mode (``training_mode=1`` from opset 14 on) the running statistics come back beside
    Y, in their own dtype: ``running = running * momentum + batch * (1 - momentum)``, the variance
    divided by the count. X has 2 or more dimensions, or one, which are values of one channel;
    dtypes may differ as opset 15 allows. Training by the outputs of opsets before 14, whose
    saved statistics are not defined, and ``spatial=0`` of opsets 7 and 8 raise ``ValueError``.

    Examples
    --------
    >>> from onnx.reference import ReferenceEvaluator
    >>> from numbabn.onnx import BatchNormalization
    >>> ReferenceEvaluator("model.onnx", new_ops=[BatchNormalization])  # doctest: +SKIP
    >>> import numpy as np
    >>> x, two = np.array([[1.0, 10.0], [3.0, 30.0]]), np.full(2, 2.0)
    >>> BatchNormalization.eval(x, two, two, two, two, epsilon=2.0)
    array([[ 1., 10.],
           [ 3., 30.]])
    """

    op_domain = ""

    def _run(
        self,
        x: Any,
        scale: Any,
        bias: Any,
        mean: Any,
        var: Any,
        *,
        epsilon: float,
        momentum: float,
        training_mode: int = 0,
        spatial: int = 1,
    ) -> tuple[Any, ...]:
        opset = self.run_params["opsets"][self.op_domain]
        asked = [name for name in self.onnx_node.output if name]
        if not spatial:
            raise ValueError("spatial: expected 1, got 0, for which reshape X to (N, C * S)")
        if len(asked) > 1 and not (opset >= 14 and training_mode):
            expected = "training_mode=1 of opset 14 or later for more outputs than Y"
            raise ValueError(f"outputs: expected {expected}, got {asked} in opset {opset}")
        data = x[:, None] if x.ndim == 1 else x
        data, *parameters = _together(data, scale, bias, mean, var)
        if not training_mode:
            scale, bias, mean, var = parameters
            y = batch_norm_inference(data, mean, var, scale, bias, eps=epsilon)
            return (y.reshape(x.shape).astype(x.dtype, copy=False),)
        # One value per channel is defined here: it is that value twice, as far as statistics go.
        if data.size == data.shape[1]:
            data = np.concatenate([data, data])
        running = [array.copy() for array in parameters[2:]]
        y = batch_norm_forward(
            data, *parameters[:2], *running, momentum=1 - momentum, eps=epsilon, correction=0
        ).y
        y = y[: len(x)].reshape(x.shape).astype(x.dtype, copy=False)
        return y, running[0].astype(mean.dtype), running[1].astype(var.dtype)


def _together(x: Any, *parameters: Any) -> list[Any]:
    """Give dtypes that numbabn takes beside each other, none of them narrower than it was."""
    allowed = checks.parameter_dtypes(x.dtype)
    if all(array.dtype in allowed for array in parameters):
        return [x, *parameters]
    dtype = widest(x, *parameters)
    return [array.astype(dtype, copy=False) for array in (x, *parameters)]


def widest(*arrays: Any) -> Any:
    """Give the narrowest dtype that holds the numbers of all."""
    dtypes = {array.dtype for array in arrays}
    if dtypes >= {*checks.NARROW}:  # neither holds the other's, and NumPy knows no third
        dtypes.add(np.dtype(np.float32))
        dtypes -= {*checks.NARROW}
    return np.result_type(*dtypes)
