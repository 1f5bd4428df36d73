"""Groups with whole multiples of a channel's scale: error, ragged groups, sums that fit."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.group_wise import (
    dequantize_group_wise,
    quantize_group_wise,
)
from tvm_compress.relay_passes.numerics.two_level import quantize_two_level, split_scales


def decoded(codes: np.ndarray, multiples: np.ndarray, scales: np.ndarray, size: int) -> np.ndarray:
    groups = np.arange(len(codes)) // size
    return codes.astype(np.float32) * multiples[groups] * scales


def weights(k: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.1, 3.0, (k, n))
    return (rng.standard_normal((k, n)) * spread).astype(np.float32)


@pytest.mark.parametrize(("k", "size"), [(64, 16), (75, 32), (33, 32), (8, 8), (31, 32)])
def test_error_is_that_of_float_scales(k: int, size: int) -> None:
    weight = weights(k, 20)
    codes, multiples, scales = quantize_two_level(weight, size)
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert multiples.dtype == np.uint8
    assert multiples.shape == (-(-k // size), 20)
    error = ((decoded(codes, multiples, scales, size) - weight) ** 2).sum()
    float_codes, float_scales = quantize_group_wise(weight, size, "int4")
    ideal = ((dequantize_group_wise(float_codes, float_scales, size) - weight) ** 2).sum()
    assert error < 1.02 * ideal


def test_split_scales_are_within_half_a_step() -> None:
    wanted = np.random.default_rng(0).uniform(0.01, 1, (9, 5)).astype(np.float32)
    multiples, scales = split_scales(wanted)
    assert multiples.max(axis=0).tolist() == [255] * 5
    assert np.all(np.abs(multiples * scales - wanted) <= 0.501 * scales)


def test_sums_with_bytes_stay_below_31_bits() -> None:
    """Every weight at the end of its range: 255 * 8 * 255 * 8192 would need 33 bits."""
    weight = np.where(np.random.default_rng(0).random((8192, 3)) < 0.5, -1, 1).astype(np.float32)
    codes, multiples, _ = quantize_two_level(weight, 32)
    groups = np.arange(8192) // 32
    sums = 255 * (np.abs(codes.astype(np.int64)) * multiples[groups]).sum(axis=0)
    assert sums.max() <= 2**30
    assert multiples.max() > 1


def test_a_smallest_scale_is_kept() -> None:
    """What a large bias asks for; the error grows, the rest holds."""
    weight = weights(64, 4)
    smallest = np.array([0.0, 0.01, 0.05, 1e-9])
    _, multiples, scales = quantize_two_level(weight, 16, "int4", smallest)
    assert np.all(scales >= smallest.astype(np.float32))
    assert multiples[:, 2].max() < multiples[:, 3].max()


def test_groups_and_channels_of_zeros() -> None:
    weight = weights(64, 3)
    weight[16:32] = 0
    weight[:, 1] = 0
    codes, multiples, scales = quantize_two_level(weight, 16)
    back = decoded(codes, multiples, scales, 16)
    assert not back[16:32].any()
    assert not back[:, 1].any()
    assert np.isfinite(scales).all()
