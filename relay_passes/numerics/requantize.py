"""Requantisation: int32 accumulators to int8/int16 activations, one stated rule per module.

A rule turns a positive-or-negative real multiplier into constants at compile time and says how an
integer is scaled by them at run time. The functions here are the specification, in NumPy; the
kernels in `schedules/requantize.py` follow them bit for bit on every target.

    float32   y = clamp(rint(float32(acc) * float32(m)) + z)      round half to even
    tflite    y = clamp(MultiplyByQuantizedMultiplier(acc, m) + z)  Q31 multiplier, double rounding

`float32` needs one correctly rounded conversion, one multiplication and one rounding: there is no
float addition that a back end could contract into an FMA, so all IEEE targets agree. ONNX Runtime
uses the same rule for QLinearConv. `tflite` is the rule of the TensorFlow Lite 8-bit quantisation
specification (Jacob et al. 2018, section 2.2; gemmlowp fixed-point arithmetic) as its reference
kernels execute it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

Rule = Literal["float32", "tflite"]
RULES: tuple[Rule, ...] = ("float32", "tflite")

# Fraction bits that the terms of a rescaled sum keep at most: a term is a float32 product, so that
# more than 24 significant bits would say nothing.
MAX_SUM_FRACTION_BITS = 20
ENOUGH_SUM_FRACTION_BITS = 16  # a clamp costs more than the bits are worth


def quantize_multiplier(real: float) -> tuple[int, int]:
    """Real multiplier => (Q31 mantissa, exponent): real ~ mantissa * 2^(exponent - 31).

    TFLite `QuantizeMultiplier` (tensorflow/lite/kernels/internal/quantization_util). Zero and
    multipliers below 2^-31 give (0, 0).
    """
    if real == 0.0:
        return 0, 0
    mantissa, exponent = math.frexp(real)
    fixed = math.floor(abs(mantissa) * (1 << 31) + 0.5)
    fixed = fixed if mantissa > 0 else -fixed
    if abs(fixed) == 1 << 31:
        fixed //= 2
        exponent += 1
    if exponent < -31:
        return 0, 0
    if exponent > 30:
        return (1 << 31) - 1, 30
    return fixed, exponent


def quantize_multipliers(real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Element-wise `quantize_multiplier`: float64[...] -> int32[...] mantissas, int32[...]
    exponents."""
    pairs = [quantize_multiplier(float(value)) for value in np.ravel(real)]
    mantissa = np.array([pair[0] for pair in pairs], np.int32).reshape(np.shape(real))
    exponent = np.array([pair[1] for pair in pairs], np.int32).reshape(np.shape(real))
    return mantissa, exponent


def saturating_rounding_doubling_high_mul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """gemmlowp: high 32 bits of 2ab, rounded half away from zero (truncating division)."""
    product = a.astype(np.int64) * b.astype(np.int64)
    nudge = np.where(product >= 0, np.int64(1 << 30), np.int64(1 - (1 << 30)))
    total = product + nudge
    # C division truncates towards zero.
    high = np.where(total >= 0, total >> 31, -((-total) >> 31))
    overflow = (a == b) & (a.astype(np.int64) == -(1 << 31))
    return np.where(overflow, np.int64((1 << 31) - 1), high).astype(np.int32)


def rounding_divide_by_pot(x: np.ndarray, exponent: np.ndarray | np.integer) -> np.ndarray:
    """gemmlowp: x / 2^exponent rounded half away from zero."""
    exponent = np.broadcast_to(np.asarray(exponent, np.int32), np.shape(x))
    mask = ((np.int64(1) << exponent) - 1).astype(np.int32)
    remainder = x & mask
    threshold = (mask >> 1) + (x < 0)
    return (x >> exponent) + (remainder > threshold)


def multiply_by_quantized_multiplier(
    x: np.ndarray, mantissa: np.ndarray | np.integer, exponent: np.ndarray | np.integer
) -> np.ndarray:
    """TFLite `MultiplyByQuantizedMultiplier`, double rounding: int32 -> int32."""
    left = np.maximum(exponent, 0)
    right = np.maximum(-exponent, 0)
    shifted = (x.astype(np.int64) << left).astype(np.int32)
    return rounding_divide_by_pot(
        saturating_rounding_doubling_high_mul(shifted, np.broadcast_to(mantissa, shifted.shape)),
        right,
    )


