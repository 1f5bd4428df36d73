"""SOFTMAX of TensorFlow Lite's reference kernels, 8 and 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .fixed_point import exp_negative, multiply, reciprocal
from .requantize import (
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    rounding_divide_by_pot,
)
from .tflite import round_half_away

# exp takes Q5.26; sums of exponentials are Q12.19.
DIFFERENCE_INTEGER_BITS = 5
SUM_INTEGER_BITS = 12
# 16 bits: exp covers [-10, 0], a table of 512 steps.
TABLE_STEPS = 512
EXP_RANGE = 10.0


def exponentials(scale: float, beta: float = 1.0) -> np.ndarray:
    """exp(-d * scale * beta) for d = 0..255, int32 with no integer bits; 0 beyond exp's range."""
    real = np.float64(beta) * np.float64(np.float32(scale)) * (1 << (31 - DIFFERENCE_INTEGER_BITS))
    mantissa, shift = quantize_multiplier(float(min(real, 2.0**31 - 1)))
    radius = (1 << DIFFERENCE_INTEGER_BITS) - 1
    furthest = int(np.floor(radius * 2.0 ** (31 - DIFFERENCE_INTEGER_BITS) / 2.0**shift))
    distance = np.arange(256)
    inside = distance <= furthest
    raw = (-np.where(inside, distance, 0).astype(np.int64) << shift).astype(np.int32)
    return np.where(inside, exp_negative(multiply(raw, mantissa)), 0).astype(np.int32)


def softmax_8(codes: np.ndarray, scale: float, dtype: str, beta: float = 1.0) -> np.ndarray:
    """Softmax over the last axis: 8-bit codes => codes of `dtype` at scale 1/256 (int8, uint8) or
    1/65536 (int16)."""
    info = np.iinfo(dtype)
    wide = codes.astype(np.int32)
    exps = exponentials(scale, beta)[wide.max(axis=-1, keepdims=True) - wide]
    terms = rounding_divide_by_pot(exps, np.int32(SUM_INTEGER_BITS))
    inverse, over = reciprocal(terms.sum(axis=-1, keepdims=True), SUM_INTEGER_BITS)
    exponent = (over + 31 - info.bits).astype(np.int32)
    scaled = multiply(exps, np.broadcast_to(inverse, exps.shape))
    rounded = rounding_divide_by_pot(scaled, np.broadcast_to(exponent, exps.shape))
    return np.clip(rounded + int(info.min), info.min, info.max).astype(dtype)


def interpolation_table(
    function: Callable[[np.ndarray], np.ndarray],
    low: float,
    high: float,
    scale_out: float,
    dtype: type = np.float64,
) -> np.ndarray:
    """513 int16 entries of `function` on [low, high] at `scale_out`, biased so that linear
    interpolation errs evenly."""
    low, high = dtype(low), dtype(high)
    step = (high - low) / dtype(TABLE_STEPS)
    inverse = dtype(65536) / (dtype(scale_out) * dtype(65535))

    def at(position: np.ndarray) -> np.ndarray:
        return function(position).astype(dtype)

    index: np.ndarray = np.arange(TABLE_STEPS).astype(dtype)
    value, following = at(low + index * step), at(low + (index + 1) * step)
    middle = at(low + index * step + step / 2)
    sample = round_half_away(value * inverse)
    interpolated = round_half_away((following * inverse + sample) / 2)
    bias = round_half_away((interpolated - round_half_away(middle * inverse)) / 2)
    last = round_half_away(at(np.array(high)) * inverse)
    table = np.append(sample - bias, last)
    return np.clip(table, -32768, 32767).astype(np.int16)


def interpolate(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """int16 codes through a 513-entry table: int32 result in the table's scale."""
    wide = codes.astype(np.int32)
    index, offset = 256 + (wide >> 7), wide & 0x7F
    base = table[index].astype(np.int32)
    slope = (table[index + 1].astype(np.int32) - base).astype(np.int16).astype(np.int32)
    return (base + ((slope * offset + 64) >> 7)).astype(np.int16).astype(np.int32)


def exponentials_16(scale: float, beta: float = 1.0) -> np.ndarray:
    """exp(-d * scale * beta) for d = 0..65535, Q0.15."""
    step = np.float64(np.float32(scale) * np.float32(beta))
    mantissa, exponent = quantize_multiplier(float(step / (EXP_RANGE / 65535.0)))
    distance = -np.arange(65536, dtype=np.int64).astype(np.int32)
    scaled = multiply_by_quantized_multiplier(distance, np.int32(mantissa), np.int32(exponent))
    table = interpolation_table(np.exp, -EXP_RANGE, 0.0, 2.0 / 65535)
    return interpolate(np.clip(scaled.astype(np.int64) + 32767, -32768, 32767), table)


def reciprocal_table() -> np.ndarray:
    """1 / (1 + x) on [0, 1], Q0.15."""
    return interpolation_table(lambda x: 1.0 / (1.0 + x), 0.0, 1.0, 2.0 / 65535)


def softmax_16(codes: np.ndarray, scale: float, beta: float = 1.0) -> np.ndarray:
    """Softmax over the last axis: int16 codes => int16 codes at scale 1/32768."""
    wide = codes.astype(np.int32)
    exps = exponentials_16(scale, beta)[wide.max(axis=-1, keepdims=True) - wide]
    total = exps.sum(axis=-1, keepdims=True).astype(np.int64)
    headroom = 32 - np.vectorize(int.bit_length, otypes=[np.int64])(total.astype(object))
    shifted = ((total << (headroom - 1)) + (1 << 13)) >> 14
    position = np.clip(shifted - (1 << 15) - (1 << 16), -32768, 32767)
    inverse = interpolate(position, reciprocal_table()).astype(np.int64)
    shift = 31 - headroom
    result = (exps * inverse + (np.int64(1) << (shift - 1))) >> shift
    return np.clip(result, 0, 32767).astype(np.int16)
