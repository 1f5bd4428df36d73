"""Channels by what a labelled loss makes of the outputs that read them.

Zhuang et al. 2018, "Discrimination-aware Channel Pruning for Deep Neural Networks" (DCP), and the
Fisher information of outputs, which makes any other criterion look at the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .channel_consumer import Consumer, Mask, Matrix, Vector
from .second_order import damped


def select_discriminating(
    consumer: Consumer,
    weight_gradient: Matrix,
    count: int,
    keep: int,
    discrimination: float = 1.0,
) -> Mask:
    """bool [C]: discrimination-aware channel selection (Zhuang et al. 2018, section 3.3, algorithm
    2): from no channel on, the one joins whose weights the joint loss pulls at most,
    ‖∂(L_M + λ L_S)/∂W_c‖_F, and the weights of those that joined are solved for.

    `weight_gradient` [K, N]: dL_S/dW averaged over samples, held as it is at the trained
    weights; L_M = error / (2 `count`), `count` patches. Raises `ValueError` for a `keep` that is no
    number of channels.
    """
    if not 0 < keep <= consumer.channels:
        raise ValueError(f"keep is 1 to {consumer.channels}, not {keep}")
    hessian = damped(consumer.second)
    wanted = hessian @ consumer.weight
    kept = np.zeros(consumer.channels, bool)
    current = np.zeros(consumer.weight.shape)
    owners = consumer.owners
    readable = owners >= 0
    for _ in range(keep):
        pull = (hessian @ current - wanted) / count + discrimination * weight_gradient
        sizes = np.bincount(
            owners[readable], (pull[readable] ** 2).sum(axis=1), minlength=consumer.channels
        )
        kept[int(np.where(kept, -np.inf, sizes).argmax())] = True
        rows = np.flatnonzero(consumer.kept_rows(kept))
        current = np.zeros(consumer.weight.shape)
        current[rows] = np.linalg.solve(hessian[np.ix_(rows, rows)], wanted[rows])
    return kept


def weigh_outputs(consumers: Sequence[Consumer], gradients: Sequence[Vector]) -> list[Consumer]:
    """Consumers whose errors count by what the loss makes of them: output n by E[(dL/dy_n)²].

    For any selector above: the loss rises by half of it to second order, with the Fisher
    information's diagonal for the outputs and X·Xᵀ for the inputs (Theis et al. 2018, "Faster gaze
    prediction with dense networks and Fisher pruning", section 3.1). `gradients`: [N] for each
    consumer (`ChannelGradients.gradient_squared`). All-zero gradients change nothing.
    """
    weighed = []
    for consumer, squares in zip(consumers, gradients, strict=True):
        size = np.sqrt(squares) if squares.any() else np.ones(len(squares))
        weighed.append(
            Consumer(consumer.weight * size, consumer.second, consumer.channels, consumer.owner)
        )
    return weighed
