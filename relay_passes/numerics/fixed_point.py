"""Fixed-point functions of gemmlowp that TensorFlow Lite's softmax uses; int32 arrays throughout.

A raw value x with k integer bits stands for x / 2^(31-k). "Doubling high multiplication" of raw
values with j and k integer bits gives one with j + k.
"""

from __future__ import annotations

import math

import numpy as np

from .requantize import rounding_divide_by_pot, saturating_rounding_doubling_high_mul

INT32_MAX = 2**31 - 1
# One of the exponent's input has 5 integer bits.
EXP_FRACTION_BITS = 26


def multiply(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """Saturating rounding doubling high multiplication."""
    return saturating_rounding_doubling_high_mul(
        np.asarray(a, np.int32), np.broadcast_to(np.asarray(b, np.int32), np.shape(a))
    )


def shift_left_saturating(x: np.ndarray, bits: int) -> np.ndarray:
    """x * 2^bits, clamped to int32."""
    return np.clip(x.astype(np.int64) << bits, -(2**31), INT32_MAX).astype(np.int32)


def _exp_near_zero(a: np.ndarray) -> np.ndarray:
    """exp of [-1/4, 0) with no integer bits: Taylor around -1/8, fourth order."""
    centre = round(math.exp(-1 / 8) * 2**31)
    third = round(2**31 / 3)
    x = (a.astype(np.int64) + (1 << 28)).astype(np.int32)
    x2 = multiply(x, x)
    x3, x4 = multiply(x2, x), multiply(x2, x2)
    cubic = (rounding_divide_by_pot(x4, np.int32(2)).astype(np.int64) + x3).astype(np.int32)
    inner = (multiply(cubic, third).astype(np.int64) + x2).astype(np.int32)
    series = (rounding_divide_by_pot(inner, np.int32(1)).astype(np.int64) + x).astype(np.int32)
    return (centre + multiply(series, centre).astype(np.int64)).astype(np.int32)


def exp_negative(a: np.ndarray) -> np.ndarray:
    """exp of values <= 0 with 5 integer bits => no integer bits; exp(0) is INT32_MAX."""
    a = np.asarray(a, np.int32)
    quarter = 1 << (EXP_FRACTION_BITS - 2)
    near = (a & (quarter - 1)) - quarter  # in [-1/4, 0)
    result = _exp_near_zero(shift_left_saturating(near, 5))
    remainder = near - a  # a multiple of 1/4; one factor exp(-2^k) for each bit that is set
    for k in range(-2, 5):
        factor = round(math.exp(-(2.0**k)) * 2**31)
        bit = (remainder & (1 << (EXP_FRACTION_BITS + k))) != 0
        result = np.where(bit, multiply(result, factor), result)
    return np.where(a == 0, np.int32(INT32_MAX), result)


def reciprocal_of_one_plus(a: np.ndarray) -> np.ndarray:
    """1 / (1 + a) for a in [0, 1), no integer bits: three Newton steps from 48/17 - 32/17 d."""
    half = (a.astype(np.int64) + INT32_MAX + 1) // 2  # a + 1 >= 0, so this rounds half up
    half = half.astype(np.int32)
    x = round(48 / 17 * 2**29) + multiply(half, round(-32 / 17 * 2**29))
    for _ in range(3):
        rest = (1 << 29) - multiply(half, x)
        x = x + shift_left_saturating(multiply(x, rest), 2)
    return shift_left_saturating(x, 1)


def reciprocal(x: np.ndarray, integer_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """1 / x for positive x with `integer_bits` => (raw in [1/2, 1], bits of x over one)."""
    headroom = 32 - np.vectorize(int.bit_length, otypes=[np.int64])(
        x.astype(np.int64).astype(object)
    )
    shifted = (x.astype(np.int64) << headroom) - (1 << 31)
    return reciprocal_of_one_plus(shifted.astype(np.int32)), integer_bits - headroom
