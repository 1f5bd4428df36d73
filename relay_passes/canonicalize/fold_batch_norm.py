"""Batch normalisation and other per-channel factors go into the weights before them.

    batch_norm(x, g, b, m, v) => x * s + (b - m * s),  s = g / sqrt(v + eps)
    anchor(x, w) * s          => anchor(x, w * s)
    anchor(x, w) + a + b      => anchor(x, w) + (a + b)

Ioffe and Szegedy, Batch Normalization, 2015, with inference statistics. Costs nothing at run time;
only float constant weights are changed (a quantised weight keeps its integers).
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr

from ..ir import array_const, constant, dtype_of, op_name, shape_of
from .anchors import (
    broadcast_channels,
    is_anchor,
    per_channel,
    scaled_weight,
    with_weight,
)
from .rewrite import Rewriter, Var, rewrite_module


@tvm.transform.module_pass(opt_level=0, name="FoldBatchNorm")
class FoldBatchNorm:
    """anchor(x, w) * s + b => anchor(x, w * s) + b, batch-norm included.

    Applies to conv (grouped, depthwise, transposed) and matmul with a float constant weight whose
    result nothing else reads. A batch-norm with no such anchor before it becomes one multiply and
    one add.
    """

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        # Twice: the multiply and add that a batch-norm becomes are folded the second time.
        return rewrite_module(rewrite_module(module, _DecomposeBatchNorm), _FoldAffine)


class _DecomposeBatchNorm(Rewriter):
    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        if not isinstance(value, relax.TupleGetItem) or value.index != 0:
            return None
        call = self.value(value.tuple_value)
        if op_name(call) != "relax.nn.batch_norm":
            return None
        x = call.args[0]
        parameters = [constant(argument) for argument in call.args[1:5]]
        shape = shape_of(x)
        if any(p is None for p in parameters) or shape is None:
            return None
        gamma, beta, mean, variance = (np.asarray(p, "float64") for p in parameters)
        attrs = call.attrs
        scale = 1 / np.sqrt(variance + float(attrs.epsilon))
        if attrs.scale:
            scale = scale * gamma
        shift = -mean * scale + (beta if attrs.center else 0)
        axis = int(attrs.axis) % len(shape)
        aligned = [1] * len(shape)
        aligned[axis] = shape[axis]
        dtype = dtype_of(x)
        scaled = self.emit(
            relax.op.multiply(x, array_const(scale.reshape(aligned).astype(dtype))),
            f"{var.name}_scale",
        )
        return relax.op.add(scaled, array_const(shift.reshape(aligned).astype(dtype)))


class _FoldAffine(Rewriter):
    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        name = op_name(value)
        if is_anchor(value):
            return self._scalar_before(value)
        if name in ("relax.add", "relax.subtract", "relax.multiply", "relax.divide"):
            x, array = _with_constant(value, str(name))
            if array is None:
                return None
            if name in ("relax.add", "relax.subtract"):
                return self._bias(x, -array if name == "relax.subtract" else array, value)
            return self._scale(x, 1 / array if name == "relax.divide" else array)
        return None

    def _bias(self, x: Expr, bias: np.ndarray, value: Expr) -> Expr | None:
        """`anchor + a + b => anchor + (a + b)`; `anchor - b => anchor + (-b)`."""
        anchor, earlier = self._anchor_and_bias(x)
        if anchor is None:
            return None
        values = per_channel(bias, self.value(anchor))
        if values is None:
            return None
        if earlier is not None and self.uses(x) == 1:
            self.replace(x, self._add(anchor, earlier + values))
            return x
        if op_name(value) == "relax.subtract" and earlier is None:
            return self._add(anchor, values)
        return None

    def _scale(self, x: Expr, scale: np.ndarray) -> Expr | None:
        """`(anchor(x, w) + b) * s => anchor(x, w * s) + b * s`."""
        anchor, bias = self._anchor_and_bias(x)
        if anchor is None or self.uses(anchor) != 1 or self.uses(x) != 1:
            return None
        call = self.value(anchor)
        weight = constant(call.args[1])
        factors = per_channel(scale, call)
        if weight is None or factors is None or weight.dtype.kind != "f":
            return None
        scaled = scaled_weight(call, weight.astype("float64"), factors.astype("float64"))
        if scaled is None:
            return None
        self.replace(anchor, with_weight(call, array_const(scaled.astype(weight.dtype))))
        if bias is not None:
            self.replace(x, self._add(anchor, bias * factors))
        return x

    def _scalar_before(self, value: Expr) -> Expr | None:
        """`anchor(x * c, w) => anchor(x, w * c)` for a single number c (Gemm's alpha)."""
        x = value.args[0]
        weight = constant(value.args[1])
        source = self.value(x)
        if weight is None or weight.dtype.kind != "f" or op_name(source) != "relax.multiply":
            return None
        y, array = _with_constant(source, "relax.multiply")
        if array is None or array.size != 1 or shape_of(y) != shape_of(source):
            return None
        if self.uses(x) != 1:
            return None
        scaled = array_const((weight * array.reshape(())).astype(weight.dtype))
        return relax.Call(value.op, [y, scaled], value.attrs, value.ty_args)

    def _anchor_and_bias(self, x: Expr) -> tuple[Var | None, np.ndarray | None]:
        """The anchor's variable and bias `[C]` when `x` is an anchor or anchor + constant."""
        call = self.value(x)
        if is_anchor(call) and isinstance(x, tvm.ir.Var):
            return x, None
        if op_name(call) != "relax.add":
            return None, None
        anchor, array = _with_constant(call, "relax.add")
        if array is None or not isinstance(anchor, tvm.ir.Var) or not is_anchor(self.value(anchor)):
            return None, None
        bias = per_channel(array, self.value(anchor))
        if bias is None or self.uses(anchor) != 1:
            return None, None
        return anchor, bias

    def _add(self, anchor: Var, bias: np.ndarray) -> Expr:
        call = self.value(anchor)
        values = broadcast_channels(np.asarray(bias), call).astype(dtype_of(call))
        return relax.op.add(anchor, array_const(values))


def _with_constant(call: Expr, name: str) -> tuple[Expr, np.ndarray | None]:
    """`(x, c)` of `x op c` (or `c op x` where the order does not matter); float only."""
    order = ((0, 1), (1, 0)) if name in ("relax.add", "relax.multiply") else ((0, 1),)
    for first, second in order:
        array = constant(call.args[second])
        if array is not None and array.dtype.kind == "f":
            return call.args[first], array
    return call, None
