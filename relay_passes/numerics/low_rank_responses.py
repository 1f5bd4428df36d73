"""Weights as products of smaller ones for what stands behind the layer: an activation follows, and
the network before it is compressed already.

Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks", sections 3.1 to 3.3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .low_rank import split_matrix

Array = NDArray[np.float64]

# The penalty grows in two stages (section 3.2: 0.01, then 1), of so many rounds each.
_PENALTIES, _ROUNDS = (0.01, 1.0), 12


def split_for_responses(
    weight: Array, bias: Array, rank: int, before: Array, wanted: Array,
    bounds: tuple[float, float] = (-np.inf, np.inf), covariance: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """act(x w + b) => act(x u v + b'), [K, N] => [K, r], [r, N], [N]; act clips to `bounds`.

    `before` [P, K] are patches that the layer reads in the *compressed* network, `wanted` [P, N]
    the sums of the same positions in the original one (the asymmetric form). Without bounds that is
    a reduced-rank regression; with them auxiliary variables z, in the place of the sums, and
    factors are solved for in turns: min |act(z) - act(wanted)|² + λ |z - (x u v + b')|².

    `covariance` [K, K], of x over all the data, holds the answer near `weight` where patches are
    few: it counts for as many of them as there are inputs.
    """
    target = np.clip(wanted, *bounds)
    mean_x = before.mean(axis=0)
    centred = before - mean_x
    gram = centred.T @ centred / len(before)
    if covariance is not None:
        gram += len(weight) / len(before) * covariance
    gram[np.diag_indices_from(gram)] += 1e-8 * np.trace(gram) / len(gram) + 1e-30
    lower = np.linalg.cholesky(gram)
    pulled = centred.T / len(before)

    def fit(sums: Array) -> tuple[Array, Array, Array]:
        """The best factors and bias for linear sums."""
        rest = sums - before @ weight
        moved = np.linalg.solve(lower, pulled @ (rest - rest.mean(axis=0)))
        u, v = split_matrix(weight + np.linalg.solve(lower.T, moved), rank, gram)
        return u, v, sums.mean(axis=0) - mean_x @ u @ v

    u, v, shift = fit(wanted)
    if np.isinf(bounds).all():
        return u, v, shift
    best, found = np.inf, (u, v, shift)
    for penalty in np.repeat(_PENALTIES, _ROUNDS):
        sums = before @ u @ v + shift
        error = float(((np.clip(sums, *bounds) - target) ** 2).sum())
        if error < best:
            best, found = error, (u, v, shift)
        u, v, shift = fit(_auxiliary(sums, target, penalty, bounds))
    return found


def _auxiliary(sums: Array, target: Array, penalty: float, bounds: tuple[float, float]) -> Array:
    """argmin over z of (act(z) - target)² + penalty (z - sums)², piece by piece of act."""
    low, high = bounds
    inside = np.clip((target + penalty * sums) / (1 + penalty), low, high)
    best, cost = inside, (inside - target) ** 2 + penalty * (inside - sums) ** 2
    for bound, outside in ((low, np.minimum(sums, low)), (high, np.maximum(sums, high))):
        if np.isfinite(bound):
            other = (bound - target) ** 2 + penalty * (outside - sums) ** 2
            best, cost = np.where(other < cost, outside, best), np.minimum(other, cost)
    return best
