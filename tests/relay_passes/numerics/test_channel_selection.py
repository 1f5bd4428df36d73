"""Channel selection from second moments against slow forms of the published algorithms, which work
on the activations themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.channel_consumer import (
    Consumer,
    bias_change,
    centred,
    contribution_moments,
    reconstruct_kept,
)
from tvm_compress.relay_passes.numerics.channel_norms import (
    filter_norms,
    folded_batch_norm_scale,
    keep_best,
    relative,
)
from tvm_compress.relay_passes.numerics.discriminating_selection import select_discriminating
from tvm_compress.relay_passes.numerics.lasso_selection import keep_by_lasso, lasso, select_by_lasso
from tvm_compress.relay_passes.numerics.second_order import damped, layer_error
from tvm_compress.relay_passes.numerics.surgeon_selection import removal_errors, select_by_surgeon
from tvm_compress.relay_passes.numerics.thinet_selection import keep_greedily, select_greedily


@dataclass
class Problem:
    """Patches x [P, K] of correlated channels, and a consumer of them."""

    x: np.ndarray
    consumer: Consumer

    @property
    def parts(self) -> np.ndarray:
        """What each channel contributes: [C, P * N]."""
        owners, weight = self.consumer.owners, self.consumer.weight
        return np.stack(
            [
                (self.x[:, owners == c] @ weight[owners == c]).ravel()
                for c in range(self.consumer.channels)
            ]
        )


def problem(
    channels: int = 9, positions: int = 3, outputs: int = 5, others: int = 0, seed: int = 0
) -> Problem:
    rng = np.random.default_rng(seed)
    inputs = channels * positions + others
    mixing = rng.normal(size=(inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    x = (0.3 + rng.normal(size=(6 * inputs, inputs))) @ mixing
    owner = None
    if others:
        owner = rng.permutation(
            np.concatenate([np.tile(np.arange(channels), positions), np.full(others, -1)])
        )
    weight = rng.normal(size=(inputs, outputs))
    return Problem(x, Consumer(weight, x.T @ x, channels, owner))


PROBLEMS = [
    [problem()],
    [problem(others=4, seed=1)],
    [problem(positions=1, outputs=1, seed=2), problem(outputs=7, others=2, seed=3)],
]


def all_parts(problems: Sequence[Problem]) -> np.ndarray:
    """Contributions of each channel to all consumers, each relative to its outputs' size."""
    scaled = [item.parts / np.linalg.norm(item.x @ item.consumer.weight) for item in problems]
    return np.concatenate(scaled, axis=1)


