"""Scales and zero points: properties that hold for every range, and edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.relay_passes.numerics.affine import (
    INTEGER_RANGES,
    choose_parameters,
    dequantize_affine,
    quantize_affine,
)

DTYPES = st.sampled_from(sorted(INTEGER_RANGES))
VALUES = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=200, deadline=None)
@given(VALUES, VALUES, DTYPES, st.booleans(), st.booleans(), st.booleans())
def test_zero_is_exact_and_the_range_is_covered(
    first: float, second: float, dtype: str, symmetric: bool, narrow: bool, power_of_two: bool
) -> None:
    low, high = sorted((first, second))
    parameters = choose_parameters(
        low, high, dtype, symmetric=symmetric, narrow=narrow, power_of_two=power_of_two
    )
    assert parameters.lowest <= parameters.zero_point <= parameters.highest
    assert parameters.scale > 0
    ends = np.asarray([0.0, low, high], np.float32)
    back = dequantize_affine(quantize_affine(ends, parameters), parameters)
    assert back[0] == 0.0
    # The zero point is rounded: an end may lie half a step outside, and is rounded by half a step.
    assert np.abs(back - ends).max() <= parameters.scale * 1.001 + np.abs(ends).max() * 1e-6
    if power_of_two:
        assert np.frexp(parameters.scale)[0] == 0.5
    if symmetric and INTEGER_RANGES[dtype][0] < 0:
        assert parameters.zero_point == 0
    if narrow and INTEGER_RANGES[dtype][0] < 0:
        assert parameters.lowest == -parameters.highest


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=40), DTYPES, st.booleans())
def test_values_in_range_return_within_half_a_step(
    values: list[float], dtype: str, symmetric: bool
) -> None:
    x = np.asarray(values, np.float32)
    parameters = choose_parameters(x.min(), x.max(), dtype, symmetric=symmetric)
    step = float(parameters.scale)
    inside = dequantize_affine(
        np.asarray([parameters.lowest, parameters.highest], parameters.storage_dtype), parameters
    )
    x = np.clip(x, *inside)
    back = dequantize_affine(quantize_affine(x, parameters), parameters)
    assert np.abs(back - x).max() <= 0.5001 * step + np.abs(x).max() * 1e-6


@settings(max_examples=100, deadline=None)
@given(DTYPES, st.floats(2.0**-20, 2.0**20, width=32), st.integers(-128, 127))
def test_quantising_twice_changes_nothing(dtype: str, scale: float, zero_point: int) -> None:
    lowest, highest = INTEGER_RANGES[dtype]
    zero_point = int(np.clip(zero_point, lowest, highest))
    parameters = choose_parameters(
        (lowest - zero_point) * scale, (highest - zero_point) * scale, dtype, symmetric=False
    )
    integers = np.arange(max(lowest, -300), min(highest, 300) + 1)
    integers = integers.astype(parameters.storage_dtype)
    again = quantize_affine(dequantize_affine(integers, parameters), parameters)
    np.testing.assert_array_equal(again, integers)


def test_by_channel_equals_channel_by_channel() -> None:
    x = np.random.default_rng(0).normal(0, 1, (3, 5, 2)).astype(np.float32)
    x[:, 1] *= 100
    x[:, 2] = 0
    low, high = x.min(axis=(0, 2)), x.max(axis=(0, 2))
    together = choose_parameters(low, high, "int8", symmetric=False, axis=1)
    integers = quantize_affine(x, together)
    for channel in range(5):
        alone = choose_parameters(low[channel], high[channel], "int8", symmetric=False)
        np.testing.assert_array_equal(integers[:, channel], quantize_affine(x[:, channel], alone))
    assert (integers[:, 2] == together.zero_point[2]).all()


@pytest.mark.parametrize("dtype", sorted(INTEGER_RANGES))
@pytest.mark.parametrize("value", [0.0, 1e-38, 5.0, -5.0])
def test_degenerate_ranges(dtype: str, value: float) -> None:
    for symmetric in (False, True):
        parameters = choose_parameters(value, value, dtype, symmetric=symmetric)
        assert np.isfinite(parameters.scale)
        assert parameters.scale >= np.float32(2.0**-60)
        back = dequantize_affine(
            quantize_affine(np.asarray([0.0, value], np.float32), parameters), parameters
        )
        np.testing.assert_allclose(back, [0.0, value], rtol=0.1, atol=1e-17)


def test_known_values() -> None:
    parameters = choose_parameters(-1.0, 3.0, "uint8", symmetric=False)
    assert parameters.scale == np.float32(4 / 255)
    assert parameters.zero_point == 64
    half_even = choose_parameters(-127.0, 127.0, "int8", symmetric=True, narrow=True)
    assert half_even.scale == 1.0
    x = np.asarray([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9], np.float32)
    np.testing.assert_array_equal(quantize_affine(x, half_even), [0, 2, 2, 0, -2, 127, -127])


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(0.0, np.nan, "not finite"), (-np.inf, 0.0, "not finite"), (2.0, 1.0, "empty range")],
)
def test_bad_ranges_are_refused(low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_parameters(low, high, "int8", symmetric=True)


def test_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no integer type 'int9'; choose from int4, int5"):
        choose_parameters(0.0, 1.0, "int9", symmetric=True)