def scale_float32(x: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """rint(float32(x) * multiplier), still float32: x int32[...], multiplier float32
    broadcastable."""
    return np.rint(x.astype(np.float32) * np.asarray(multiplier, np.float32))


def float32_multiplier(scale: np.ndarray | float, step: float) -> np.ndarray:
    """float32(float32(s_x * s_w) / float32(s_y)): rounded twice, as ONNX Runtime does.

    One rounding would be as good; with another last bit one element in 10^5 differs from it.
    """
    return np.asarray(
        np.asarray(scale, np.float64).astype(np.float32) / np.float32(step), np.float32
    )


def requantize(
    accumulator: np.ndarray,
    bias: np.ndarray,
    multiplier: np.ndarray,
    zero_point: int,
    bounds: tuple[int, int],
    dtype: str,
    rule: Rule = "float32",
) -> np.ndarray:
    """clamp(scale(accumulator + bias) + zero_point): int32[...] -> dtype[...].

    `multiplier` is s_x*s_w/s_y (rule float32: `float32_multiplier`) and broadcasts like `bias`.
    """
    total = accumulator + bias
    low, high = bounds
    if rule == "float32":
        scaled = scale_float32(total, multiplier)
        clipped = np.clip(scaled, np.float32(low - zero_point), np.float32(high - zero_point))
        return (clipped.astype(np.int32) + zero_point).astype(dtype)
    mantissa, exponent = quantize_multipliers(multiplier)
    scaled = multiply_by_quantized_multiplier(total.astype(np.int32), mantissa, exponent)
    return np.clip(scaled.astype(np.int64) + zero_point, low, high).astype(dtype)


def requantize_sum(
    terms: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    zero_point: int,
    bounds: tuple[int, int],
    dtype: str,
    fraction_bits: int,
    offset: np.ndarray | float = 0.0,
    clamps: Sequence[tuple[int, int]] | None = None,
) -> np.ndarray:
    """clamp(round(Σ clamp(rint((x+b)*m*2^F)) + rint(o*2^F)) / 2^F) + zero_point) for terms (x, b,
    m).

    Rule float32. Residual addition without a float add: each term is rounded to F = `fraction_bits`
    fraction bits, the sum and its final rounding (half to even) are integer. `offset` is real, in
    output steps; the terms' `clamps` are integers with F fraction bits.
    """
    unit = 2.0**fraction_bits
    total = np.rint(np.asarray(offset, np.float64) * unit).astype(np.int32)
    for k, (x, bias, multiplier) in enumerate(terms):
        fixed = scale_float32(x + bias, np.asarray(multiplier) * unit)
        low, high = clamps[k] if clamps else (-(2**30), 2**30)
        total = total + np.clip(fixed, np.float32(low), np.float32(high)).astype(np.int32)
    odd = (total >> fraction_bits) & 1
    rounded = (total + odd + (1 << (fraction_bits - 1)) - 1) >> fraction_bits
    return np.clip(rounded + zero_point, *bounds).astype(dtype)


def plan_sum(
    limits: Sequence[float], offset: float, codes: int
) -> tuple[int, tuple[float, ...]] | None:
    """Fraction bits of a rescaled sum, and the bounds that its terms are clamped to; None: no room.

    `limits` bound the terms' magnitudes and `offset` the constant's, all in output steps; the
    output has `codes` codes. The sum stays below 2^30. Where that leaves too few fraction bits, the
    largest term is clamped where the others cannot bring the sum back into the output's range: the
    result is saturated either way.
    """
    bounds = list(limits)
    bits = math.floor(30 - math.log2(max(sum(bounds) + offset, 1.0)))
    if bits >= ENOUGH_SUM_FRACTION_BITS:
        return min(bits, MAX_SUM_FRACTION_BITS), tuple(bounds)
    largest = max(range(len(bounds)), key=bounds.__getitem__)
    others = sum(bounds) - bounds[largest] + offset
    bounds[largest] = min(bounds[largest], others + codes + 1)
    total = max(others + bounds[largest], 1.0)
    bits = min(MAX_SUM_FRACTION_BITS, math.floor(30 - math.log2(total)))
    return (bits, tuple(bounds)) if bits >= 1 else None
