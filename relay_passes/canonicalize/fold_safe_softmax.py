"""where(all(x == -inf), 0, softmax(x)) => softmax(x), where no row of x is -inf throughout.

PyTorch's attention guards its softmax against rows that a mask hides altogether: softmax has no
value there, and the guard makes them zero. The rewrite is exact where a row cannot be hidden: in
products of float tensors, which hold -inf only if they overflow (beyond 3e38), and in such products
plus a constant mask that leaves one element of each row. A mask that is an input keeps the guard.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm.ir import Expr

from ..ir import constant, dtype_of, ints, op_name, shape_of
from .rewrite import Rewriter, Var, rewrite_module

_PRODUCTS = ("relax.matmul", "relax.nn.conv1d", "relax.nn.conv2d")
_MOVES = ("relax.reshape", "relax.permute_dims")


@tvm.transform.module_pass(opt_level=0, name="FoldSafeSoftmax")
class FoldSafeSoftmax:
    """where(all(x == -inf), 0, softmax(x)) => softmax(x)."""

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        return rewrite_module(module, _FoldSafeSoftmax)


class _FoldSafeSoftmax(Rewriter):
    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        if op_name(value) != "relax.where":
            return None
        hidden, zeros, softmax = value.args
        call = self.value(softmax)
        if op_name(call) != "relax.nn.softmax" or not self._is_zero(zeros):
            return None
        x = call.args[0]
        last = len(shape_of(x) or ()) - 1
        if last < 0 or int(call.attrs.axis) not in (-1, last):
            return None
        guarded = self._hidden_rows_of(hidden, last)
        if guarded is None or not guarded.same_as(x) or not self._leaves_something(x):
            return None
        return softmax

    def _is_zero(self, expr: Expr) -> bool:
        value = self.value(expr)
        if op_name(value) == "relax.full_like":
            value = value.args[1]
        array = constant(value)
        return array is not None and not array.any()

    def _hidden_rows_of(self, expr: Expr, last: int) -> Expr | None:
        """`x` where `expr` is not(any(not(x == -inf))) along its last axis."""
        expr = self._argument(expr, "relax.logical_not")
        expr = self._argument(expr, "relax.astype")
        reduced = self.value(expr)
        if op_name(reduced) != "relax.max" or not reduced.attrs.keepdims:
            return None
        axes = reduced.attrs.axis
        if axes is None or [axis % (last + 1) for axis in ints(axes)] != [last]:
            return None
        expr = self._argument(reduced.args[0], "relax.astype")
        expr = self._argument(expr, "relax.logical_not")
        compared = self.value(expr)
        if op_name(compared) != "relax.equal":
            return None
        bound = constant(compared.args[1])
        return compared.args[0] if bound is not None and np.isneginf(bound).all() else None

    def _argument(self, expr: Expr | None, name: str) -> Expr | None:
        value = self.value(expr)
        return value.args[0] if op_name(value) == name else None

    def _leaves_something(self, x: Expr) -> bool:
        """Whether each row of `x` along the last axis has an element other than -inf."""
        value = self.value(x)
        if op_name(value) != "relax.add":
            return self._is_finite(x)
        for position in (0, 1):
            mask, shape = constant(value.args[position]), shape_of(value)
            if mask is None or shape is None:
                continue
            rows = np.broadcast_to(mask, shape)
            leaves = bool((~np.isneginf(rows)).any(axis=-1).all())
            return leaves and self._is_finite(value.args[1 - position])
        return self._is_finite(x)

    def _is_finite(self, expr: Expr) -> bool:
        """Whether only an overflow could make `expr` infinite: it is made of products."""
        value = self.value(expr)
        name = op_name(value)
        if name in _PRODUCTS:
            return dtype_of(value) == "float32"
        if name in _MOVES:
            return self._is_finite(value.args[0])
        if name in ("relax.multiply", "relax.add", "relax.subtract"):
            return all(self._is_finite(argument) for argument in value.args)
        array = constant(value)
        return array is not None and bool(np.isfinite(array).all())
