"""Requantisation kernels: the naive description of `relay_passes/numerics/requantize.py` in TE.

All are element-wise over the accumulator, so they fuse behind the kernel that produced it.
Constants broadcast from the right as in NumPy: shape [C] against [N, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import te, tirx

from .prim import BROADCAST, make_prim_func


def at(tensor: te.Tensor, indices: Sequence[tirx.PrimExpr]) -> tirx.PrimExpr:
    """tensor[indices] with NumPy broadcasting from the right."""
    rank = len(tensor.shape)
    if rank == 0:
        return tensor()
    # A scalar's constants have one axis of size 1 and the scalar itself none.
    tail = [0] * max(rank - len(indices), 0) + list(indices)[max(len(indices) - rank, 0) :]
    return tensor[
        tuple(0 if int(dim) == 1 else index for dim, index in zip(tensor.shape, tail, strict=True))
    ]


def _const(value: int | float, dtype: str) -> tirx.PrimExpr:
    return tirx.const(value, dtype)


def _clamp(value: tirx.PrimExpr, low: tirx.PrimExpr, high: tirx.PrimExpr) -> tirx.PrimExpr:
    return te.max(te.min(value, high), low)


def scale_float32(x: tirx.PrimExpr, multiplier: tirx.PrimExpr) -> tirx.PrimExpr:
    """nearbyint(float32(x) * multiplier): half to even, one instruction, no float add."""
    return tirx.nearbyint(x.astype("float32") * multiplier)


def round_half_away(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """C's roundf. (TVM's LLVM back end rounds `round` half to even.)"""
    whole = tirx.trunc(x)
    rest = x - whole  # exact
    up = tirx.Select(rest >= _const(0.5, "float32"), _const(1.0, "float32"), _const(0.0, "float32"))
    down = tirx.Select(
        rest <= _const(-0.5, "float32"), _const(1.0, "float32"), _const(0.0, "float32")
    )
    return whole + (up - down)


def rounding_doubling_high_mul(x: tirx.PrimExpr, mantissa: tirx.PrimExpr) -> tirx.PrimExpr:
    """gemmlowp SaturatingRoundingDoublingHighMul; mantissa is never INT32_MIN, so no saturation.

    Its nudge and truncating division amount to rounding half up.
    """
    product = x.astype("int64") * mantissa.astype("int64")
    return ((product + _const(1 << 30, "int64")) >> _const(31, "int64")).astype("int32")


def rounding_divide_by_pot(x: tirx.PrimExpr, exponent: tirx.PrimExpr) -> tirx.PrimExpr:
    """gemmlowp RoundingDivideByPOT, 0 <= exponent <= 31."""
    mask = ((_const(1, "int64") << exponent.astype("int64")) - _const(1, "int64")).astype("int32")
    remainder = tirx.bitwise_and(x, mask)
    threshold = (mask >> _const(1, "int32")) + (x < _const(0, "int32")).astype("int32")
    return (x >> exponent) + (remainder > threshold).astype("int32")


def multiply_by_quantized_multiplier(
    x: tirx.PrimExpr, mantissa: tirx.PrimExpr, exponent: tirx.PrimExpr
) -> tirx.PrimExpr:
    """TFLite MultiplyByQuantizedMultiplier with double rounding."""
    zero, exponent = _const(0, "int32"), exponent.astype("int32")
    left, right = te.max(exponent, zero), te.max(zero - exponent, zero)
    return rounding_divide_by_pot(rounding_doubling_high_mul(x << left, mantissa), right)


def multiply_wide(
    x: tirx.PrimExpr, mantissa: tirx.PrimExpr, exponent: tirx.PrimExpr
) -> tirx.PrimExpr:
    """TFLite's multiplication of an int64 accumulator: Q15 mantissa, one rounding, half up."""
    shift = (_const(15, "int32") - exponent.astype("int32")).astype("int64")
    half = _const(1, "int64") << (shift - _const(1, "int64"))
    return ((x * mantissa.astype("int64") + half) >> shift).astype("int32")


