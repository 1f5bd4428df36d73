"""The arithmetic of TensorFlow Lite's 8- and 16-bit reference kernels, operator by operator.

Source: the TensorFlow Lite quantisation specification and the behaviour of its reference kernels,
which differ from operator to operator in how a multiplier is formed (float32 or float64 products)
and rounded. `requantize.py` has the common Q31 multiplication; the functions here are what is
special. Scales are float32 values throughout.
"""

from __future__ import annotations

import math

import numpy as np

from .requantize import multiply_by_quantized_multiplier, quantize_multiplier

# Fraction bits that the terms of a sum get before they are scaled, by bits of a code.
SUM_LEFT_SHIFT = {8: 20, 16: 15}
# The nearest mantissa or the next was right in all of 1,500 random layers.
MANTISSA_REACH = 8


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


def high_multiplier(
    multiplier: float, limit: int, bounds: tuple[int, int]
) -> tuple[int, int] | None:
    """(mantissa, shift) with which `scale_high` equals `scale_float64` for all |x| <= limit.

    Equal after both are clamped to `bounds`. Both functions of x grow, so that they are equal where
    they step in the same places; those of the float64 product are looked up, and mantissas next to
    the nearest one are tried. None: none of them does, or the multiplier is 1/4 or more.
    """
    fraction, exponent = math.frexp(multiplier)
    shift = -1 - exponent  # 31 bits of mantissa
    if not 0 < multiplier < 0.25 or limit >= 2**31 or shift > 30:
        return None
    values = np.arange(bounds[0] + 1, bounds[1] + 1, dtype=np.int64)
    steps = _first_reaching(values, multiplier)  # x < steps[k] gives less than values[k]
    reached, missed = np.abs(steps) <= limit, np.abs(steps - 1) <= limit
    nearest = math.floor(fraction * 2**31 + 0.5)
    for distance in sorted(range(-MANTISSA_REACH, MANTISSA_REACH + 1), key=abs):
        mantissa = nearest + distance
        if mantissa < 2**31:
            at, before = (scale_high(x, mantissa, shift) for x in (steps, steps - 1))
            if np.all(at[reached] >= values[reached]) and np.all(before[missed] < values[missed]):
                return mantissa, shift
    return None


def _first_reaching(values: np.ndarray, multiplier: float) -> np.ndarray:
    """The least integers x with scale_float64(x) >= values."""
    near = np.ceil((values - 0.5) / multiplier).astype(np.int64)[:, None] + np.arange(-2, 3)
    reaches = scale_float64(near, np.asarray(multiplier)) >= values[:, None]
    assert not reaches[:, 0].any() and reaches[:, -1].all()
    return near[np.arange(len(values)), reaches.argmax(axis=1)]


def scale_high(x: np.ndarray, mantissa: int | np.ndarray, shift: int | np.ndarray) -> np.ndarray:
    """x * mantissa / 2^(32 + shift), one rounding, half up; |x| < 2^31."""
    high = (x.astype(np.int64) * mantissa) >> 32
    return (high + (np.int64(1) << (np.asarray(shift, np.int64) - 1))) >> shift


def rounded_once(
    mantissa: np.ndarray, exponent: np.ndarray, zero_point: int
) -> list[np.ndarray] | None:
    """[mantissa, shift], int32, with which `scale_once` is zero point plus the doubly rounded
    product, wherever that is at least the zero point; for exponents below 0.

    Floors of floors are one floor; only what is below the zero point rounds the other way. None:
    half a unit plus the zero point, scaled back, could overflow.
    """
    shift = -exponent.astype(np.int64)
    if int(np.abs(_addend(shift, zero_point)).max()) >= 1 << 30:
        return None
    return [mantissa, shift.astype(np.int32)]


def scale_once(
    x: np.ndarray, mantissa: np.ndarray, shift: np.ndarray, zero_point: int
) -> np.ndarray:
    """x * mantissa / 2^31, rounded half up, then / 2^shift, rounded half up, + zero point;
    |x| < 2^30."""
    product = (x.astype(np.int64) * mantissa + (1 << 30)) >> 31
    return (product + _addend(shift.astype(np.int64), zero_point)) >> shift


def _addend(shift: np.ndarray, zero_point: int) -> np.ndarray:
    """Half a unit and the zero point before a shift."""
    return np.int64(2 * zero_point + 1) << (shift - 1)


def reduce_mantissa(mantissa: np.ndarray) -> np.ndarray:
    """Q31 mantissa => Q15, rounded: what a 48-bit accumulator is multiplied by."""
    rounded = (mantissa.astype(np.int64) + (1 << 15)) >> 16
    return np.where(mantissa < 0x7FFF0000, rounded, 0x7FFF).astype(np.int32)


def scale_wide(x: np.ndarray, mantissa: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """int64 accumulators (16-bit activations): one rounding, half up; Q31 mantissa."""
    shift = 15 - exponent.astype(np.int64)
    product = x.astype(np.int64) * reduce_mantissa(mantissa)
    return (product + (np.int64(1) << (shift - 1))) >> shift
