"""The TFLite rule's mathematics against exact rational arithmetic, and its kernels against both."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import tvm
from tvm import tirx

from tvm_compress.relay_passes.numerics import requantize as rules
from tvm_compress.relay_passes.numerics import tflite as numerics
from tvm_compress.relay_passes.numerics import tflite_softmax as softmax
from tvm_compress.relay_passes.numerics.fixed_point import exp_negative, reciprocal
from tvm_compress.relay_passes.numerics.tflite_tables import Codes, clipped, rescale
from tvm_compress.schedules.divide import divide_half_away
from tvm_compress.schedules.requantize import requantize
from tvm_compress.schedules.tflite_add import tflite_add
from tvm_compress.schedules.tflite_softmax import tflite_softmax_8, tflite_softmax_16

EXTREMES = np.array(
    [0, 1, -1, 2, -2, 3, -3, 2**15, -(2**15), 2**30, -(2**30), 2**31 - 1, -(2**31) + 1], np.int64
)


def half_away(value: Fraction) -> int:
    """Nearest integer, ties away from zero."""
    magnitude = math.floor(abs(value) + Fraction(1, 2))
    return magnitude if value >= 0 else -magnitude


def q31(x: int, mantissa: int, exponent: int) -> int:
    """Multiplication in two roundings: half up to an integer, then half away after the shift."""
    first = math.floor(Fraction(x * 2 ** max(exponent, 0) * mantissa, 2**31) + Fraction(1, 2))
    return half_away(Fraction(first, 2 ** max(-exponent, 0)))


def run(
    function: tirx.PrimFunc, *arrays: np.ndarray, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    """A kernel on arrays."""
    built = tvm.compile(function.with_attr("global_symbol", "main"), target="llvm")
    result = tvm.runtime.tensor(np.zeros(shape, dtype))
    built["main"](*(tvm.runtime.tensor(array) for array in arrays), result)
    return result.numpy()


def sums(rng: np.random.Generator, count: int, bits: int) -> np.ndarray:
    """Random integers of every magnitude, and the extremes that fit."""
    magnitude = 2.0 ** rng.uniform(0, bits, count)
    random = (rng.choice([-1, 1], count) * magnitude).astype(np.int64)
    return np.concatenate([random, EXTREMES[np.abs(EXTREMES) < 2**bits]])


@pytest.mark.parametrize("real", [0.9999999, 0.5, 0.25, 3.7e-3, 1.1e-6, 2.0**-31, 1.0, 1.7, 250.3])
def test_q31_multiplication(real: float) -> None:
    rng = np.random.default_rng(0)
    x = sums(rng, 2000, 31 if real < 1 else 22)
    mantissa, exponent = rules.quantize_multiplier(real)
    expected = [q31(int(v), mantissa, exponent) for v in x]
    found = rules.multiply_by_quantized_multiplier(
        x.astype(np.int32), np.int32(mantissa), np.int32(exponent)
    )
    np.testing.assert_array_equal(found, expected)
    constants = (np.array([mantissa], np.int32), np.array([exponent], np.int8))
    kernel = requantize(x.shape, "int32", (1,), 0, (-(2**15), 2**15 - 1), "int16", "tflite")
    arrays = (x.astype(np.int32), np.zeros(1, np.int32), *constants)
    np.testing.assert_array_equal(
        run(kernel, *arrays, shape=x.shape, dtype="int16"), np.clip(expected, -(2**15), 2**15 - 1)
    )


@pytest.mark.parametrize("real", [0.5, 0.125, 1 / 6, 0.3, 0.0123, 3e-7, 7.25])
def test_float64_multiplication(real: float) -> None:
    """round(fl(x * m)): ties of the rounded product, such as 3 * (1/6), included."""
    rng = np.random.default_rng(1)
    x = np.concatenate([sums(rng, 2000, 24), np.arange(-600, 601)])
    expected = np.clip([half_away(Fraction(float(v) * real)) for v in x], -128, 127)
    np.testing.assert_array_equal(
        np.clip(numerics.scale_float64(x, np.array(real)), -128, 127), expected
    )
    kernel = requantize(x.shape, "int32", (1,), 0, (-128, 127), "int8", "float64")
    arrays = (x.astype(np.int32), np.zeros(1, np.int32), np.array([real]))
    np.testing.assert_array_equal(run(kernel, *arrays, shape=x.shape, dtype="int8"), expected)


def layers(count: int) -> list[tuple[float, int, int]]:
    """(multiplier, largest sum, zero point) as linear layers have them."""
    rng = np.random.default_rng(6)
    found = []
    for _ in range(count):
        scales = np.float32([rng.uniform(0.01, 0.5), rng.uniform(5e-4, 0.02), rng.uniform(0.05, 1)])
        wide = scales.astype(np.float64)
        limit, zero_point = int(2 ** rng.uniform(14, 30.9)), int(rng.integers(-128, 128))
        found.append((float(wide[0] * wide[1] / wide[2]), limit, zero_point))
    return found


def test_high_product_is_the_float64_product() -> None:
    """Around every step of the result, at the largest sums, and for ties of both signs."""
    ties = [(0.125, 2**20, 3), (2.0**-9, 2**30, -7), (3 * 2.0**-8, 2**24, 0)]
    for real, limit, zero in [*layers(40), *ties]:
        low, high = -128 - zero, 127 - zero
        constants = numerics.high_multiplier(real, limit, (low, high))
        assert constants is not None
        middles = np.rint((np.arange(low - 2, high + 3) - 0.5) / real).astype(np.int64)
        x = np.unique(np.add.outer(middles, np.arange(-3, 4)))
        x = np.concatenate([x, [limit, -limit, limit - 1, 0]])
        x = x[np.abs(x) <= limit]
        wanted = np.clip(numerics.scale_float64(x, np.array(real)), low, high)
        found = np.clip(numerics.scale_high(x, *constants), low, high)
        np.testing.assert_array_equal(found, wanted)
    assert constants is not None
    mantissa, shift = constants
    arrays = (x.astype(np.int32), np.zeros(1, np.int32), np.int32([mantissa]), np.int8([shift]))
    kernel = requantize(x.shape, "int32", (1,), zero, (-128, 127), "int8", "high")
    np.testing.assert_array_equal(run(kernel, *arrays, shape=x.shape, dtype="int8"), wanted + zero)


def test_high_product_is_refused_where_it_cannot_be_exact() -> None:
    assert numerics.high_multiplier(0.25, 1000, (-128, 127)) is None  # no room for the mantissa
    assert numerics.high_multiplier(0.01, 2**31, (-128, 127)) is None  # sums leave 32 bits
    # 16-bit results of large sums: more steps than 31 bits can place.
    assert numerics.high_multiplier(1.2345678e-5, 2**31 - 1, (-32768, 32767)) is None


@pytest.mark.parametrize("real", [0.99, 3.1e-3, 2.2e-6, 1.5])
def test_wide_multiplication(real: float) -> None:
    rng = np.random.default_rng(2)
    x = sums(rng, 2000, 40 if real < 1e-2 else 20)
    mantissa, exponent = (
        np.atleast_1d(part) for part in rules.quantize_multipliers(np.array(real))
    )
    reduced = min((int(mantissa[0]) + 2**15) >> 16, 0x7FFF)
    unit = Fraction(2) ** (15 - int(exponent[0]))
    expected = [math.floor(Fraction(int(v) * reduced) / unit + Fraction(1, 2)) for v in x]
    np.testing.assert_array_equal(numerics.scale_wide(x, mantissa, exponent), expected)
    low, high = -(2**15), 2**15 - 1
    kernel = requantize(x.shape, "int64", (1,), 0, (low, high), "int16", "tflite_wide")
    arrays = (
        x,
        np.zeros(1, np.int64),
        numerics.reduce_mantissa(mantissa),
        exponent.astype(np.int8),
    )
    inside = np.abs(expected) < 2**31
    found = run(kernel, *arrays, shape=x.shape, dtype="int16")
    np.testing.assert_array_equal(found[inside], np.clip(expected, low, high)[inside])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        ("int8", (0.05, 0.083, 0.11)),
        ("int8", (0.5, 0.0007, 0.5)),
        ("int8", (0.05, 0.05, 0.0012)),
        ("uint8", (0.02, 0.02, 0.02)),
        ("int16", (2e-4, 3e-4, 5e-4)),
    ],
)
def test_sums(dtype: str, scales: tuple[float, float, float], sign: int) -> None:
    rng = np.random.default_rng(3)
    info = np.iinfo(dtype)
    zeros = (
        (0, 0, 0)
        if dtype == "int16"
        else tuple(int(z) for z in rng.integers(info.min, info.max, 3))
    )
    a, b = (rng.integers(info.min, info.max + 1, (40, 50)).astype(dtype) for _ in range(2))
    multipliers = numerics.sum_multipliers(scales[:2], scales[2], info.bits)
    shift = numerics.SUM_LEFT_SHIFT[info.bits]
    expected = np.zeros(a.shape, dtype)
    for index in np.ndindex(a.shape):
        left = q31((int(a[index]) - zeros[0]) << shift, *multipliers[0])
        right = q31((int(b[index]) - zeros[1]) << shift, *multipliers[1])
        total = q31(left + sign * right, *multipliers[2]) + zeros[2]
        expected[index] = min(max(total, info.min), info.max)
    parameters = tuple(zip(scales, zeros, strict=True))
    np.testing.assert_array_equal(numerics.add(a, b, parameters, dtype, sign), expected)
    for bounds in ((info.min, info.max), (zeros[2], info.max)):  # without and with ReLU
        kernel = tflite_add(
            (a.shape, b.shape), dtype, zeros, multipliers, shift, sign, bounds, a.shape, dtype
        )  # fmt: skip
        np.testing.assert_array_equal(
            run(kernel, a, b, shape=a.shape, dtype=dtype), np.maximum(expected, bounds[0])
        )
    real = (
        scales[0] * (a.astype(float) - zeros[0]) + sign * scales[1] * (b.astype(float) - zeros[1])
    ) / scales[2]
    inside = np.clip(real + zeros[2], info.min, info.max)
    assert np.abs(expected - inside).max() <= 0.51


def test_average_rounds_half_away() -> None:
    totals = np.arange(-1000, 1001).astype(np.int32)
    for count in (1, 2, 3, 4, 9, 49):
        expected = [half_away(Fraction(int(total), count)) for total in totals]
        counts = np.full(1, count, np.int32)
        np.testing.assert_array_equal(numerics.divide_half_away(totals, counts), expected)
        kernel = divide_half_away(totals.shape, (1,), (-128, 127), "int8")
        found = run(kernel, totals, counts, shape=totals.shape, dtype="int8")
        np.testing.assert_array_equal(found, np.clip(expected, -128, 127))


def test_fixed_point_functions_approximate() -> None:
    raw = -np.unique((2.0 ** np.linspace(0, 30.99, 4000)).astype(np.int64))
    found = exp_negative(raw.astype(np.int32)) / 2.0**31
    np.testing.assert_allclose(found, np.exp(raw / 2.0**26), atol=2e-7)
    assert exp_negative(np.zeros(1, np.int32))[0] == 2**31 - 1
    x = np.unique((2.0 ** np.linspace(19, 30.9, 4000)).astype(np.int64)).astype(np.int32)
    inverse, over = reciprocal(x, 12)
    np.testing.assert_allclose(inverse / 2.0**31 / 2.0**over, 2.0**19 / x, rtol=1e-7)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("scale", [0.004, 0.1, 1.0, 9.0])
def test_softmax_of_bytes(dtype: str, scale: float) -> None:
    rng = np.random.default_rng(4)
    info = np.iinfo(dtype)
    codes = rng.integers(info.min, info.max + 1, (6, 33)).astype(dtype)
    codes[0] = info.min
    codes[1, 1:] = info.min
    codes[1, 0] = info.max
    expected = softmax.softmax_8(codes, scale, dtype)
    kernel = tflite_softmax_8(codes.shape, 1, dtype, dtype)
    found = run(kernel, codes, softmax.exponentials(scale), shape=codes.shape, dtype=dtype)
    np.testing.assert_array_equal(found, expected)
    real = np.exp(scale * (codes.astype(float) - codes.max(axis=1, keepdims=True).astype(float)))
    real /= real.sum(axis=1, keepdims=True)
    assert np.abs(expected.astype(float) - info.min - np.minimum(256 * real, 255)).max() < 0.6


@pytest.mark.parametrize("scale", [1e-5, 3e-4, 0.01])
def test_softmax_of_words(scale: float) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(-32768, 32768, (5, 40)).astype(np.int16)
    expected = softmax.softmax_16(codes, scale)
    reciprocals = softmax.interpolate(np.arange(-32768, 32768), softmax.reciprocal_table())
    tables = [softmax.exponentials_16(scale).astype(np.int16), reciprocals.astype(np.int16)]
    kernel = tflite_softmax_16(codes.shape, 1)
    np.testing.assert_array_equal(
        run(kernel, codes, *tables, shape=codes.shape, dtype="int16"), expected
    )
    real = np.exp(scale * (codes.astype(float) - codes.max(axis=1, keepdims=True)))
    real /= real.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(expected / 32768, real, atol=3e-3)


def test_tables_clamp_and_round() -> None:
    source = Codes(0.5, -3, "int8")
    np.testing.assert_array_equal(rescale(source, source), np.arange(-128, 128))
    half = Codes(1.0, 0, "int8")
    # A multiplier of 1/2 needs no shift, and the multiplication itself rounds half up.
    wanted = [math.floor(Fraction(code + 4, 2)) for code in range(-128, 128)]
    np.testing.assert_array_equal(rescale(source, half), wanted)
    np.testing.assert_array_equal(clipped(source, half, 0.0, 6.0), np.clip(wanted, 0, 6))
    assert Codes(0.16, 0, "int8").bound(6.0) == 38  # 37.5 in float32: half away from zero


@pytest.mark.parametrize("count", [1, 2, 49, 63, 4096])
def test_mean_multiplier_is_close_and_fits(count: int) -> None:
    mantissa, exponent = numerics.mean_multiplier(0.05, 0.021, count)
    assert 0 < mantissa < 2**31
    exact = 0.05 / 0.021 / count
    assert mantissa * 2.0 ** (exponent - 31) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("zero_point", [-128, -3, 0])
@pytest.mark.parametrize("real", [0.4999999, 0.25, 0.2, 3.7e-3, 0.0123, 1.1e-5])
def test_one_rounding_of_codes_above_the_zero_point(real: float, zero_point: int) -> None:
    """Every sum around every step, where double rounding and one could part."""
    mantissa, exponent = (
        np.atleast_1d(part) for part in rules.quantize_multipliers(np.array(real))
    )
    steps = ((np.arange(130) + 0.5) / real).astype(np.int64)
    x = np.unique(np.concatenate([np.arange(-40, 41), *(steps + d for d in range(-3, 4)), -steps]))
    x = x[np.abs(x) < 2**30]
    scaled = [q31(int(v), int(mantissa[0]), int(exponent[0])) for v in x]
    wanted = np.clip(scaled, 0, 127 - zero_point)
    constants = numerics.rounded_once(mantissa, exponent, zero_point)
    assert constants is not None
    once, shift = constants
    found = np.clip(numerics.scale_once(x, once, shift, zero_point), zero_point, 127)
    np.testing.assert_array_equal(found - zero_point, wanted)
    bounds = (zero_point, 127)
    kernel = requantize(x.shape, "int32", (1,), zero_point, bounds, "int8", "rounded_once")
    mantissa, shift = constants
    arrays = (x.astype(np.int32), np.zeros(1, np.int32), mantissa, shift.astype(np.int8))
    np.testing.assert_array_equal(run(kernel, *arrays, shape=x.shape, dtype="int8"), found)
