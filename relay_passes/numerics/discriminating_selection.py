"""Channels by what a labelled loss makes of the layers that read them: discrimination-aware channel
selection (Zhuang et al. 2018, "Discrimination-aware Channel Pruning for Deep Neural Networks").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .channel_consumer import Consumer, Mask, Matrix, Vector
from .second_order import damped


def select_discriminating(
    consumers: Sequence[Consumer],
    output_gradients: Sequence[Vector],
    keep: int,
    discrimination: float = 1.0,
) -> Mask:
    """bool [C]: from no channel on, the one joins whose weights the joint loss L_M + λ L_S pulls at
    most, ‖∂(L_M + λ L_S)/∂W_c‖_F, and the weights of those that joined are solved for (section
    3.3, algorithm 2).

    L_M is the consumers' relative squared error. The paper trains classifiers for L_S; here it is
    the network's labelled loss to second order, Σ_n f_n (error of output n), f_n = E[(dL/dy_n)²]
    over its mean (the Fisher information's diagonal: Theis et al. 2018, "Faster gaze prediction
    with dense networks and Fisher pruning", section 3.1). `output_gradients`: f [N] for
    each consumer (`ChannelGradients.gradient_squared`); λ is `discrimination`. K² operations for
    each row that joins. Raises `ValueError` for a `keep` that is no number of channels.
    """
    channels = consumers[0].channels
    if not 0 < keep <= channels:
        raise ValueError(f"keep is 1 to {channels}, not {keep}")
    states = [
        _State(consumer, gradients, discrimination)
        for consumer, gradients in zip(consumers, output_gradients, strict=True)
    ]
    kept = np.zeros(channels, bool)
    for _ in range(keep):
        pulls = np.sum([state.pulls() for state in states], axis=0)
        best = int(np.where(kept, -np.inf, pulls).argmax())
        kept[best] = True
        for state in states:
            state.join(np.flatnonzero(state.owners == best))
    return kept


class _State:
    """A consumer while channels join. `pull` is H (W - Ŵ) [K, N], Ŵ solved for the rows A that have
    joined; `left` is H - H_:A H_AA⁻¹ H_A:, from which the next joins by one elimination."""

    def __init__(self, consumer: Consumer, gradients: Vector, discrimination: float) -> None:
        self.owners = consumer.owners
        self.channels = consumer.channels
        self.left: Matrix = damped(consumer.second)
        self.pull: Matrix = self.left @ consumer.weight
        mean = gradients.mean()
        extra = gradients / mean if mean > 0 else np.zeros(len(gradients))
        self.importance = ((1 + discrimination * extra) / consumer.energy) ** 2
        self.join(np.flatnonzero(self.owners < 0))

    def pulls(self) -> Vector:
        """Squared norm of each channel's gradient. [C]"""
        sizes = self.pull**2 @ self.importance
        mine = self.owners >= 0
        pulls = np.bincount(self.owners[mine], sizes[mine], minlength=self.channels)
        return pulls.astype(np.float64)

    def join(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        across = self.left[rows]  # [p, K]
        solved = np.linalg.solve(across[:, rows], across)
        self.pull -= solved.T @ self.pull[rows]
        self.left -= across.T @ solved
        self.pull[rows] = 0.0
        self.left[rows] = 0.0
        self.left[:, rows] = 0.0
