"""matmul(concat(a, b), w) => matmul(a, w_a) + matmul(b, w_b): recurrent cells join input and state.

Exact algebra, made for what follows: joined, a and b share one activation scale, and their weights
one scale per output channel, however different their ranges are. In a GRU over spectra of +-100 and
states of +-1 either the state or the input's weights would lose nearly all of their bits.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr

from ..ir import array_const, constant, op_name, shape_of
from .rewrite import Rewriter, Var, rewrite_module


@tvm.transform.module_pass(opt_level=0, name="SplitConcat")
class SplitConcat:
    """Applies to a float constant weight [K, N] behind a concat along the last axis."""

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        return rewrite_module(module, _SplitConcat)


class _SplitConcat(Rewriter):
    def __init__(self, function: relax.Function) -> None:
        super().__init__(function)
        # The steps of an unrolled loop share their weights, before and after.
        self.slices: dict[tuple[tvm.ir.Expr, int, int], tvm.ir.Expr] = {}

    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        if op_name(value) != "relax.matmul":
            return None
        weight = constant(value.args[1])
        joined = self.value(value.args[0])
        shape = shape_of(value.args[0])
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            return None
        if op_name(joined) != "relax.concat" or shape is None:
            return None
        if int(joined.attrs.axis) % len(shape) != len(shape) - 1:
            return None
        parts = list(getattr(self.value(joined.args[0]), "fields", ()))
        widths = [(shape_of(part) or (0,))[-1] for part in parts]
        if len(parts) < 2 or sum(widths) != weight.shape[0] or 0 in widths:
            return None
        terms: list[Expr] = []
        fixed: np.ndarray | None = None
        begin = 0
        for index, (part, width) in enumerate(zip(parts, widths, strict=True)):
            end = begin + width
            array = constant(part)
            if array is not None:  # an initial state
                product = array @ weight[begin:end]
                fixed = product if fixed is None else fixed + product
            else:
                rows = self._rows(value.args[1], weight, begin, end)
                terms.append(self.emit(relax.op.matmul(part, rows), f"{var.name}_in{index}"))
            begin = end
        if not terms:
            return None
        total = terms[0]
        for index, term in enumerate(terms[1:]):
            total = relax.op.add(total, term)
            if index + 2 < len(terms) or fixed is not None:
                total = self.emit(total, f"{var.name}_sum{index}")
        if fixed is not None and np.any(fixed):
            return relax.op.add(total, array_const(fixed.astype(np.float32)))
        return total

    def _rows(self, expr: Expr, weight: np.ndarray, begin: int, end: int) -> Expr:
        key = (expr, begin, end)
        if key not in self.slices:
            self.slices[key] = array_const(np.ascontiguousarray(weight[begin:end]))
        return self.slices[key]
