"""Which ranks: by the energy a layer keeps, or for a whole network under a total."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def spectrum(weight: Array, hessian: Array | None = None) -> Array:
    """Squared norms of the weight's [K, N] singular directions, falling; with `hessian`, X·Xᵀ, of
    the outputs'."""
    seen = weight if hessian is None else np.linalg.cholesky(hessian).T @ weight
    return np.asarray(np.linalg.svd(seen, compute_uv=False) ** 2)


def energies(squares: Array) -> Array:
    """Share of a spectrum that ranks 1, 2, ... hold: ascending to 1."""
    total = squares.sum()
    return np.cumsum(squares) / total if total > 0 else np.ones(len(squares))


def rank_for_energy(squares: Array, energy: float) -> int:
    """The smallest rank that holds a share `energy` (0 to 1)."""
    held = energies(squares)
    return min(int(np.searchsorted(held, energy - 1e-12)) + 1, len(held))


@dataclass(frozen=True)
class Choice:
    """A rank that a layer may get: what it costs and what is lost with it."""

    rank: int
    cost: float
    loss: float


def allocate(
    wholes: Sequence[float], choices: Sequence[Sequence[Choice]], total: float
) -> list[Choice | None]:
    """The layers' choices (None: whole, which costs `wholes` and loses nothing) that together cost
    at most `total` and lose little.

    Zhang et al. 2016, section 3.4, "rank selection for whole-model acceleration" (whose loss is
    -log of the energy that a layer keeps): greedily, the layer whose rank falls next is the one
    that loses least for the cost it saves. A choice may be skipped for a later one that loses less
    by cost. Raises `ValueError` where even the smallest ranks cost more.
    """
    state: list[Choice | None] = [None] * len(wholes)
    costs = list(wholes)
    while sum(costs) > total:
        best = None
        for layer, options in enumerate(choices):
            now = state[layer]
            lost = 0.0 if now is None else now.loss
            for option in options:
                saved = costs[layer] - option.cost
                if saved > 0:
                    price = max(option.loss - lost, 0.0) / saved
                    if best is None or price < best[0]:
                        best = price, layer, option
        if best is None:
            raise ValueError(
                f"the smallest ranks cost {sum(costs):g}, which is more than the total {total:g}"
            )
        _, layer, option = best
        state[layer], costs[layer] = option, option.cost
    return state