def multiply_small(
    x: tirx.PrimExpr, mantissa: tirx.PrimExpr, exponent: tirx.PrimExpr
) -> tirx.PrimExpr:
    """The same for |x| < 2^30 and exponents below 0, where nothing overflows: what rounds half away
    from zero is an addition."""
    product = rounding_doubling_high_mul(x, mantissa)
    right = _const(0, "int32") - exponent.astype("int32")
    half = (_const(1, "int32") << (right - _const(1, "int32"))) + (product >> _const(31, "int32"))
    return (product + half) >> right


def multiply_float64(x: tirx.PrimExpr, multiplier: tirx.PrimExpr) -> tirx.PrimExpr:
    """round(float64(x) * multiplier), half away from zero.

    Without a float addition, which a back end could contract: twice the product, truncated, is
    halved in integers.
    """
    twice = x.astype("float64") * (multiplier * _const(2.0, "float64"))
    limit = _const(float(1 << 30), "float64")
    whole = _clamp(twice, _const(-float(1 << 30), "float64"), limit).astype("int32")
    positive = (whole >= _const(0, "int32")).astype("int32")
    return (whole + positive) >> _const(1, "int32")


def multiply_high(x: tirx.PrimExpr, mantissa: tirx.PrimExpr, shift: tirx.PrimExpr) -> tirx.PrimExpr:
    """x * mantissa / 2^(32 + shift), one rounding, half up; shift is at least 1.

    The low 32 bits of the product decide nothing, as half a unit has none of them.
    """
    shift = shift.astype("int32")
    product = x.astype("int64") * mantissa.astype("int64")
    high = (product >> _const(32, "int64")).astype("int32")
    half = _const(1, "int32") << (shift - _const(1, "int32"))
    return (high + half) >> shift


def rounded_once(
    x: tirx.PrimExpr, mantissa: tirx.PrimExpr, shift: tirx.PrimExpr, zero_point: int
) -> tirx.PrimExpr:
    """Scaled, plus the zero point: `scale_once` of numerics/tflite.py."""
    shift = shift.astype("int32")
    # Half a unit and the zero point.
    addend = _const(2 * zero_point + 1, "int32") << (shift - _const(1, "int32"))
    return (rounding_doubling_high_mul(x, mantissa) + addend) >> shift


# Rules that scale to an integer: the constants that they multiply by, and how. Exponents and shifts
# are bytes, of which a network has one for each channel of every layer.
_Q31 = (("mantissa", "int32"), ("exponent", "int8"))
_SHIFTED = (("mantissa", "int32"), ("shift", "int8"))
INTEGER_RULES: dict[str, tuple[tuple[tuple[str, str], ...], Callable[..., tirx.PrimExpr]]] = {
    "tflite": (_Q31, lambda x, *q31: multiply_by_quantized_multiplier(x.astype("int32"), *q31)),
    "tflite_small": (_Q31, lambda x, *q31: multiply_small(x.astype("int32"), *q31)),
    "tflite_wide": (_Q31, lambda x, *q15: multiply_wide(x.astype("int64"), *q15)),
    "high": (
        _SHIFTED,
        lambda x, *q31: multiply_high(x.astype("int32"), *q31),
    ),
    "float64": ((("multiplier", "float64"),), multiply_float64),
}


def factors_of(rule: str) -> tuple[tuple[str, str], ...]:
    """(name, dtype) of what a rule multiplies by, one of each for a channel."""
    if rule == "float32":
        return (("multiplier", "float32"),)
    if rule == "rounded_once":
        return _SHIFTED
    if rule not in INTEGER_RULES:
        known = ", ".join(["float32", "rounded_once", *INTEGER_RULES])
        raise ValueError(f"unknown requantisation rule {rule!r}; known: {known}")
    return INTEGER_RULES[rule][0]


