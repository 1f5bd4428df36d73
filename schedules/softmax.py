"""Integer softmax: one table of exponentials, one integer division."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm import te, tirx

from .prim import OPAQUE, make_prim_func

# The output is (e * round(2^16 / s_y)) / (sum * 2^16): 16 fraction bits of the reciprocal scale.
RECIPROCAL_BITS = 16


def table_bits(length: int, reciprocal: int) -> int:
    """Fraction bits of the exponentials: an entry fits int32, what is divided int64."""
    total = 62 - RECIPROCAL_BITS - math.ceil(math.log2(length))
    return min(30, total, 62 - math.ceil(math.log2(reciprocal)))


def softmax(
    shape: Sequence[int],
    axis: int,
    dtype: str,
    reciprocal: int,
    zero_point: int,
    bounds: tuple[int, int],
    out_dtype: str,
) -> tirx.PrimFunc:
    """(codes, table int32) -> clamp(round(table[max - code] / Σ / s_y) + zero_point) along `axis`.

    table[d] = round(2^k exp(-d * s_x)) with k = `table_bits`; the sum is int64.
    reciprocal = round(2^RECIPROCAL_BITS / s_y). Rounds half to even.
    """
    entries = 256 if dtype.endswith("int8") else 65536
    x = te.placeholder(shape, dtype, name="x")
    table = te.placeholder((entries,), "int32", name="table")
    reduced = [dim for k, dim in enumerate(shape) if k != axis]
    k_max, k_sum = (te.reduce_axis((0, shape[axis]), name) for name in ("k_max", "k_sum"))

    def full(index: Sequence[tirx.PrimExpr], position: tirx.PrimExpr) -> tuple[tirx.PrimExpr, ...]:
        return (*index[:axis], position, *index[axis:])

    peak = te.compute(
        reduced, lambda *i: te.max(x[full(i, k_max)].astype("int32"), axis=k_max), name="peak"
    )

    def outer(index: Sequence[tirx.PrimExpr]) -> tuple[tirx.PrimExpr, ...]:
        return (*index[:axis], *index[axis + 1 :])

    exps = te.compute(
        shape, lambda *i: table[peak[outer(i)] - x[i].astype("int32")], name="exponentials"
    )
    total = te.compute(
        reduced,
        lambda *i: te.sum(exps[full(i, k_sum)].astype("int64"), axis=k_sum),
        name="total",
    )

    def divide(*i: tirx.Var) -> tirx.PrimExpr:
        one = tirx.const(1, "int64")
        denominator = total[outer(i)] << tirx.const(RECIPROCAL_BITS, "int64")
        numerator = exps[i].astype("int64") * tirx.const(reciprocal, "int64")
        nudged = numerator + (denominator >> one)
        half_up = tirx.truncdiv(nudged, denominator)
        is_half = (half_up * denominator).equal(nudged).astype("int64")
        code = half_up - (is_half & half_up & one) + tirx.const(zero_point, "int64")
        low, high = (tirx.const(bound, "int64") for bound in bounds)
        return te.max(te.min(code, high), low).astype(out_dtype)

    out = te.compute(shape, divide, name="softmax")
    parameters = {
        "axis": axis, "reciprocal": reciprocal, "zero_point": zero_point, "bounds": list(bounds),
    }  # fmt: skip
    return make_prim_func("softmax", [x, table], out, ["data", "table"], OPAQUE, parameters)
