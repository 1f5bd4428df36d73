"""The problem that a layer's new weights solve: outputs as near as can be to those wanted.

min over ŵ, b of Σ (y - ŵᵀx - b)² over all input patches x, where y is what the layer should give.
With the inputs of the model as it was, y = wᵀx. Behind layers that changed the inputs are others,
and y is what the layer gave before (He et al. 2017, "Channel Pruning for Accelerating Very Deep
Neural Networks", section 3.2). The bias is free, so that means drop out of the problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .second_order import damped

Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """Σ (y - ŵᵀx - b)² = (ŵ - `best`)ᵀ `hessian` (ŵ - `best`) + a constant, for each output."""

    hessian: Matrix
    """[K, K], with a ridge towards the weights as they were."""
    best: Matrix
    """[K, N], the solution without zeros."""
    mean: Matrix | None
    """Of the inputs, [K]; `None` where the bias is not free."""
    output_mean: Matrix | None

    @staticmethod
    def make(
        weight: Matrix,
        second: Matrix,
        mean: Matrix | None,
        count: int,
        wanted: Matrix | None = None,
        wanted_mean: Matrix | None = None,
    ) -> LeastSquares:
        """Of weights [K, N], Σ x xᵀ [K, K] over `count` patches with this `mean` [K] (`None`: the
        bias stays as it is), and of Σ x yᵀ [K, N] and the mean of y [N] where y is not wᵀx."""
        centred = second if mean is None else second - count * np.outer(mean, mean)
        hessian = damped(centred)
        best, output_mean = weight, None if mean is None else mean @ weight
        if wanted is not None:
            if mean is not None and wanted_mean is not None:
                wanted = wanted - count * np.outer(mean, wanted_mean)
                output_mean = wanted_mean
            best = weight + np.linalg.solve(hessian, wanted - centred @ weight)
        return LeastSquares(hessian, best, mean, output_mean)

    def bias_shift(self, weight: Matrix) -> Matrix | None:
        """How much too high the mean of each output is with a new `weight` [K, N]. [N]"""
        if self.mean is None or self.output_mean is None:
            return None
        return np.asarray(self.mean @ weight - self.output_mean)
