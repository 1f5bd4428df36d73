"""Factors of weights: exact at full rank, best at lower ones, better on data where they know it."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.low_rank import (
    canonical_polyadic,
    energies,
    rank_for_energy,
    split_matrix,
    split_rows_and_columns,
    split_with_nonlinearity,
    tucker2,
)
from tvm_compress.relay_passes.numerics.second_order import layer_error


def correlated(inputs: int, patches: int, seed: int = 0) -> np.ndarray:
    """Patches [P, K] whose few strong directions are not the weights'."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(inputs, inputs)))[0]
    return (rng.normal(size=(patches, inputs)) * 0.9 ** np.arange(inputs)) @ directions.T


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_a_product_of_low_rank_is_the_best_one(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).normal(size=shape)
    values = np.linalg.svd(weight, compute_uv=False)
    for rank in range(1, 8):
        u, v = split_matrix(weight, rank)
        assert u.shape == (shape[0], rank) and v.shape == (rank, shape[1])
        error = np.sum((weight - u @ v) ** 2)
        np.testing.assert_allclose(error, np.sum(values[rank:] ** 2), atol=1e-12)


def test_data_aware_product() -> None:
    x = correlated(20, 500)
    hessian = x.T @ x
    weight = np.random.default_rng(1).normal(size=(20, 11))
    # An independent form: the sums' own principal directions (reduced-rank regression).
    sums = x @ weight
    directions = np.linalg.svd(sums, full_matrices=False)[2]
    for rank in (1, 4, 11):
        u, v = split_matrix(weight, rank, hessian)
        expected = sums @ directions[:rank].T @ directions[:rank]
        np.testing.assert_allclose(x @ u @ v, expected, atol=1e-8)
        plain = np.matmul(*split_matrix(weight, rank))
        error = layer_error(weight - u @ v, hessian)
        assert error < layer_error(weight - plain, hessian) or rank == 11


def test_rank_by_energy() -> None:
    weight = np.diag([3.0, 2.0, 1.0, 0.0])
    np.testing.assert_allclose(energies(weight), np.array([9, 13, 14, 14]) / 14)
    assert [rank_for_energy(weight, share) for share in (0.0, 0.6, 9 / 14, 0.9, 0.93, 1.0)] == [
        1, 1, 1, 2, 3, 3,
    ]  # fmt: skip
    assert rank_for_energy(np.zeros((3, 3)), 0.9) == 1


def test_rows_and_columns() -> None:
    rng = np.random.default_rng(2)
    down, across = rng.normal(size=(3, 1, 5, 4)), rng.normal(size=(1, 3, 4, 6))
    kernel = np.einsum("hxir,ywro->hwio", down, across)
    u, v = split_rows_and_columns(kernel, 4)
    np.testing.assert_allclose(np.einsum("hxir,ywro->hwio", u, v), kernel, atol=1e-10)
    kernel = rng.normal(size=(3, 3, 5, 6))
    x = correlated(45, 400, seed=3)
    errors = []
    for hessian in (None, x.T @ x):
        u, v = split_rows_and_columns(kernel, 3, hessian)
        change = kernel - np.einsum("hxir,ywro->hwio", u, v)
        errors.append(layer_error(change.reshape(45, 6), x.T @ x))
    assert errors[1] < 0.8 * errors[0]


def test_tucker() -> None:
    rng = np.random.default_rng(4)
    kernel = np.einsum(
        "ia,hwab,bo->hwio", rng.normal(size=(8, 3)), rng.normal(size=(3, 3, 3, 4)),
        rng.normal(size=(4, 9)),
    )  # fmt: skip
    np.testing.assert_allclose(tucker2(kernel, 3, 4).decode(), kernel, atol=1e-9)
    kernel = rng.normal(size=(3, 3, 8, 9))
    np.testing.assert_allclose(tucker2(kernel, 8, 9).decode(), kernel, atol=1e-9)
    errors = [np.sum((tucker2(kernel, r, r).decode() - kernel) ** 2) for r in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)


def test_canonical_polyadic() -> None:
    rng = np.random.default_rng(5)
    parts = [rng.normal(size=(size, 3)) for size in (3, 3, 8, 9)]
    kernel = np.einsum("hr,wr,ir,or->hwio", *parts)
    found = canonical_polyadic(kernel, 3)
    assert np.sum((found.decode() - kernel) ** 2) < 1e-3 * np.sum(kernel**2)
    kernel = rng.normal(size=(3, 3, 6, 7))
    errors = [np.sum((canonical_polyadic(kernel, r).decode() - kernel) ** 2) for r in (1, 4, 16)]
    assert errors == sorted(errors, reverse=True)
    # More terms than the largest axis has entries.
    assert canonical_polyadic(kernel, 16).first.shape == (6, 16)


def test_nonlinearity_counts() -> None:
    x = correlated(18, 800, seed=6)
    rng = np.random.default_rng(7)
    weight, bias = rng.normal(size=(18, 12)), rng.normal(size=12)
    sums = x @ weight + bias
    u, v = split_matrix(weight, 5, x.T @ x)
    linear = np.sum((np.maximum(x @ u @ v + bias, 0) - np.maximum(sums, 0)) ** 2)
    u, v, shift = split_with_nonlinearity(weight, bias, 5, x, sums)
    assert u.shape == (18, 5) and v.shape == (5, 12)
    found = np.sum((np.maximum(x @ u @ v + shift, 0) - np.maximum(sums, 0)) ** 2)
    assert found < linear
    # Inputs that an earlier compressed layer has moved: the sums aimed at stay the original's.
    moved = x + 0.3 * rng.normal(size=x.shape)
    errors = []
    for patches in (x, moved):
        u, v, shift = split_with_nonlinearity(weight, bias, 5, patches, sums)
        errors.append(np.sum((np.maximum(moved @ u @ v + shift, 0) - np.maximum(sums, 0)) ** 2))
    assert errors[1] < errors[0]
