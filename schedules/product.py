"""Element-wise product of two quantised tensors: exact in integers, rescaled behind it."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx

from .prim import BROADCAST, make_prim_func
from .requantize import at


def product(
    shapes: tuple[Sequence[int], Sequence[int]],
    dtypes: tuple[str, str],
    zero_points: tuple[int, int],
    out_shape: Sequence[int],
    out_dtype: str = "int32",
) -> tirx.PrimFunc:
    """(a, b) -> (a - z_a) * (b - z_b) in `out_dtype`, broadcasting as in NumPy."""
    a = te.placeholder(shapes[0], dtypes[0], name="a")
    b = te.placeholder(shapes[1], dtypes[1], name="b")

    def compute(*i: tirx.Var) -> tirx.PrimExpr:
        left = at(a, i).astype(out_dtype) - tirx.const(zero_points[0], out_dtype)
        right = at(b, i).astype(out_dtype) - tirx.const(zero_points[1], out_dtype)
        return left * right

    out = te.compute(out_shape, compute, name="product")
    return make_prim_func("product", [a, b], out, ["data", "data"], BROADCAST)
