"""A layer that reads channels which may leave: what it loses, and what its weight becomes.

Everything comes from the second moments X·Xᵀ of the layer's input patches (`moments.py`), never
from activations, so memory does not depend on the number of samples. Of y = Σ_c w_cᵀ x_c (x_c: the
patch's entries of channel c) two things are needed: the moments of the channels' contributions
(`contribution_moments`), which LASSO and greedy selection work on, and the least squares for the
rows that stay (`reconstruct_kept`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .second_order import damped, layer_error, reconstruct

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Consumer:
    """One reader of `channels` channels (or of anything that leaves as a whole: heads, groups).

    `weight` float64 [K, N]; `second` X·Xᵀ float64 [K, K], raw or about the mean (`centred`);
    `owner` int [K]: the channel that a row reads, -1 for rows of others, which stay. By default
    rows are [*kernel, channels], as `extract_patches` has them. A grouped convolution is one
    consumer for each group. Raises `ValueError` when shapes disagree.
    """

    weight: Matrix
    second: Matrix
    channels: int
    owner: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        inputs = len(self.weight)
        if self.weight.ndim != 2 or self.second.shape != (inputs, inputs):
            raise ValueError(
                f"a weight {self.weight.shape} with second moments {self.second.shape}; [K, N] and "
                "[K, K] belong together"
            )
        if self.owner is None and inputs % self.channels:
            raise ValueError(f"{inputs} rows are no whole number of {self.channels} channels")
        if self.owner is not None and (
            self.owner.shape != (inputs,) or self.owner.max(initial=-1) >= self.channels
        ):
            raise ValueError(
                f"{inputs} rows need an owner each, below {self.channels}; owner has shape "
                f"{self.owner.shape}"
            )

    @property
    def owners(self) -> NDArray[np.int64]:
        """[K]: the channel of each row, -1 for rows of others."""
        if self.owner is not None:
            return self.owner
        return np.arange(len(self.weight)) % self.channels

    @property
    def energy(self) -> float:
        """Σ y²: what errors are relative to, so that consumers of other scales count alike."""
        energy = layer_error(self.weight, self.second)
        return energy if energy > 0 else 1.0

    def kept_rows(self, kept: Mask) -> Mask:
        """[C] => [K]: rows of channels that stay, and of others."""
        owners = self.owners
        return np.asarray((owners < 0) | kept[owners])


def centred(second: Matrix, mean: Vector, count: int) -> Matrix:
    """X·Xᵀ about the mean: the error that is left when the bias takes up the change of the mean.

    [K, K], [K] => [K, K]; `bias_change` is that bias.
    """
    return second - count * np.outer(mean, mean)


def bias_change(before: Matrix, after: Matrix, mean: Vector) -> Vector:
    """What to add to the bias so that mean outputs stay: [K, N], [K, N], [K] => [N]."""
    return mean @ (before - after)


def contribution_moments(consumers: Sequence[Consumer]) -> Matrix:
    """G [C, C]: G_cd = Σ over patches and outputs of (w_cᵀ x_c)(w_dᵀ x_d), over the energy.

    Errors of several consumers add. 1ᵀ G 1 is 1 for a consumer that reads nothing else;
    removing the channels T costs 1ᵀ G_TT 1 when nothing makes up for them. K²N operations each.
    """
    total = np.zeros((consumers[0].channels,) * 2)
    for consumer in consumers:
        owners = consumer.owners
        rows = np.flatnonzero(owners >= 0)
        moments = consumer.second[np.ix_(rows, rows)] * (
            consumer.weight[rows] @ consumer.weight[rows].T
        )
        membership = np.zeros((len(rows), consumer.channels))
        membership[np.arange(len(rows)), owners[rows]] = 1.0
        total += membership.T @ moments @ membership / consumer.energy
    return total


def reconstruct_kept(consumer: Consumer, kept: Mask, damping: float = 0.01) -> Matrix:
    """The consumer's weight [K, N] without the channels that are not `kept` [C]: their rows are
    zero, all others solved by least squares (He et al. 2017, section 3.1, step ii)."""
    rows = consumer.kept_rows(kept)
    support = np.broadcast_to(rows[:, None], consumer.weight.shape)
    return reconstruct(consumer.weight, damped(consumer.second, damping), support)
