"""The arithmetic of TensorFlow Lite's 8- and 16-bit reference kernels, operator by operator.

Source: the TensorFlow Lite quantisation specification and the behaviour of its reference kernels,
which differ from operator to operator in how a multiplier is formed (float32 or float64 products)
and rounded. `requantize.py` has the common Q31 multiplication; the functions here are what is
special. Scales are float32 values throughout.
"""

from __future__ import annotations

import numpy as np

from .requantize import multiply_by_quantized_multiplier, quantize_multiplier

# Fraction bits that the terms of a sum get before they are scaled, by bits of a code.
SUM_LEFT_SHIFT = {8: 20, 16: 15}


def ratio_float64(scale_in: float, scale_out: float) -> float:
    """s_x / s_y as QUANTIZE and MEAN form it: in float64."""
    return float(np.float64(np.float32(scale_in)) / np.float64(np.float32(scale_out)))


def ratio_float32(scale_in: float, scale_out: float) -> float:
    """s_x / s_y as RELU and LEAKY_RELU form it: in float32."""
    return float(np.float32(scale_in) / np.float32(scale_out))


def convolution_multiplier(scale: np.ndarray, scale_out: float) -> np.ndarray:
    """s_x * s_w / s_y of int8 and int16 convolutions; `scale` is the float64 product s_x * s_w."""
    return np.asarray(scale, np.float64) / np.float64(np.float32(scale_out))


def rounded_product_multiplier(scale: np.ndarray, scale_out: float) -> np.ndarray:
    """As `convolution_multiplier` with the product rounded to float32: uint8 and BATCH_MATMUL."""
    return np.asarray(scale, np.float32).astype(np.float64) / np.float64(np.float32(scale_out))


def product_multiplier(scale: np.ndarray, scale_out: float) -> np.ndarray:
    """s_a * s_b / s_y of MUL: all in float32."""
    return (np.asarray(scale, np.float32) / np.float32(scale_out)).astype(np.float64)


def mean_multiplier(scale_in: float, scale_out: float, count: int) -> tuple[int, int]:
    """(mantissa, exponent) of MEAN: the Q31 mantissa is divided by `count`, truncating."""
    mantissa, exponent = quantize_multiplier(ratio_float64(scale_in, scale_out))
    shift = min(count.bit_length() - 1, 32, 31 + exponent)
    return (mantissa << shift) // count, exponent - shift


def sum_multipliers(
    scales: tuple[float, float], scale_out: float, bits: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(mantissa, exponent) of both terms and of the result of ADD and SUB."""
    twice_largest = np.float64(np.float32(2) * max(np.float32(s) for s in scales))
    unit = np.float64(np.float32(1 << SUM_LEFT_SHIFT[bits]) * np.float32(scale_out))
    first, second = (quantize_multiplier(float(np.float32(s) / twice_largest)) for s in scales)
    return first, second, quantize_multiplier(float(twice_largest / unit))


def _scaled(x: np.ndarray, multiplier: tuple[int, int]) -> np.ndarray:
    mantissa, exponent = (np.int32(part) for part in multiplier)
    return multiply_by_quantized_multiplier(x.astype(np.int32), mantissa, exponent)


def add(
    a: np.ndarray,
    b: np.ndarray,
    parameters: tuple[tuple[float, int], ...],
    dtype: str,
    sign: int = 1,
) -> np.ndarray:
    """ADD (sign 1) and SUB (-1); `parameters` are (scale, zero point) of a, b and the result."""
    (scale_a, zero_a), (scale_b, zero_b), (scale_y, zero_y) = parameters
    info = np.iinfo(dtype)
    first, second, output = sum_multipliers((scale_a, scale_b), scale_y, info.bits)
    unit = np.int32(1 << SUM_LEFT_SHIFT[info.bits])
    total = _scaled((a.astype(np.int32) - zero_a) * unit, first)
    total = total + sign * _scaled((b.astype(np.int32) - zero_b) * unit, second)
    return np.clip(_scaled(total, output) + zero_y, info.min, info.max).astype(dtype)


def divide_half_away(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """AVERAGE_POOL_2D: sums of raw codes / counts, rounded half away from zero."""
    half = counts // 2
    magnitude = (np.abs(sums.astype(np.int64)) + half) // counts
    return np.sign(sums) * magnitude


def round_half_away(x: np.ndarray) -> np.ndarray:
    """C's `round`, any float dtype."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), 0).astype(x.dtype)


def scale_float64(x: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """FULLY_CONNECTED: round(float64(x) * multiplier), half away from zero; int64."""
    return round_half_away(x.astype(np.float64) * multiplier).astype(np.int64)


def reduce_mantissa(mantissa: np.ndarray) -> np.ndarray:
    """Q31 mantissa => Q15, rounded: what a 48-bit accumulator is multiplied by."""
    rounded = (mantissa.astype(np.int64) + (1 << 15)) >> 16
    return np.where(mantissa < 0x7FFF0000, rounded, 0x7FFF).astype(np.int32)


def scale_wide(x: np.ndarray, mantissa: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """int64 accumulators (16-bit activations): one rounding, half up; Q31 mantissa."""
    shift = 15 - exponent.astype(np.int64)
    product = x.astype(np.int64) * reduce_mantissa(mantissa)
    return (product + (np.int64(1) << (shift - 1))) >> shift
