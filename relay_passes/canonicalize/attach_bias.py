"""(anchor(x, w) + y) + b => (anchor(x, w) + b) + y: the bias next to the product it belongs to.

Recurrent cells add their bias behind the sum of two products. Next to one of them it is that
layer's bias: stored in its integers, and corrected like any other.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import Expr

from ..ir import constant, op_name
from .anchors import is_anchor, per_channel
from .rewrite import Rewriter, Var, rewrite_module


@tvm.transform.module_pass(opt_level=0, name="AttachBias")
class AttachBias:
    """Applies to a constant with one number for each output channel."""

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        return rewrite_module(module, _AttachBias)


class _AttachBias(Rewriter):
    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        if op_name(value) != "relax.add":
            return None
        for total, bias in (value.args, reversed(value.args)):
            inner = self.value(total)
            if constant(bias) is None or op_name(inner) != "relax.add" or self.uses(total) != 1:
                continue
            for layer, other in (inner.args, reversed(inner.args)):
                if constant(other) is None and self._takes(layer, bias):
                    biased = self.emit(relax.op.add(layer, bias), f"{layer.name}_bias")
                    return relax.op.add(biased, other)
        return None

    def _takes(self, layer: Expr, bias: Expr) -> bool:
        call = self.value(layer)
        array = constant(bias)
        return (
            is_anchor(call)
            and self.uses(layer) == 1
            and array is not None
            and array.size > 1
            and per_channel(array, call) is not None
        )
