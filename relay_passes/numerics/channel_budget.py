"""How many channels each group keeps, so that the layers take a share of their operations.

A layer takes operations in proportion to the channels that it computes and to those that it reads,
so the total is a quadratic form of the counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Counts = NDArray[np.int64]

_BISECTIONS = 40


@dataclass(frozen=True, eq=False)
class OperationCounts:
    """Multiply-accumulates of some layers by how many channels each of G groups keeps.

    `whole` [L]: of the layers as they are; `outputs`, `inputs` [L, G]: which part of a layer's
    outputs and inputs one channel of a group is; the rest of them always stays.
    """

    whole: Vector
    outputs: NDArray[np.float64]
    inputs: NDArray[np.float64]
    sizes: Counts

    def total(self, counts: Vector | Counts) -> float:
        """With `counts` [G] channels left."""
        gone = self.sizes - counts
        return float(self.whole @ ((1 - self.outputs @ gone) * (1 - self.inputs @ gone)))


def snap(wanted: Vector, sizes: Counts, multiples: Counts) -> Counts:
    """Counts [G] of at most `wanted`: multiples of `multiples`, at least one of those; groups that
    have no more than that, or are wanted whole, stay whole."""
    floored = np.floor(wanted / multiples + 1e-9).astype(np.int64) * multiples
    counts = np.maximum(floored, multiples)
    return np.where((sizes <= multiples) | (wanted >= sizes), sizes, np.minimum(counts, sizes))


def counts_within(
    operations: OperationCounts,
    limit: float,
    multiples: Counts,
    wanted_at: Callable[[float], Vector],
) -> Counts:
    """The counts of the largest level in 0 to 1 whose layers take at most `limit`.

    `wanted_at(level)`: how many channels [G] stay, growing with the level. What rounding down to
    multiples leaves over goes to the groups that lost most by it. Where even the fewest channels
    take more, those are the answer.
    """
    sizes = operations.sizes

    def counts_at(level: float) -> Counts:
        return snap(wanted_at(level), sizes, multiples)

    low, high = 0.0, 1.0
    if operations.total(counts_at(1.0)) <= limit:
        return counts_at(1.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if operations.total(counts_at(middle)) <= limit:
            low = middle
        else:
            high = middle
    counts, wanted = counts_at(low), wanted_at(high)
    for group in np.argsort(-(wanted - counts) / multiples, kind="stable"):
        more = counts.copy()
        more[group] = min(counts[group] + multiples[group], sizes[group])
        if operations.total(more) <= limit:
            counts = more
    return counts
