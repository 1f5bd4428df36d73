"""How many channels each group keeps, so that the layers take a share of their operations.

A layer takes operations in proportion to the channels that it computes and to those that it reads,
so the total is a quadratic form of the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, eq=False)
class CountOption:
    """What some groups that have one share may keep: `counts` [g], and the loss with those."""

    share: float
    counts: Counts
    loss: float


def cheapest_within(
    operations: OperationCounts, limit: float, options: Sequence[Sequence[CountOption]]
) -> list[CountOption]:
    """One of the `options` of each family of groups, so that the layers take at most `limit` and
    the losses' sum is small.

    `options`: of the families in the order of the groups, the first one whole, then ever smaller.
    Greedily, the next is the one that loses least for the operations it saves; one may be skipped
    for a later one. What is left over at the end goes where it gains most. Where even the
    smallest take more, those are the answer.
    """
    starts = np.cumsum([0, *(len(family[0].counts) for family in options)])
    state = [0] * len(options)

    def totals(family: int) -> Vector:
        """Of the network, with each of a family's options. [options]"""
        counts = np.concatenate([own[at].counts for own, at in zip(options, state, strict=True)])
        rows = np.tile(counts, (len(options[family]), 1))
        place = slice(starts[family], starts[family + 1])
        rows[:, place] = [option.counts for option in options[family]]
        gone = (operations.sizes - rows).T
        return np.asarray(
            operations.whole @ ((1 - operations.outputs @ gone) * (1 - operations.inputs @ gone)),
            np.float64,
        )

    losses = [np.maximum.accumulate([option.loss for option in family]) for family in options]
    while True:
        best = (np.inf, -1, -1)
        for family, loss in enumerate(losses):
            at, costs = state[family], totals(family)
            if costs[at] <= limit:
                return _filled_up(options, losses, state, totals, limit)
            saved = costs[at] - costs[at + 1 :]
            if len(saved):
                prices = np.where(
                    saved > 0, (loss[at + 1 :] - loss[at]) / np.maximum(saved, 1e-300), np.inf
                )
                best = min(best, (float(prices.min()), family, at + 1 + int(prices.argmin())))
        if best[1] < 0 or best[0] == np.inf:
            return [family[at] for family, at in zip(options, state, strict=True)]
        state[best[1]] = best[2]


def _filled_up(
    options: Sequence[Sequence[CountOption]],
    losses: Sequence[Vector],
    state: list[int],
    totals: Callable[[int], Vector],
    limit: float,
) -> list[CountOption]:
    """Larger options where they fit, those first that gain most."""
    while True:
        best = (0.0, -1, -1)
        for family, loss in enumerate(losses):
            at = state[family]
            gains = np.where(totals(family)[:at] <= limit, loss[at] - loss[:at], 0.0)
            if len(gains) and gains.max() > best[0]:
                best = (float(gains.max()), family, int(gains.argmax()))
        if best[1] < 0:
            return [family[at] for family, at in zip(options, state, strict=True)]
        state[best[1]] = best[2]
