"""Functions of one quantised tensor for every code, as TensorFlow Lite's reference kernels do.

Each takes the parameters (scale, zero point, dtype) of input and output and returns one output code
per input code, smallest first: 256 entries for 8 bits, 65,536 for 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .requantize import (
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    rounding_divide_by_pot,
)
from .tflite import ratio_float32, ratio_float64, round_half_away


class Codes(NamedTuple):
    """real = scale * (code - zero_point)."""

    scale: float
    zero_point: int
    dtype: str

    @property
    def centred(self) -> np.ndarray:
        """Every code less the zero point, int32."""
        info = np.iinfo(self.dtype)
        return np.arange(info.min, info.max + 1, dtype=np.int32) - np.int32(self.zero_point)

    @property
    def values(self) -> np.ndarray:
        """The real value of every code, float32."""
        return np.float32(self.scale) * self.centred.astype(np.float32)

    def clamp(
        self, codes: np.ndarray, low: int | None = None, high: int | None = None
    ) -> np.ndarray:
        """To the dtype, and to [low, high]."""
        info = np.iinfo(self.dtype)
        lowest = info.min if low is None else max(low, info.min)
        highest = info.max if high is None else min(high, info.max)
        return np.minimum(np.maximum(codes, lowest), highest).astype(self.dtype)

    def bound(self, real: float) -> int | None:
        """Code of an activation's bound; None for an infinite one."""
        if math.isinf(real):
            return None
        quotient = np.float32(real) / np.float32(self.scale)
        return int(round_half_away(np.asarray(quotient))) + self.zero_point


def _multiply(x: np.ndarray, real: float) -> np.ndarray:
    mantissa, exponent = quantize_multiplier(real)
    return multiply_by_quantized_multiplier(x, np.int32(mantissa), np.int32(exponent)).astype(
        np.int64
    )


def rescale(source: Codes, target: Codes) -> np.ndarray:
    """QUANTIZE of codes."""
    scaled = _multiply(source.centred, ratio_float64(source.scale, target.scale))
    return target.clamp(scaled + target.zero_point)


def clipped(source: Codes, target: Codes, low: float, high: float) -> np.ndarray:
    """RELU, RELU6, RELU_N1_TO_1: rescaled between the codes of the bounds."""
    scaled = _multiply(source.centred, ratio_float32(source.scale, target.scale))
    return target.clamp(scaled + target.zero_point, target.bound(low), target.bound(high))


def leaky_relu(source: Codes, target: Codes, alpha: float) -> np.ndarray:
    """LEAKY_RELU: one multiplier a side, the product with alpha in float32."""
    slope = float(np.float32(source.scale) * np.float32(alpha) / np.float32(target.scale))
    x = source.centred
    below = math.copysign(1, slope) * _multiply(x, abs(slope))
    scaled = np.where(x >= 0, _multiply(x, ratio_float32(source.scale, target.scale)), below)
    return target.clamp(scaled.astype(np.int64) + target.zero_point)


def prelu(source: Codes, target: Codes, slope: np.ndarray, slope_scale: float) -> np.ndarray:
    """PRELU: a row for each of the centred slope codes [C]; multipliers in float32."""
    x = source.centred
    product = float(np.float32(source.scale) * np.float32(slope_scale))
    below = _multiply(x * slope.astype(np.int32)[:, None], ratio_float32(product, target.scale))
    above = _multiply(x, ratio_float32(source.scale, target.scale))
    return target.clamp(np.where(x >= 0, above, below) + target.zero_point)


