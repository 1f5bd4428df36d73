"""Merging of similar neurons against the published algorithm written out, and what it leaves."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.neuron_merging import merge_similar


def literal(weights: np.ndarray, outgoing: np.ndarray, keep: int) -> tuple[list[int], np.ndarray]:
    """Srinivas & Babu, section 4: weights [C, K] (bias included), outgoing [N, C]."""
    alive, a = list(range(len(weights))), outgoing.copy()
    while len(alive) > keep:
        pairs = {
            (i, j): np.mean(a[:, j] ** 2) * np.sum((weights[i] - weights[j]) ** 2)
            for i in alive
            for j in alive
            if i != j
        }
        i, j = min(pairs, key=lambda pair: pairs[pair])
        a[:, i] += a[:, j]
        a[:, j] = 0
        alive.remove(j)
    return alive, a


@pytest.mark.parametrize("keep", [1, 5, 11, 12])
def test_agrees_with_the_published_algorithm(keep: int) -> None:
    rng = np.random.default_rng(keep)
    incoming, outgoing = rng.normal(size=(7, 12)), rng.normal(size=(4, 12))
    alive, expected = literal(incoming.T, outgoing, keep)
    merging = merge_similar(incoming, [outgoing.T], keep)
    assert np.flatnonzero(merging.kept).tolist() == alive
    sums = [outgoing[:, merging.into == c].sum(axis=1) for c in range(12)]
    np.testing.assert_allclose(np.transpose(sums), expected, atol=1e-12)


def test_twins_cost_nothing() -> None:
    """Neurons that are the same, up to an activation, merge first, and the outputs stay."""
    rng = np.random.default_rng(0)
    incoming = rng.normal(size=(6, 8))
    for twin, of in ((3, 1), (7, 1), (5, 0)):
        incoming[:, twin] = incoming[:, of]
    first, second = rng.normal(size=(8, 3)), rng.normal(size=(8, 2, 4))
    merging = merge_similar(incoming, [first, second], 5)
    # Which of twins stays is decided by what reads them.
    assert len(set(merging.into[[1, 3, 7]])) == 1 and merging.into[0] == merging.into[5]
    assert merging.kept.sum() == 5
    hidden, merged = np.maximum(rng.normal(size=(50, 6)) @ incoming, 0), np.zeros_like(first)
    np.add.at(merged, merging.into, first)
    np.testing.assert_allclose(hidden @ merged, hidden @ first, atol=1e-12)


def test_numbers_of_neurons() -> None:
    with pytest.raises(ValueError, match="keep is 1 to 3, not 4"):
        merge_similar(np.ones((2, 3)), [np.ones((3, 1))], 4)