@pytest.mark.parametrize("problems", PROBLEMS)
def test_contribution_moments(problems: list[Problem]) -> None:
    parts = all_parts(problems)
    found = contribution_moments([item.consumer for item in problems])
    np.testing.assert_allclose(found, parts @ parts.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("problems", PROBLEMS)
def test_lasso(problems: list[Problem]) -> None:
    """He et al., equation 2, by proximal gradient steps; then λ from 0 up until few are left."""
    z = all_parts(problems)
    y = z.sum(axis=0)
    rate = 1 / np.linalg.norm(z, 2) ** 2

    def literal(penalty: float, scales: np.ndarray) -> np.ndarray:
        for _ in range(20000):
            stepped = scales + rate * (z @ (y - scales @ z))
            moved = np.sign(stepped) * np.maximum(np.abs(stepped) - rate * penalty, 0)
            if np.abs(moved - scales).max() < 1e-13:
                return moved
            scales = moved
        return scales

    highest = np.abs(z @ y).max()
    scales = np.ones(len(z))
    moments = z @ z.T
    counts: dict[int, np.ndarray] = {}
    for share in np.geomspace(1e-3, 1.1, 60):
        scales = literal(share * highest, scales)
        found = lasso(moments, z @ y, share * highest, np.ones(len(z)))
        np.testing.assert_allclose(found, scales, atol=1e-7)
        counts.setdefault(np.count_nonzero(scales), scales != 0)
    assert not scales.any() and len(counts) > 3
    consumers = [item.consumer for item in problems]
    for keep, expected in counts.items():
        if keep:
            assert keep_by_lasso(moments, keep).tolist() == expected.tolist()
            assert select_by_lasso(consumers, keep).tolist() == expected.tolist()


@pytest.mark.parametrize("problems", PROBLEMS)
def test_thinet(problems: list[Problem]) -> None:
    """Luo et al., algorithm 1, entry by entry."""
    parts = all_parts(problems)
    consumers = [item.consumer for item in problems]
    for keep in (1, 4, 8, 9):
        gone: list[int] = []
        while len(gone) < 9 - keep:
            values = {
                c: np.sum(parts[[*gone, c]].sum(axis=0) ** 2) for c in range(9) if c not in gone
            }
            gone.append(min(values, key=lambda c: values[c]))
        kept = select_greedily(consumers, keep)
        assert sorted(np.flatnonzero(~kept)) == sorted(gone)


def refitted(consumer: Consumer, kept: np.ndarray) -> tuple[np.ndarray, float]:
    """(weight, relative error) of least squares on patches that have the damped moments."""
    hessian = damped(consumer.second)
    x = np.linalg.cholesky(hessian).T
    rows = np.array([owner < 0 or kept[owner] for owner in consumer.owners])
    weight = np.zeros_like(consumer.weight)
    weight[rows] = np.linalg.lstsq(x[:, rows], x @ consumer.weight, rcond=None)[0]
    return weight, float(np.sum((x @ (weight - consumer.weight)) ** 2)) / consumer.energy


@pytest.mark.parametrize("problems", PROBLEMS)
def test_surgeon(problems: list[Problem]) -> None:
    """Every candidate is tried in every step, and all that stays is solved for."""
    consumers = [item.consumer for item in problems]
    for keep in (2, 5, 9):
        kept, left = np.ones(9, bool), np.full(9, np.inf)
        for _ in range(9 - keep):
            errors = np.full(9, np.inf)
            for c in np.flatnonzero(kept):
                trial = kept & (np.arange(9) != c)
                errors[c] = sum(refitted(consumer, trial)[1] for consumer in consumers)
            kept[errors.argmin()] = False
            left[errors.argmin()] = errors.min()
        np.testing.assert_allclose(removal_errors(consumers, keep), left, rtol=1e-8)
        assert select_by_surgeon(consumers, keep).tolist() == kept.tolist()
        for consumer in consumers:
            weight = reconstruct_kept(consumer, kept)
            np.testing.assert_allclose(weight, refitted(consumer, kept)[0], atol=1e-8)


def test_bias_takes_up_the_mean() -> None:
    item = problem(seed=5)
    consumer, kept = item.consumer, np.arange(9) % 3 > 0
    solved = reconstruct_kept(consumer, kept, damping=0.0)
    mean, count = item.x.mean(axis=0), len(item.x)
    about = Consumer(consumer.weight, centred(consumer.second, mean, count), 9)
    shifted = reconstruct_kept(about, kept, damping=0.0)
    bias = bias_change(consumer.weight, shifted, mean)
    y = item.x @ consumer.weight
    error, best = np.sum((item.x @ solved - y) ** 2), np.sum((item.x @ shifted + bias - y) ** 2)
    assert best < 0.99 * error < error
    rows = np.concatenate([item.x[:, consumer.kept_rows(kept)], np.ones((count, 1))], axis=1)
    expected = np.linalg.lstsq(rows, y, rcond=None)[0]
    np.testing.assert_allclose(shifted[consumer.kept_rows(kept)], expected[:-1], atol=1e-8)
    np.testing.assert_allclose(bias, expected[-1], atol=1e-8)


def test_selection_with_solved_weights_beats_the_filters_size() -> None:
    errors: dict[str, list[float]] = {}
    for seed in range(8):
        consumer = problem(24, 3, 10, seed=seed).consumer
        sizes = np.linalg.norm(consumer.weight.reshape(3, 24, 10), axis=(0, 2))
        chosen = {
            "size": keep_best(sizes, 12),
            "lasso": select_by_lasso([consumer], 12),
            "thinet": select_greedily([consumer], 12),
            "surgeon": select_by_surgeon([consumer], 12),
        }
        for name, kept in chosen.items():
            change = reconstruct_kept(consumer, kept) - consumer.weight
            error = layer_error(change, consumer.second) / consumer.energy
            errors.setdefault(name, []).append(error)
    mean = {name: np.mean(values) for name, values in errors.items()}
    assert mean["surgeon"] < min(mean["lasso"], mean["thinet"]) < mean["size"]


@pytest.mark.parametrize("problems", PROBLEMS)
@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_discrimination_aware_selection(problems: list[Problem], strength: float) -> None:
    """Zhuang et al., algorithm 2: the joint loss's gradient made anew for every channel."""
    consumers = [item.consumer for item in problems]
    rng = np.random.default_rng(7)
    gradients = [rng.random(consumer.weight.shape[1]) ** 4 for consumer in consumers]
    kept = np.zeros(9, bool)
    for _ in range(5):
        sizes = np.zeros(9)
        for consumer, f in zip(consumers, gradients, strict=True):
            x = np.linalg.cholesky(damped(consumer.second)).T
            change = refitted(consumer, kept)[0] - consumer.weight
            # Of Σ (x change)² / energy, and of as much again times f.
            gradient = x.T @ (x @ change) / consumer.energy * (1 + strength * f / f.mean())
            sizes += [np.sum(gradient[consumer.owners == c] ** 2) for c in range(9)]
        kept[np.where(kept, -1, sizes).argmax()] = True
    found = select_discriminating(consumers, gradients, 5, strength)
    assert found.tolist() == kept.tolist()
    nothing = [np.zeros(len(f)) for f in gradients]
    plain = select_discriminating(consumers, gradients, 5, discrimination=0.0)
    assert select_discriminating(consumers, nothing, 5, strength).tolist() == plain.tolist()


def test_sizes_of_filters() -> None:
    item = problem(seed=8)
    weight = item.consumer.weight
    np.testing.assert_allclose(filter_norms(weight, 1), np.abs(weight).sum(axis=0))
    np.testing.assert_allclose(filter_norms(weight, 2), np.sqrt((weight**2).sum(axis=0)))
    # A batch-norm of these outputs, folded, leaves γ as their spread.
    y = item.x @ weight
    gamma = np.array([0.5, -1.0, 2.0, 0.1, 3.0])
    folded = weight * (gamma / y.std(axis=0))
    mean, count = item.x.mean(axis=0), len(item.x)
    found = folded_batch_norm_scale(folded, item.consumer.second, mean, count)
    np.testing.assert_allclose(found, np.abs(gamma), rtol=1e-9)
    assert np.sqrt(np.mean(relative(gamma) ** 2)) == pytest.approx(1)
    assert relative(np.zeros(3)).tolist() == [0, 0, 0]


def test_who_stays() -> None:
    scores = np.array([3.0, 1.0, 2.0, 2.0, 0.0])
    assert keep_best(scores, 2).tolist() == [True, False, True, False, False]
    consumer = problem().consumer
    for select in (select_by_lasso, select_greedily, select_by_surgeon):
        assert select([consumer], 9).all()
        for keep in (0, 10):
            with pytest.raises(ValueError, match=f"keep is 1 to 9, not {keep}"):
                select([consumer], keep)


def test_channels_that_are_always_zero_leave_first() -> None:
    item = problem(seed=9)
    dead = item.consumer.owners == 4
    second = item.consumer.second.copy()
    second[dead, :] = 0
    second[:, dead] = 0
    consumer = Consumer(item.consumer.weight, second, 9)
    for select in (select_by_lasso, select_greedily, select_by_surgeon):
        kept = select([consumer], 8)
        assert np.flatnonzero(~kept).tolist() == [4]
        assert np.isfinite(reconstruct_kept(consumer, kept)).all()
    assert not keep_greedily(contribution_moments([consumer]), 8)[4]


def test_shapes_that_disagree() -> None:
    weight, second = np.ones((6, 2)), np.eye(6)
    with pytest.raises(ValueError, match="belong together"):
        Consumer(weight, np.eye(5), 3)
    with pytest.raises(ValueError, match="no whole number of 4 channels"):
        Consumer(weight, second, 4)
    with pytest.raises(ValueError, match="an owner each, below 3"):
        Consumer(weight, second, 3, np.full(6, 3))
