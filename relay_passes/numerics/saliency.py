"""What it would cost to remove a weight: scores [K, N] of a matrix w [K, N] with inputs x [K].

Smaller scores go first. `second` is X·Xᵀ [K, K] over all patches, `mean` the mean patch [K],
`count` how many there were (`moments.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def magnitude(weight: Matrix) -> Matrix:
    """w², so that the score of a block is its squared norm (Han et al. 2015, section 3)."""
    return weight**2


def diagonal_hessian(weight: Matrix, second: Matrix) -> Matrix:
    """w² H_kk / 2: the rise of the layer's squared error, other weights fixed and uncorrelated
    (LeCun et al. 1989, "Optimal Brain Damage", section 2.2, with the layer's own error as loss)."""
    return weight**2 * np.diag(second)[:, None] / 2


def activation_aware(weight: Matrix, second: Matrix) -> Matrix:
    """|w| ‖x_k‖, relative to the output's largest: outputs lose alike (Sun et al. 2023, "Wanda",
    section 3)."""
    scores = np.abs(weight) * np.sqrt(np.diag(second))[:, None]
    largest = scores.max(axis=0, initial=0.0)
    return np.asarray(scores / np.where(largest > 0, largest, 1.0))


def output_correlation(weight: Matrix, second: Matrix, mean: Matrix, count: int) -> Matrix:
    """|corr(x_k, y_n)| of a connection's two ends, 0 where the weight is zero (Sun et al. 2016,
    "Sparsifying Neural Network Connections for Face Recognition", section 3.2)."""
    covariance = second / count - np.outer(mean, mean)
    with_output = covariance @ weight  # [K, N]
    variance = np.maximum(np.einsum("kn,kn->n", weight, with_output), 0)
    spread = np.sqrt(np.maximum(np.diag(covariance), 0))[:, None] * np.sqrt(variance)
    scores = np.abs(with_output) / np.where(spread > 0, spread, 1.0)
    return np.where((spread > 0) & (weight != 0), scores, 0.0)
