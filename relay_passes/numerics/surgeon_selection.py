"""Optimal Brain Surgeon for whole channels: the exact rise of the squared error when a channel's
rows leave and all others are solved for anew.

Removing the rows c of W [K, N] with the inverse H⁻¹ of X·Xᵀ costs tr(W_cᵀ [H⁻¹_cc]⁻¹ W_c) and moves
the others by -H⁻¹_:c [H⁻¹_cc]⁻¹ W_c; H⁻¹ loses c by the same elimination (Frantar & Alistarh
2022, "Optimal Brain Compression", section 4, with a channel as the group; Kurtić et al. 2023,
"ZipLM", section 3.1). Several consumers of the same channels add their errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .channel_consumer import Consumer, Mask, Matrix, Vector
from .second_order import damped

_GONE = -2  # owner of a row that has left; -1 is what stays


def select_by_surgeon(consumers: Sequence[Consumer], keep: int, damping: float = 0.01) -> Mask:
    """bool [C]: again and again the channel leaves that costs least at that moment. Raises
    `ValueError` for a `keep` that is no number of channels."""
    return np.isinf(removal_errors(consumers, keep, damping))


def removal_errors(consumers: Sequence[Consumer], keep: int = 1, damping: float = 0.01) -> Vector:
    """[C]: the consumers' squared error, of their outputs' energy, when a channel has left after
    all that cost less; inf for the last `keep`.

    These compare channels of one group with those of another. What a channel costs on its own does
    not: many that can stand for each other cost little until the last of them leaves. K² operations
    for each row that leaves.
    """
    channels = consumers[0].channels
    if not 0 < keep <= channels:
        raise ValueError(f"keep is 1 to {channels}, not {keep}")
    states = [_State(consumer, damping) for consumer in consumers]
    kept, errors, error = np.ones(channels, bool), np.full(channels, np.inf), 0.0
    for _ in range(channels - keep):
        prices = np.sum([state.prices(kept) for state in states], axis=0)
        cheapest = int(np.where(kept, prices, np.inf).argmin())
        error += float(prices[cheapest])
        errors[cheapest], kept[cheapest] = error, False
        for state in states:
            state.remove(cheapest)
    return errors


class _State:
    """A consumer while channels leave: weights so far, inverse of what is left."""

    def __init__(self, consumer: Consumer, damping: float) -> None:
        read = np.diag(consumer.second) > 0  # of inputs that are always 0 weights cost nothing
        self.weight: Matrix = consumer.weight * read[:, None]
        self.inverse = np.asarray(np.linalg.inv(damped(consumer.second, damping)), np.float64)
        self.energy = consumer.energy
        self.owners = consumer.owners
        self.channels = consumer.channels
        self.rows = self._rows()
        self.gone = 0

    def _rows(self) -> list[NDArray[np.int64]]:
        """Where each channel's are."""
        order = np.argsort(self.owners, kind="stable")
        bounds = np.searchsorted(self.owners[order], np.arange(self.channels + 1))
        return [order[start:end] for start, end in pairwise(bounds)]

    def prices(self, kept: Mask) -> Vector:
        """tr(W_cᵀ [H⁻¹_cc]⁻¹ W_c) over the energy; channels with as many rows are solved at
        once. [C], 0 for those that are gone or not read."""
        prices = np.zeros(self.channels)
        counts = np.array([len(rows) for rows in self.rows])
        for count in np.unique(counts[kept & (counts > 0)]):
            channels = np.flatnonzero(kept & (counts == count))
            rows = np.stack([self.rows[channel] for channel in channels])  # [c, p]
            values = self.weight[rows]  # [c, p, N]
            if count == 1:
                inner = self.inverse[rows[:, 0], rows[:, 0]]
                prices[channels] = (values[:, 0] ** 2).sum(axis=1) / inner / self.energy
                continue
            solved = np.linalg.solve(self.inverse[rows[:, :, None], rows[:, None, :]], values)
            prices[channels] = np.einsum("cpn,cpn->c", values, solved) / self.energy
        return prices

    def remove(self, channel: int) -> None:
        rows = self.rows[channel]
        if not len(rows):
            return
        across = self.inverse[rows]  # [p, K]
        solved = np.linalg.solve(across[:, rows], across)
        self.weight -= solved.T @ self.weight[rows]
        self.inverse -= across.T @ solved
        self.owners = self.owners.copy()
        self.owners[rows] = _GONE
        self.gone += len(rows)
        self.rows[channel] = rows[:0]
        if 8 * self.gone >= len(self.owners):  # smaller matrices from here on
            left = np.flatnonzero(self.owners != _GONE)
            self.weight, self.owners = self.weight[left], self.owners[left]
            self.inverse = self.inverse[np.ix_(left, left)]
            self.rows, self.gone = self._rows(), 0
