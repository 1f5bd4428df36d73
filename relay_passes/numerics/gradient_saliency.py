"""What channels are worth to a labelled loss, from activations a and gradients dL/da.

All of it is sums over samples of one number for each channel, streamed (`GradientObserver`), so
memory does not depend on the number of samples. Higher scores are worth more.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .channel_consumer import Vector
from .statistics import ChannelGradients


class GradientObserver:
    """Sums over samples of what `ChannelGradients` holds, float64 [C] each.

    `axis`: of the channels; `batch`: samples in one run, along the first of the other axes.
    """

    def __init__(self, axis: int, batch: int = 1) -> None:
        self._axis = axis
        self._batch = batch
        self._sums: NDArray[np.float64] | None = None
        self._samples = 0
        self._positions = 1

    def update(
        self,
        activation: NDArray[np.float32],
        gradient: NDArray[np.float32],
        count: int | None = None,
    ) -> None:
        """One run: a and dL/da of one shape, L the sum of its samples' losses; only the first
        `count` samples are real."""
        a, g = (
            np.moveaxis(item.astype(np.float64), self._axis, -1) for item in (activation, gradient)
        )
        shape = (self._batch, -1, a.shape[-1])
        a, g = (item.reshape(shape)[:count] for item in (a, g))  # [S, P, C]
        product = np.einsum("spc,spc->sc", a, g)
        sums = np.stack(
            [
                product.sum(axis=0),
                np.abs(product).sum(axis=0),
                (product**2).sum(axis=0),
                np.einsum("spc,spc->c", g, g),
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums
        self._samples += len(a)
        self._positions = a.shape[1]

    def result(self) -> ChannelGradients:
        """Raises `ValueError` when nothing was observed."""
        if self._sums is None:
            raise ValueError("no values were observed")
        return ChannelGradients(self._axis, self._positions, *(self._sums / self._samples))


def taylor(gradients: ChannelGradients, order: Literal[1, 2] = 1) -> Vector:
    """[C]: what the loss changes by when a channel becomes zero, to first order.

    1: the mean over samples of |mean over positions of a·dL/da| (Molchanov et al. 2017, "Pruning
    Convolutional Neural Networks for Resource Efficient Inference", equation 8). 2: the mean over
    samples of (Σ over positions of a·dL/da)², which is (g·w)² of a gate behind the channel
    (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8).
    """
    return gradients.absolute / gradients.positions if order == 1 else gradients.squared
