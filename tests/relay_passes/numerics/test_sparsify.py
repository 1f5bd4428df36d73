"""Patterns of zeros, scores, and the second-order solvers against slow forms of the published
algorithms."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics import saliency
from tvm_compress.relay_passes.numerics.second_order import (
    damped,
    layer_error,
    prune_greedily,
    prune_in_order,
    reconstruct,
)
from tvm_compress.relay_passes.numerics.sparsity_pattern import (
    Block,
    KernelShape,
    SemiStructured,
    Unstructured,
)

PATTERNS = [
    Unstructured(),
    Block(16, 1),
    Block(4, 4),
    Block(1, 8),
    SemiStructured(2, 4),
    SemiStructured(2, 4, 16),
    SemiStructured(1, 3),
]


def problem(inputs: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight [K, N] and X·Xᵀ of correlated inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    x = mixing @ rng.normal(size=(inputs, 4 * inputs + 8))
    return rng.normal(size=(inputs, outputs)), x @ x.T


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.words)
@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (32, 32), (33, 17), (36, 40)])
def test_units_stay_whole(pattern: Block | SemiStructured, shape: tuple[int, int]) -> None:
    scores = np.random.default_rng(1).random(shape)
    kept = pattern.choose(scores, 0.5)
    assert kept.shape == shape and kept.dtype == bool
    for column in range(0, shape[1], pattern.outputs):
        together = kept[:, column : column + pattern.outputs]
        assert (together == together[:, :1]).all()
    if isinstance(pattern, SemiStructured):
        for start in range(0, shape[0], pattern.of):
            window = kept[start : start + pattern.of]
            assert (window.sum(axis=0) == -(-pattern.kept * len(window) // pattern.of)).all()
    else:
        for start in range(0, shape[0], pattern.inputs):
            together = kept[start : start + pattern.inputs]
            assert (together == together[:1]).all()
        units = pattern.pool(np.ones(shape))
        removed = pattern.pool(~kept * 1.0) > 0
        assert removed.sum() == round(units.size * 0.5)


def test_the_smallest_scores_go() -> None:
    scores = np.array([[4.0, 1.0], [3.0, 2.0], [9.0, 0.5], [8.0, 7.0]])
    expected = [[True, False], [True, False], [True, False], [True, True]]
    assert Unstructured().choose(scores, 3 / 8).tolist() == expected
    # 2 x 2 blocks have the sums 10 and 24.5.
    assert Block(2, 2).choose(scores, 0.5).tolist() == [[False] * 2] * 2 + [[True] * 2] * 2
    assert SemiStructured(2, 4).choose(scores).sum(axis=0).tolist() == [2, 2]


def kernel_shape(entries: int, shapes: int) -> KernelShape:
    bound = KernelShape(entries, shapes).of_layer(9, 10)
    assert bound is not None
    return bound


def test_kernel_shapes() -> None:
    rng = np.random.default_rng(2)
    scores = rng.random((9 * 6, 10))
    kept = kernel_shape(4, 3).choose(scores).reshape(9, -1).T
    assert (kept.sum(axis=1) == 4).all()
    assert len(np.unique(kept, axis=0)) <= 3
    assert KernelShape(4).of_layer(1, 10) is None
    assert KernelShape(4, outputs=2).of_layer(9, 1) is None
    # With a shape for everyone, each kernel keeps its own best.
    free = kernel_shape(4, 1000).choose(scores).reshape(9, -1)
    flat = scores.reshape(9, -1)
    threshold = np.sort(flat, axis=0)[-4]
    assert np.array_equal(free, flat >= threshold)


@pytest.mark.parametrize(
    "make", [lambda: Block(0, 1), lambda: SemiStructured(4, 4), lambda: KernelShape(0)]
)
def test_impossible_patterns(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_scores() -> None:
    weight, second = problem(12, 5)
    x = np.linalg.cholesky(second).T  # some inputs with this X·Xᵀ, a patch a row
    rows = [(x[:, k, None] * weight[k]) for k in range(12)]  # what each input adds
    expected = np.array([(row**2).sum(axis=0) / 2 for row in rows])
    np.testing.assert_allclose(saliency.diagonal_hessian(weight, second), expected)
    norm = np.abs(weight) * np.linalg.norm(x, axis=0)[:, None]
    np.testing.assert_allclose(saliency.activation_aware(weight, second), norm / norm.max(axis=0))
    centred = x - x.mean(axis=0)
    y = centred @ weight
    correlation = [[np.corrcoef(x[:, k], y[:, n])[0, 1] for n in range(5)] for k in range(12)]
    found = saliency.output_correlation(weight, second, x.mean(axis=0), len(x))
    np.testing.assert_allclose(found, np.abs(correlation), rtol=1e-6)


def test_reconstruct_is_least_squares() -> None:
    weight, second = problem(20, 6)
    x = np.linalg.cholesky(second).T
    kept = np.random.default_rng(3).random(weight.shape) < 0.5
    kept[:, 4] = False
    found = reconstruct(weight, second, kept)
    for column in range(6):
        rows = np.flatnonzero(kept[:, column])
        expected = np.zeros(20)
        if rows.size:
            solved = np.linalg.lstsq(x[:, rows], x @ weight[:, column], rcond=None)[0]
            expected[rows] = solved
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-7, atol=1e-9)


def sparse_gpt(weight: np.ndarray, hessian: np.ndarray, sparsity: float) -> np.ndarray:
    """Input by input, with the inverse of the inputs that are left made anew each time."""
    left = weight.copy()
    size = len(weight)
    diagonal = [np.linalg.inv(hessian[k:, k:])[0, 0] for k in range(size)]
    scores = left**2 / np.array(diagonal)[:, None]
    removed = np.argsort(scores, axis=None, kind="stable")[: round(scores.size * sparsity)]
    mask = np.zeros(scores.size, bool)
    mask[removed] = True
    mask = mask.reshape(scores.shape)
    for k in range(size):
        inverse = np.linalg.inv(hessian[k:, k:])
        for n in range(weight.shape[1]):
            if mask[k, n]:
                left[k:, n] -= left[k, n] / inverse[0, 0] * inverse[:, 0]
                left[k, n] = 0
    return left


def brain_surgeon(weight: np.ndarray, hessian: np.ndarray, sparsity: float) -> np.ndarray:
    """One output at a time, inverse made anew for every weight that goes."""
    traces = []
    for n in range(weight.shape[1]):
        alive = list(range(len(weight)))
        left = weight[:, n].copy()
        steps, highest = [], 0.0
        while alive:
            inverse = np.linalg.inv(hessian[np.ix_(alive, alive)])
            prices = left[alive] ** 2 / np.diag(inverse) / 2
            worst = int(prices.argmin())
            highest = max(highest, float(prices[worst]))
            left[alive] -= left[alive[worst]] / inverse[worst, worst] * inverse[:, worst]
            left[alive.pop(worst)] = 0
            steps.append((highest, left.copy()))
        traces.append(steps)
    prices = np.array([[price for price, _ in steps] for steps in traces])  # [N, K]
    cheapest = np.argsort(prices, axis=None, kind="stable")[: round(prices.size * sparsity)]
    counts = np.bincount(cheapest // prices.shape[1], minlength=len(traces))
    columns = [
        steps[count - 1][1] if count else weight[:, n]
        for n, (steps, count) in enumerate(zip(traces, counts, strict=True))
    ]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_agrees_with_published_algorithms(sparsity: float) -> None:
    weight, second = problem(24, 7)
    hessian = damped(second)
    found, kept = prune_in_order(weight, hessian, Unstructured(), sparsity)
    expected = sparse_gpt(weight, hessian, sparsity)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
    assert np.array_equal(kept, expected != 0)
    found, kept = prune_greedily(weight, hessian, Unstructured(), sparsity)
    expected = brain_surgeon(weight, hessian, sparsity)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    assert np.array_equal(kept, expected != 0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.words)
def test_second_order_beats_magnitude(pattern: Block | SemiStructured) -> None:
    weight, second = problem(150, 33, seed=4)
    hessian = damped(second)
    by_size = pattern.choose(saliency.magnitude(weight), 0.6)
    errors = [layer_error(weight * by_size - weight, second)]
    for solve in (
        lambda: prune_in_order(weight, hessian, pattern, 0.6),
        lambda: prune_greedily(weight, hessian, pattern, 0.6, together=4),
    ):
        pruned, kept = solve()
        assert not pruned[~kept].any()
        assert np.array_equal(pattern.spread(pattern.pool(kept * 1.0) > 0, kept.shape), kept)
        errors.append(layer_error(pruned - weight, second))
    # Greedy removal with exact compensation is the best of the three.
    assert errors[2] < errors[1] and errors[2] < 0.7 * errors[0]


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, second = problem(16, 4)
    second[:, 3] = second[3, :] = 0
    for solve in (prune_in_order, prune_greedily):
        pruned, kept = solve(weight, damped(second), Unstructured(), 0.5)
        assert np.isfinite(pruned).all() and (~kept).sum() == 32
