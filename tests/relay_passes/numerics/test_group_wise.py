"""Weights in groups: ragged groups, int4 and int8, power-of-two scales."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.group_wise import (
    dequantize_group_wise,
    quantize_group_wise,
    quantize_group_wise_asymmetric,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize(
    ("reduction", "size"), [(1, 1), (31, 32), (32, 32), (33, 32), (64, 32), (10, 3)]
)
def test_error_is_half_a_step_of_the_groups_own_scale(
    dtype: str, reduction: int, size: int
) -> None:
    weight = RNG.normal(0, 1, (reduction, 5)).astype(np.float32)
    codes, scales = quantize_group_wise(weight, size, dtype)
    groups = -(-reduction // size)
    assert codes.shape == weight.shape
    assert scales.shape == (groups, 5)
    limit = 7 if dtype == "int4" else 127
    assert codes.min() >= -limit - 1
    assert codes.max() <= limit
    error = np.abs(dequantize_group_wise(codes, scales, size) - weight)
    step = scales[np.arange(reduction) // size]
    clipped = np.abs(weight) > limit * step
    assert (error[~clipped] <= 0.5001 * step[~clipped]).all()
    assert dtype == "int4" or not (error > 1.01 * step).any()


def test_int4_scales_are_no_worse_than_covering_ones() -> None:
    weight = RNG.normal(0, 1, (64, 40)).astype(np.float32)
    codes, scales = quantize_group_wise(weight, 32, "int4")
    error = ((dequantize_group_wise(codes, scales, 32) - weight) ** 2).sum()
    grouped = weight.reshape(2, 32, 40)
    covering = np.maximum(grouped.max(axis=1) / 7, grouped.min(axis=1) / -8)[:, None]
    naive = np.clip(np.rint(grouped / covering), -8, 7) * covering
    assert error < 0.95 * ((naive - grouped) ** 2).sum()


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_power_of_two_scales(dtype: str) -> None:
    weight = RNG.normal(0, 1, (20, 4)).astype(np.float32)
    codes, scales = quantize_group_wise(weight, 8, dtype, power_of_two=True)
    np.testing.assert_array_equal(np.frexp(scales)[0], 0.5)
    error = np.abs(dequantize_group_wise(codes, scales, 8) - weight).max()
    assert error < (np.abs(weight).max() / 3 if dtype == "int4" else 0.03)


def test_groups_of_zeros_stay_zero() -> None:
    weight = np.zeros((8, 2), np.float32)
    weight[4:] = 1.0
    codes, scales = quantize_group_wise(weight, 4, "int4")
    back = dequantize_group_wise(codes, scales, 4)
    assert not back[:4].any()
    np.testing.assert_allclose(back[4:], 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("size", [8, 32, 75])
def test_zero_points_pay_where_ranges_are_one_sided(dtype: str, size: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(-0.2, 1.0, (75, 9)).astype(np.float32)
    codes, scales, zero_points = quantize_group_wise_asymmetric(weight, size, dtype)
    assert zero_points.dtype == np.int8
    assert zero_points.shape == scales.shape
    limit = (-8, 7) if dtype == "int4" else (-128, 127)
    assert limit[0] <= codes.min() <= codes.max() <= limit[1]
    back = dequantize_group_wise(codes, scales, size, zero_points)
    symmetric = dequantize_group_wise(*quantize_group_wise(weight, size, dtype), size)
    assert ((back - weight) ** 2).sum() < 0.6 * ((symmetric - weight) ** 2).sum()


def test_zero_points_keep_zero_exact() -> None:
    weight = np.zeros((16, 3), np.float32)
    weight[3, 1], weight[9, 1] = 2.0, 5.0
    codes, scales, zero_points = quantize_group_wise_asymmetric(weight, 8, "int4")
    back = dequantize_group_wise(codes, scales, 8, zero_points)
    assert not back[weight == 0].any()
    np.testing.assert_allclose(back[weight != 0], [2, 5], rtol=0.1)
