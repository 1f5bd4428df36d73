"""Factors of weights: exact at full rank, best at lower ones, better on data where they know it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.low_rank import (
    canonical_polyadic,
    split_matrix,
    split_rows_and_columns,
    tucker2,
)
from tvm_compress.relay_passes.numerics.low_rank_residual import split_with_residual
from tvm_compress.relay_passes.numerics.low_rank_responses import split_for_responses
from tvm_compress.relay_passes.numerics.rank_choice import (
    Choice,
    allocate,
    energies,
    rank_for_energy,
    spectrum,
)
from tvm_compress.relay_passes.numerics.second_order import damped, layer_error
from tvm_compress.relay_passes.numerics.sparsity_pattern import Block, Unstructured


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
    squares = spectrum(np.diag([3.0, 2.0, 1.0, 0.0]))
    np.testing.assert_allclose(energies(squares), np.array([9, 13, 14, 14]) / 14)
    assert [rank_for_energy(squares, share) for share in (0.0, 0.6, 9 / 14, 0.9, 0.93, 1.0)] == [
        1, 1, 1, 2, 3, 3,
    ]  # fmt: skip
    assert rank_for_energy(np.zeros(3), 0.9) == 1
    x = correlated(20, 500)
    weight = np.random.default_rng(1).normal(size=(20, 11))
    seen = np.linalg.svd(x @ weight, compute_uv=False) ** 2
    np.testing.assert_allclose(spectrum(weight, x.T @ x), seen, rtol=1e-9)


def test_ranks_under_a_total() -> None:
    """Against every combination: greedy choices are the best or nearly, and hold the total."""
    rng = np.random.default_rng(9)
    for _ in range(20):
        choices = []
        for _ in range(3):
            held = energies(np.sort(rng.random(5) ** 4)[::-1])
            costs = np.sort(rng.random(5))
            choices.append([Choice(n + 1, costs[n], -np.log(held[n])) for n in range(4)])
        wholes = [1.0, 1.0, 1.0]
        total = 0.5 * sum(wholes) + 0.5 * sum(options[0].cost for options in choices)
        found = allocate(wholes, choices, total)
        best = min(
            sum(0.0 if item is None else item.loss for item in several)
            for several in itertools.product(*([None, *options] for options in choices))
            if sum(1.0 if item is None else item.cost for item in several) <= total
        )
        assert sum(1.0 if item is None else item.cost for item in found) <= total
        assert sum(0.0 if item is None else item.loss for item in found) < best - np.log(0.75)
    assert allocate([2.0], [[Choice(1, 1.0, 0.5)]], 2.0) == [None]
    with pytest.raises(ValueError, match="more than the total"):
        allocate([2.0], [[Choice(1, 1.0, 0.5)]], 0.5)


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


@pytest.mark.parametrize("form", ["rows_and_columns", "tucker", "canonical"])
def test_data_aware_kernels(form: str) -> None:
    """Where inputs are correlated the outputs' error falls, never below that of the best product
    without a form."""
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(3, 3, 6, 8))
    x = correlated(54, 400, seed=3)
    hessian = damped(x.T @ x)

    def product(metric: np.ndarray | None) -> np.ndarray:
        if form == "tucker":
            return tucker2(kernel, 3, 4, metric).decode()
        if form == "canonical":
            return canonical_polyadic(kernel, 6, metric).decode()
        return np.einsum("hxir,ywro->hwio", *split_rows_and_columns(kernel, 4, metric))

    plain, aware = (
        layer_error((kernel - product(metric)).reshape(54, 8), hessian)
        for metric in (None, hessian)
    )
    assert aware < 0.6 * plain
    rank = {"tucker": 4, "canonical": 6, "rows_and_columns": 8}[form]
    least = spectrum(kernel.reshape(54, 8), hessian)[rank:].sum()
    assert aware >= least


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 1)])
def test_residual(pattern: Block) -> None:
    """A weight that is a product and some large entries comes back; data lower the outputs'
    error."""
    rng = np.random.default_rng(8)
    product = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 16))
    spikes = pattern.spread(rng.random(pattern.pool(product).shape) < 0.05, (40, 16))
    weight = product + 8 * spikes

    def plain(matrix: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        u, v = split_matrix(matrix, 3)
        return (u, v), u @ v

    (u, v), rest = split_with_residual(weight, plain, pattern, 1 - spikes.mean())
    assert np.count_nonzero(rest) <= np.count_nonzero(spikes)
    if isinstance(pattern, Unstructured):
        np.testing.assert_allclose(u @ v + rest, weight, atol=0.3)
    without = weight - np.matmul(*split_matrix(weight, 3))
    assert np.sum((weight - u @ v - rest) ** 2) < 0.5 * np.sum(without**2)

    x = correlated(40, 300, seed=4)
    hessian = damped(x.T @ x)

    def aware(matrix: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        u, v = split_matrix(matrix, 3, hessian)
        return (u, v), u @ v

    weight = rng.normal(size=(40, 16))
    errors = []
    for fit, metric in ((plain, None), (aware, hessian)):
        (u, v), rest = split_with_residual(weight, fit, pattern, 0.9, metric)
        assert abs(np.count_nonzero(rest) / rest.size - 0.1) < 0.02
        errors.append(layer_error(weight - u @ v - rest, hessian))
    assert errors[1] < 0.7 * errors[0]
    assert errors[1] < layer_error(weight - np.matmul(*split_matrix(weight, 3, hessian)), hessian)


RELU, RELU6 = (0.0, np.inf), (0.0, 6.0)


@pytest.mark.parametrize("bounds", [RELU, RELU6])
def test_nonlinearity_counts(bounds: tuple[float, float]) -> None:
    x = correlated(18, 800, seed=6)
    rng = np.random.default_rng(7)
    weight, bias = 2 * rng.normal(size=(18, 12)), rng.normal(size=12)
    sums = x @ weight + bias

    def error(patches: np.ndarray, u: np.ndarray, v: np.ndarray, shift: np.ndarray) -> float:
        return float(
            np.sum((np.clip(patches @ u @ v + shift, *bounds) - np.clip(sums, *bounds)) ** 2)
        )

    u, v, shift = split_for_responses(weight, bias, 5, x, sums, bounds)
    assert u.shape == (18, 5) and v.shape == (5, 12)
    linear = split_for_responses(weight, bias, 5, x, sums)
    assert error(x, u, v, shift) < 0.95 * error(x, *linear)
    # Inputs that an earlier compressed layer has moved: the sums aimed at stay the original's.
    moved = x + 0.3 * rng.normal(size=x.shape)
    symmetric = split_for_responses(weight, bias, 5, x, sums, bounds)
    asymmetric = split_for_responses(weight, bias, 5, moved, sums, bounds)
    assert error(moved, *asymmetric) < error(moved, *symmetric)


def test_linear_responses() -> None:
    """Without an activation: the reduced-rank regression of the sums, in closed form."""
    x = correlated(18, 800, seed=6) + 0.5
    rng = np.random.default_rng(7)
    weight, bias = rng.normal(size=(18, 12)), rng.normal(size=12)
    sums = x @ weight + bias
    u, v, shift = split_for_responses(weight, bias, 5, x, sums)
    mean = sums.mean(axis=0)
    directions = np.linalg.svd(sums - mean, full_matrices=False)[2][:5]
    expected = (sums - mean) @ directions.T @ directions + mean
    np.testing.assert_allclose(x @ u @ v + shift, expected, atol=1e-4)


def test_few_patches_stay_near_the_weight() -> None:
    """Fewer patches than inputs say little: the moments of all the data hold the answer."""
    x = correlated(30, 2000, seed=2)
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(size=(30, 12)), rng.normal(size=12)
    wanted = (x + 0.2 * rng.normal(size=x.shape)) @ weight + bias
    errors = []
    for metric in (None, np.cov(x.T)):
        u, v, shift = split_for_responses(weight, bias, 8, x[:25], wanted[:25], RELU, metric)
        change = np.maximum(x @ u @ v + shift, 0) - np.maximum(wanted, 0)
        errors.append(float(np.sum(change**2)))
    assert errors[1] < 0.5 * errors[0]
