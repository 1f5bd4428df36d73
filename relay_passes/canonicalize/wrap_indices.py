"""take(x, -1) => take(x, n - 1): PyTorch's `x[:, -1]` arrives with the index as written.

TVM's `take` in mode "fast" does not check its indices, so -1 would read outside of the tensor.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr

from ..ir import array_const, constant, op_name, shape_of
from .rewrite import Rewriter, Var, rewrite_module


@tvm.transform.module_pass(opt_level=0, name="WrapIndices")
class WrapIndices:
    """Constant negative indices of `take` count from the front."""

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        return rewrite_module(module, _WrapIndices)


class _WrapIndices(Rewriter):
    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        if op_name(value) != "relax.take":
            return None
        shape, indices = shape_of(value.args[0]), constant(self.value(value.args[1]))
        if shape is None or indices is None or not (indices < 0).any():
            return None
        axis = None if value.attrs.axis is None else int(value.attrs.axis)
        size = int(np.prod(shape)) if axis is None else shape[axis]
        wrapped = array_const(np.where(indices < 0, indices + size, indices).astype(indices.dtype))
        return relax.op.take(value.args[0], wrapped, axis=axis, mode=str(value.attrs.mode))
