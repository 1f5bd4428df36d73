"""Tables of sixteen values: near the best for known distributions, zero among them."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.codebook import (
    LARGEST_ENTRY,
    fit_centroids,
    normal_table,
    quantize_codebook,
)
from tvm_compress.relay_passes.numerics.group_wise import (
    dequantize_group_wise,
    quantize_group_wise,
)


def weights(k: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((k, n)) * rng.uniform(0.2, 2, n)).astype(np.float32)


def squared_error(decoded: np.ndarray, weight: np.ndarray) -> float:
    return float(((decoded - weight) ** 2).sum())


def test_centroids_of_the_normal_distribution_are_the_known_best() -> None:
    """Max 1960, table I: 16 levels leave 0.009497 of the variance; a level at zero costs a bit."""
    values = np.linspace(-6, 6, 20_001)
    density = np.exp(-(values**2) / 2)
    centroids = fit_centroids(values, density, rounds=500)
    nearest = np.abs(values[:, None] - centroids).min(axis=1)
    error = (nearest**2 * density).sum() / density.sum()
    assert 0.009497 * 0.999 < error < 0.0115
    assert 0.0 in centroids
    assert (np.diff(centroids) > 0).all()


def test_few_different_values_are_kept_exactly() -> None:
    values = np.array([-0.9, -0.3, 0.0, 0.1, 0.6, 0.8])
    centroids = fit_centroids(values, np.ones(6))
    np.testing.assert_allclose(np.abs(values[:, None] - centroids).min(axis=1), 0, atol=1e-12)


def test_the_normal_table() -> None:
    """Dettmers et al. 2023, appendix E, prints these quantiles."""
    printed = [
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(normal_table(), printed, atol=2e-3)


@pytest.mark.parametrize("size", [0, 32])
@pytest.mark.parametrize("channels", [4, 8, 1000])
@pytest.mark.parametrize("shape", [(75, 21), (64, 16), (31, 3)])
def test_fitted_tables_beat_even_steps(size: int, channels: int, shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    book = quantize_codebook(weight, channels, size)
    assert book.tables.shape == (-(-shape[1] // min(channels, shape[1])), 16)
    assert (book.tables == 0).any(axis=1).all()
    assert np.abs(book.tables.astype(int)).max() <= LARGEST_ENTRY
    assert (np.diff(book.tables.astype(int), axis=1) >= 0).all()
    assert (book.multiples is None) == (not size or shape[0] <= size)
    codes, scales = quantize_group_wise(weight, size or shape[0], "int4")
    even = dequantize_group_wise(codes, scales, size or shape[0])
    assert squared_error(book.decode(), weight) < squared_error(even, weight)


def test_each_weight_takes_the_nearest_value() -> None:
    weight = weights(40, 12)
    book = quantize_codebook(weight, 4, 8)
    assert book.multiples is not None
    for k, n in ((0, 0), (17, 5), (39, 11)):
        step = float(book.multiples[k // 8, n]) * book.scales[n]
        options = book.tables[n // 4].astype(np.float64) * step
        chosen = book.decode()[k, n]
        assert abs(chosen - weight[k, n]) <= np.abs(options - weight[k, n]).min() + 1e-5 * step


def test_zeros_stay_zero() -> None:
    weight = weights(64, 16)
    weight[np.random.default_rng(1).random(weight.shape) < 0.6] = 0
    weight[:, 3] = 0
    for size in (0, 16):
        assert not quantize_codebook(weight, 16, size).decode()[weight == 0].any()


def test_sums_with_bytes_stay_below_31_bits() -> None:
    weight = np.sign(weights(8192, 2)).astype(np.float32)
    book = quantize_codebook(weight, 4, 32)
    assert 255 * np.abs(book.integers()).sum(axis=0).max() <= 2**30
    np.testing.assert_allclose(book.decode(), weight, rtol=0.02)


def test_normal_tables_are_those() -> None:
    book = quantize_codebook(weights(64, 8), 4, 0, is_normal=True)
    np.testing.assert_array_equal(book.tables, np.tile(np.rint(normal_table() * 64), (2, 1)))
