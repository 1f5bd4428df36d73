"""Channels by the size of what makes them; and who stays, by a score [C] for each channel.

Higher scores are worth more. Scores of several layers that make one group of channels (the ends of
a residual sum) are added after `relative`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]


def filter_norms(weight: Matrix, order: Literal[1, 2]) -> Vector:
    """Σ|w| or √Σw² of each filter: [K, N] => [N] (Li et al. 2017, "Pruning Filters for Efficient
    ConvNets", section 3.1)."""
    return np.asarray(np.linalg.norm(weight, ord=order, axis=0))


def folded_batch_norm_scale(weight: Matrix, second: Matrix, mean: Vector, count: int) -> Vector:
    """|γ| of a batch-norm that was folded into the layer (Liu et al. 2017, "Learning Efficient
    Convolutional Networks through Network Slimming", section 3): the spread of its outputs.

    A batch-norm's outputs have the standard deviation |γ| over the data that it was trained on, and
    folding leaves them as they are. [K, N], X·Xᵀ [K, K], E[x] [K], patches => [N].
    """
    covariance = second / count - np.outer(mean, mean)
    return np.sqrt(np.maximum(np.einsum("kn,kn->n", weight, covariance @ weight), 0.0))


def relative(scores: Vector) -> Vector:
    """Scores over their root mean square, so that layers can be compared or added (Molchanov et
    al. 2017, section 2.2, normalises so)."""
    size = np.sqrt(np.mean(scores**2))
    return scores / size if size > 0 else scores


def keep_best(scores: Vector, keep: int) -> Mask:
    """[C] => bool [C]: the `keep` highest; of equal ones those that come first. Raises
    `ValueError` when that is none or more than there are."""
    if not 0 < keep <= len(scores):
        raise ValueError(f"keep is 1 to {len(scores)}, not {keep}")
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:keep]] = True
    return kept
