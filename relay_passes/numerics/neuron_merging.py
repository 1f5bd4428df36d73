"""Merging of similar neurons, without data (Srinivas & Babu 2015, "Data-free Parameter Pruning for
Deep Neural Networks", sections 3 and 4).

Two neurons of one layer with nearly the same incoming weights (bias included) compute nearly
the same: i can stand for j when a_i takes a_j on. What that costs is bounded by
s_ij = <a_j²> ‖w_i - w_j‖², a_j the outgoing weights; the cheapest pair is merged again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Merging:
    """`into` int [C]: the neuron that does a neuron's work, itself for those that stay."""

    into: NDArray[np.int64]

    @property
    def kept(self) -> Mask:
        """bool [C]"""
        return np.asarray(self.into == np.arange(len(self.into)))


def merge_similar(incoming: Matrix, outgoing: Sequence[Matrix], keep: int) -> Merging:
    """Merge pairs until `keep` neurons are left.

    `incoming` [K, C]: a neuron's weights and, as a last row, its bias; `outgoing`: of each consumer
    [C, ...], all that reads the neuron. Raises `ValueError` for a `keep` that is no number of
    neurons. C³ operations.
    """
    channels = incoming.shape[1]
    if not 0 < keep <= channels:
        raise ValueError(f"keep is 1 to {channels}, not {keep}")
    distances = _squared_distances(incoming)  # inf: no pair, or one of them is gone
    np.fill_diagonal(distances, np.inf)
    leaving = [part.reshape(channels, -1).astype(np.float64, copy=True) for part in outgoing]
    into = np.arange(channels)
    for _ in range(channels - keep):
        sizes = np.mean(np.concatenate([part**2 for part in leaving], axis=1), axis=1)
        prices = np.full_like(distances, np.inf)
        np.multiply(distances, sizes, out=prices, where=np.isfinite(distances))
        stays, goes = divmod(int(prices.argmin()), channels)
        for part in leaving:
            part[stays] += part[goes]
            part[goes] = 0.0
        distances[goes] = np.inf
        distances[:, goes] = np.inf
        into[into == goes] = stays
    return Merging(into)


def _squared_distances(columns: Matrix) -> Matrix:
    """[K, C] => [C, C], exact for equal columns."""
    rows = columns.T
    return np.stack([np.sum((rows - row) ** 2, axis=1) for row in rows])