def evaluated(
    source: Codes, target: Codes, function: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Any float32 function; the reciprocal of the output's scale is rounded to float32."""
    inverse = np.float32(1) / np.float32(target.scale)
    scaled = function(source.values).astype(np.float32) * inverse
    return target.clamp(round_half_away(scaled) + np.float32(target.zero_point))


def joined(source: Codes, target: Codes) -> np.ndarray:
    """An operand of CONCATENATION with other parameters (uint8 only): float32 arithmetic."""
    scale = np.float32(source.scale) * (np.float32(1) / np.float32(target.scale))
    bias = np.float32(-source.zero_point) * scale
    raw = source.centred + source.zero_point
    return target.clamp(round_half_away(raw.astype(np.float32) * scale + bias) + target.zero_point)


def exp_float32(x: np.ndarray) -> np.ndarray:
    """exp, correctly rounded to float32."""
    return np.exp(x.astype(np.float64)).astype(np.float32)


def sigmoid_float32(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float32 steps."""
    return np.float32(1) / (np.float32(1) + exp_float32(-x))


def tanh_float32(x: np.ndarray) -> np.ndarray:
    """tanh, correctly rounded to float32."""
    return np.tanh(x.astype(np.float64)).astype(np.float32)


def gelu_float32(x: np.ndarray) -> np.ndarray:
    """x/2 erfc(-x / sqrt(2)) in float32 steps."""
    root = np.float32(-math.sqrt(0.5))
    erfc = np.vectorize(math.erfc, otypes=[np.float64])
    return np.float32(0.5) * x * erfc((x * root).astype(np.float64)).astype(np.float32)


def gelu_tanh_float32(x: np.ndarray) -> np.ndarray:
    """x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in float32 steps."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (np.float32(1) + tanh_float32(inner))


SIGMOID_STEPS = 24  # table entries a unit


def _sigmoid_table() -> np.ndarray:
    """sigmoid(k / 24), k = 0..255, 16 fraction bits: 16-bit LOGISTIC and TANH interpolate in it.

    Entries are raised by h^2 |f''| / 16, which halves the largest error of linear interpolation,
    and the last one is that of infinity.
    """
    value = 1 / (1 + np.exp(-np.arange(256) / SIGMOID_STEPS))
    curvature = value * (1 - value) * (1 - 2 * value)
    table = np.rint((value - curvature / (16 * SIGMOID_STEPS**2)) * 65536).astype(np.int64)
    table[-1] = 65535
    return table


def _sigmoid_input(source: Codes, integer_scale_shifts: tuple[int, ...]) -> np.ndarray:
    """Codes => the table's unit, 1 / (3 * 4096)."""
    mantissa, log2 = math.frexp(float(np.float32(source.scale)))
    shift = 12 + log2 - 1
    codes = source.centred.astype(np.int64)
    if mantissa == 0.5 and shift in integer_scale_shifts:
        return codes * (3 << shift)
    multiplier, shift = float(np.float32(source.scale)) * 4096.0 * 3.0, 0
    while multiplier <= 32767 / 2 and shift <= 30:
        shift, multiplier = shift + 1, multiplier * 2
    rounding = (1 << (shift - 1)) if shift else 0
    return (codes * int(multiplier) + rounding) >> shift


def logistic_16(source: Codes, target: Codes) -> np.ndarray:
    """16-bit LOGISTIC at scale 1/32768."""
    table, x = _sigmoid_table(), _sigmoid_input(source, (0,))
    magnitude = np.abs(x)
    index = np.minimum(magnitude >> 9, 254)
    value = (table[index] << 9) + (magnitude & 0x1FF) * (table[index + 1] - table[index])
    value = np.where(magnitude >> 9 >= 255, 0x7FFF << 10, value)
    value = np.where(x >= 0, value + (1 << 9), (1 << 25) - value + (1 << 9) - 1) >> 10
    return value.astype(np.int16)


def tanh_16(source: Codes, target: Codes) -> np.ndarray:
    """16-bit TANH at scale 1/32768, as 2 sigmoid(2x) - 1."""
    table, x = _sigmoid_table(), _sigmoid_input(source, (0, 1))
    magnitude = np.abs(x)
    index = np.minimum(magnitude >> 8, 254)
    value = (table[index] << 8) + (magnitude & 0xFF) * (table[index + 1] - table[index])
    value = np.where(magnitude >> 8 >= 255, 0xFFFF << 8, value)
    value = np.where(
        x >= 0, value - (1 << 23) + (1 << 7), -value + (1 << 23) + (1 << 7) - 1
    ) >> 8  # fmt: skip
    return value.astype(np.int16)


def _high_mul_16(a: np.ndarray, b: int, rounding: bool) -> np.ndarray:
    """int16 doubling high multiplication, saturating; half away from zero or truncating down."""
    product = a.astype(np.int64) * b
    if rounding:
        nudge = np.where(product >= 0, 1 << 14, 1 - (1 << 14))
        total = product + nudge
        high = np.where(total >= 0, total >> 15, -((-total) >> 15))
    else:
        high = np.where(product >= 0, product >> 15, -((-product) >> 15))
    return np.clip(high, -32768, 32767)


def _reduced_mantissa_16(mantissa: int) -> int:
    """Q31 => Q15, rounded, saturating."""
    return 32767 if mantissa >= 2**31 - 2**15 else (mantissa + (1 << 15)) >> 16


def hard_swish(source: Codes, target: Codes) -> np.ndarray:
    """HARD_SWISH: 16-bit fixed point, 7 fraction bits of a code."""
    fine = np.float32(1 / 128) * np.float32(source.scale)
    mantissa_y, exponent_y = quantize_multiplier(float(fine / np.float32(target.scale)))
    mantissa_r, exponent_r = quantize_multiplier(float(fine / np.float32(3 / 32768)))
    x = source.centred.astype(np.int64) << 7
    preshift = _high_mul_16(x, _reduced_mantissa_16(mantissa_y), rounding=True)
    gate = x
    if exponent_r > 0:
        gate = np.clip(gate << (exponent_r - 1), -32768, 32767)
    gate = _high_mul_16(gate, _reduced_mantissa_16(mantissa_r), rounding=True)
    if exponent_r > 0:
        gate = np.clip(gate << 1, -32768, 32767)
    elif exponent_r < 0:
        gate = rounding_divide_by_pot(gate.astype(np.int32), np.int32(-exponent_r)).astype(np.int64)
    gate = (gate + (1 << 15)) >> 1
    product = np.array([gate * preshift], np.int64)[0]
    value = np.where(product >= 0, product >> 15, -((-product) >> 15)).astype(np.int32)
    value = rounding_divide_by_pot(value, np.int32(-exponent_y)).astype(np.int64)
    return target.clamp(value + target.zero_point)
