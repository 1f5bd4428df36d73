"""ADD and SUB of two tensors of codes under the TFLite rule.

Numerics in relay_passes/numerics/tflite.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx

from .prim import BROADCAST, make_prim_func
from .requantize import at, rounding_doubling_high_mul

Multiplier = tuple[int, int]  # Q31 mantissa, exponent


def tflite_add(
    shapes: tuple[Sequence[int], Sequence[int]],
    dtype: str,
    zero_points: tuple[int, int, int],
    multipliers: tuple[Multiplier, Multiplier, Multiplier],
    left_shift: int,
    sign: int,
    bounds: tuple[int, int],
    out_shape: Sequence[int],
    out_dtype: str,
) -> tirx.PrimFunc:
    """(a, b) -> clamp(scale(scale_a((a - z_a) << s) + sign * scale_b((b - z_b) << s)) + z_y).

    `zero_points` and `multipliers` are those of a, b and the result; operands broadcast.
    """
    a = te.placeholder(shapes[0], dtype, name="a")
    b = te.placeholder(shapes[1], dtype, name="b")

    def const(value: int) -> tirx.PrimExpr:
        return tirx.const(value, "int32")

    def scaled(x: tirx.PrimExpr, multiplier: Multiplier) -> tirx.PrimExpr:
        mantissa, exponent = multiplier
        product = rounding_doubling_high_mul(x << const(max(exponent, 0)), const(mantissa))
        if exponent >= 0:
            return product
        # Half away from zero; few copies of `product`: many cost TVM's simplifier seconds.
        half = const(1 << (-exponent - 1)) + (product >> const(31))
        return (product + half) >> const(-exponent)

    def result(total: tirx.PrimExpr) -> tirx.PrimExpr:
        """Scaled, plus the zero point."""
        mantissa, exponent = multipliers[2]
        addend = (1 << max(-exponent - 1, 0)) + (zero_points[2] << max(-exponent, 0))
        if exponent < 0 and bounds[0] >= zero_points[2] and abs(addend) < 1 << 30:
            # What rounds the other way is clamped (`rounded_once` of numerics/tflite.py).
            product = rounding_doubling_high_mul(total, const(mantissa))
            return (product + const(addend)) >> const(-exponent)
        return scaled(total, multipliers[2]) + const(zero_points[2])

    def term(operand: te.Tensor, i: Sequence[tirx.Var], which: int) -> tirx.PrimExpr:
        centred = at(operand, i).astype("int32") - const(zero_points[which])
        if multipliers[which] == (1 << 30, 0):  # exactly a half, of the operand with more scale
            return centred << const(left_shift - 1)
        return scaled(centred << const(left_shift), multipliers[which])

    def compute(*i: tirx.Var) -> tirx.PrimExpr:
        left, right = term(a, i, 0), term(b, i, 1)
        total = left + right if sign > 0 else left - right
        code = result(total)
        return te.max(te.min(code, const(bounds[1])), const(bounds[0])).astype(out_dtype)

    out = te.compute(out_shape, compute, name="tflite_add")
    return make_prim_func("tflite_add", [a, b], out, ["data", "data"], BROADCAST, {"sign": sign})