def requantize(
    shape: Sequence[int],
    acc_dtype: str,
    constant_shape: Sequence[int],
    zero_point: int,
    bounds: tuple[int, int],
    dtype: str,
    rule: str,
    wide: str | None = None,
    fits_int32: bool = False,
    factor_shape: Sequence[int] | None = None,
) -> tirx.PrimFunc:
    """(acc, bias, multiplier[, exponent]) -> clamp(scale(acc + bias) + zero_point).

    `fits_int32` says that no scaled sum leaves int32, so that the clamp can wait for the integers.

    bias and sum are int32 (int64 when acc_dtype is, or when `wide` says so). The multiplier is
    float32 (rule float32), float64 (rule float64) or an int32 mantissa with an int8 exponent
    (rules tflite, tflite_small and tflite_wide) or shift (rules high and rounded_once). The bias is
    of `constant_shape`, and so are the others unless `factor_shape` says otherwise.
    """
    wide = wide or _wide(acc_dtype)
    factor_shape = constant_shape if factor_shape is None else factor_shape
    acc = te.placeholder(shape, acc_dtype, name="acc")
    bias = te.placeholder(constant_shape, wide, name="bias")
    low, high = bounds
    factors = [te.placeholder(factor_shape, kind, name=name) for name, kind in factors_of(rule)]
    if rule == "float32":

        def compute(*i: tirx.PrimExpr) -> tirx.PrimExpr:
            scaled = scale_float32(acc[i].astype(wide) + at(bias, i), at(factors[0], i))
            if fits_int32:
                code = scaled.astype("int32") + _const(zero_point, "int32")
                return _clamp(code, _const(low, "int32"), _const(high, "int32")).astype(dtype)
            scaled = _clamp(
                scaled, _const(low - zero_point, "float32"), _const(high - zero_point, "float32")
            )
            return (scaled.astype("int32") + _const(zero_point, "int32")).astype(dtype)

    elif rule == "rounded_once":

        def compute(*i: tirx.PrimExpr) -> tirx.PrimExpr:
            total = (acc[i].astype(wide) + at(bias, i)).astype("int32")
            mantissa, shift = (at(factor, i) for factor in factors)
            code = rounded_once(total, mantissa, shift, zero_point)
            return _clamp(code, _const(low, "int32"), _const(high, "int32")).astype(dtype)

    else:
        scale = INTEGER_RULES[rule][1]

        def compute(*i: tirx.PrimExpr) -> tirx.PrimExpr:
            total = acc[i].astype(wide) + at(bias, i)
            scaled = scale(total, *(at(factor, i) for factor in factors))
            scaled = scaled + _const(zero_point, "int32")
            return _clamp(scaled, _const(low, "int32"), _const(high, "int32")).astype(dtype)

    out = te.compute(shape, compute, name="requantize")
    roles = ["data", "bias", *["scales"] * len(factors)]
    return make_prim_func(
        "requantize", [acc, bias, *factors], out, roles, BROADCAST, {"rule": rule}
    )


@dataclass(frozen=True)
class SumTerm:
    """One term of a rescaled sum: integers of `dtype` and `shape`, constants of `constant_shape`.

    `bounds` clamp the rescaled term, in fractions of output steps as the sum counts them; `wide` is
    the dtype in which integer plus bias fits.
    """

    dtype: str
    shape: tuple[int, ...]
    constant_shape: tuple[int, ...]
    bounds: tuple[int, int] | None
    wide: str = "int32"


def requantize_sum(
    shape: Sequence[int],
    terms: Sequence[SumTerm],
    zero_point: int,
    bounds: tuple[int, int],
    dtype: str,
    fraction_bits: int,
    offset_shape: Sequence[int] | None = (1,),
) -> tirx.PrimFunc:
    """(x0, bias0, mult0, x1, bias1, mult1, ...[, offset]) -> clamp(round(Σ clamp((x+b)*m) + o) +
    zero_point).

    Rule float32, half to even. The terms are accumulators or codes and broadcast as in NumPy; mult
    and the int32 offset (none when `offset_shape` is None) hold their reals times 2^fraction_bits.
    bias has the term's `wide` dtype.
    """
    inputs = [
        (
            te.placeholder(term.shape, term.dtype, name=f"x{k}"),
            te.placeholder(term.constant_shape, term.wide, name=f"bias{k}"),
            te.placeholder(term.constant_shape, "float32", name=f"multiplier{k}"),
        )
        for k, term in enumerate(terms)
    ]
    offset = None
    if offset_shape is not None:
        offset = te.placeholder(offset_shape, "int32", name="offset")

    def compute(*i: tirx.PrimExpr) -> tirx.PrimExpr:
        total = _const(0, "int32") if offset is None else at(offset, i)
        for term, (x, bias, mult) in zip(terms, inputs, strict=True):
            fixed = scale_float32(at(x, i).astype(term.wide) + at(bias, i), at(mult, i))
            if term.bounds is not None:
                fixed = _clamp(fixed, *(_const(float(bound), "float32") for bound in term.bounds))
            total = total + fixed.astype("int32")
        rounded = round_shift(total, fraction_bits, zero_point)
        return _clamp(rounded, _const(bounds[0], "int32"), _const(bounds[1], "int32")).astype(dtype)

    out = te.compute(shape, compute, name="requantize_sum")
    roles = ["data", "bias", "scales"] * len(terms)
    tensors = [tensor for term in inputs for tensor in term]
    if offset is not None:
        roles, tensors = [*roles, "bias"], [*tensors, offset]
    return make_prim_func("requantize_sum", tensors, out, roles, BROADCAST)


