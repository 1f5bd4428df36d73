"""How a sparsity of several layers together is split between them.

Every layer has units that go in a fixed order, each with a price. Where prices of all layers are
in one currency, the cheapest units of all are the best that a total can buy, as long as prices rise
in each layer: the Lagrangian solution, exact up to one unit (Frantar & Alistarh 2022, "SPDY",
section 3, with the loss of each layer measured and between those points as its error goes).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def loss_prices(prices: Vector, sparsity: float, loss: float) -> Vector:
    """Prices of units in ascending order => the same in terms of a loss that was measured with a
    `sparsity` of the units gone."""
    gone = max(1, round(len(prices) * sparsity))
    spent = float(prices[:gone].sum())
    if spent <= 0 or loss <= 0:
        return np.zeros(len(prices))
    return np.asarray(prices * (loss / spent))


def split_sparsity(
    prices: Sequence[Vector], weights: Sequence[float], sparsity: float
) -> list[float]:
    """The share of each layer's units that go, so that a `sparsity` of all `weights` is gone.

    `prices`: of each layer's units, ascending; `weights`: what a layer counts in the total. No
    layer loses its last unit while another one has two.
    """
    owners = np.repeat(np.arange(len(prices)), [len(price) for price in prices])
    unit = np.array([weight / len(price) for price, weight in zip(prices, weights, strict=True)])
    per_weight = np.concatenate([np.maximum.accumulate(price) for price in prices]) / unit[owners]
    last = np.concatenate([np.arange(len(price)) == len(price) - 1 for price in prices])
    order = np.lexsort((per_weight, last))
    gone = np.cumsum(unit[owners[order]])
    taken = order[: int(np.searchsorted(gone, sparsity * sum(weights) * (1 + 1e-12), "right"))]
    counts = np.bincount(owners[taken], minlength=len(prices))
    return [count / len(price) for count, price in zip(counts.tolist(), prices, strict=True)]
