"""A kernel alone, with a bias and what usually follows: for comparing costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .anchors import describe
from .requantize import round_shift
from .spec import KernelSpec

if TYPE_CHECKING:
    from tvm import tirx

_SHIFT = 8  # any: codes of a byte from sums of some thousand products


def lone_layer(spec: KernelSpec) -> tirx.PrimFunc:
    """The naive kernel of a weighted spec with bias and ReLU, or bias and requantisation to the
    data's integers; arguments: data, weights, bias, result."""
    from tvm import te, tirx

    inputs, acc = describe(spec)
    dtype, acc_dtype = str(inputs[0].dtype), str(acc.dtype)
    shape = [int(side) for side in acc.shape]
    bias = te.placeholder((shape[-1],), acc_dtype, name="bias")
    total = te.compute(shape, lambda *i: acc[i] + bias[i[-1]], name="total")
    if acc_dtype == "float32":
        out = te.compute(shape, lambda *i: te.max(total[i], tirx.const(0.0, acc_dtype)), name="out")
    else:
        low, high = te.min_value(dtype), te.max_value(dtype)

        def narrowed(*index: tirx.Var) -> tirx.PrimExpr:
            shifted = round_shift(total[index].astype("int32"), _SHIFT)
            bounded = te.min(te.max(shifted, low.astype("int32")), high.astype("int32"))
            return bounded.astype(dtype)

        out = te.compute(shape, narrowed, name="out")
    func: tirx.PrimFunc = te.create_prim_func([*inputs, bias, out])
    return func.without_attr("global_symbol")