def _wide(dtype: str) -> str:
    return "int64" if dtype == "int64" else "int32"


def round_shift(x: tirx.PrimExpr, bits: int, plus: int = 0) -> tirx.PrimExpr:
    """int32 x / 2^bits, half to even, plus a number: added before the shift, where it is free."""
    odd = tirx.bitwise_and(x >> _const(bits, "int32"), _const(1, "int32"))
    nudge = (1 << (bits - 1)) - 1 + (plus << bits)
    return (x + (odd + _const(nudge, "int32"))) >> _const(bits, "int32")


def dequantize(
    shape: Sequence[int], dtype: str, constant_shape: Sequence[int], wide: str | None = None
) -> tirx.PrimFunc:
    """(codes or accumulator, bias, scale) -> float32(x + bias) * scale. bias = -zero_point for
    codes.

    bias and sum are int32 (int64 when x is, or when `wide` says so).
    """
    x = te.placeholder(shape, dtype, name="x")
    wide = wide or _wide(dtype)
    bias = te.placeholder(constant_shape, wide, name="bias")
    scale = te.placeholder(constant_shape, "float32", name="scale")
    out = te.compute(
        shape,
        lambda *i: (x[i].astype(wide) + at(bias, i)).astype("float32") * at(scale, i),
        name="dequantize",
    )
    return make_prim_func(
        "dequantize", [x, bias, scale], out, ["data", "bias", "scales"], BROADCAST
    )


def quantize(
    shape: Sequence[int],
    constant_shape: Sequence[int],
    zero_point: int,
    dtype: str,
    rule: str,
) -> tirx.PrimFunc:
    """(x float32, scale) -> clamp(round(x / scale) + zero_point).

    Half to even under rule float32 (ONNX QuantizeLinear), half away from zero under rule tflite.
    """
    x = te.placeholder(shape, "float32", name="x")
    scale = te.placeholder(constant_shape, "float32", name="scale")
    info = np.iinfo(dtype)
    low, high = int(info.min), int(info.max)
    rounding = tirx.nearbyint if rule == "float32" else round_half_away

    def compute(*i: tirx.PrimExpr) -> tirx.PrimExpr:
        code = rounding(x[i] / at(scale, i))
        code = _clamp(
            code, _const(low - zero_point, "float32"), _const(high - zero_point, "float32")
        )
        return (code.astype("int32") + _const(zero_point, "int32")).astype(dtype)

    out = te.compute(shape, compute, name="quantize")
    return make_prim_func(
        "quantize", [x, scale], out, ["data", "scales"], BROADCAST, {"rule": rule}
    )


def clip(shape: Sequence[int], dtype: str, bounds: tuple[int, int]) -> tirx.PrimFunc:
    """(codes) -> min(max(codes, low), high): ReLU and friends between equal scales."""
    x = te.placeholder(shape, dtype, name="x")
    out = te.compute(
        shape,
        lambda *i: _clamp(x[i], _const(bounds[0], dtype), _const(bounds[1], dtype)),
        name="clip",
    )
    return make_prim_func("clip", [x], out, ["data"], BROADCAST)
