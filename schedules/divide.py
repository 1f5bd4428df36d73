"""Integer division of sums by counts, rounded half away from zero: TFLite's average pooling."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx

from .prim import BROADCAST, make_prim_func
from .requantize import at


def divide_half_away(
    shape: Sequence[int], count_shape: Sequence[int], bounds: tuple[int, int], dtype: str
) -> tirx.PrimFunc:
    """(sums int32, counts int32 > 0) -> clamp(round(sums / counts)), counts broadcasting."""
    sums = te.placeholder(shape, "int32", name="sums")
    counts = te.placeholder(count_shape, "int32", name="counts")
    low, high = (tirx.const(bound, "int32") for bound in bounds)

    def compute(*i: tirx.Var) -> tirx.PrimExpr:
        total, count = sums[i], at(counts, i)
        half = count >> tirx.const(1, "int32")
        up, down = tirx.truncdiv(total + half, count), tirx.truncdiv(total - half, count)
        rounded = tirx.Select(total > tirx.const(0, "int32"), up, down)
        return te.max(te.min(rounded, high), low).astype(dtype)

    out = te.compute(shape, compute, name="divide")
    return make_prim_func("divide_half_away", [sums, counts], out, ["data", "scales"], BROADCAST)
