"""Channel selection by LASSO (He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep
Neural Networks", section 3.1).

min over β of ‖Y - Σ_c β_c X_c W_c‖² / 2 + λ‖β‖₁ decides which channels stay; it is the quadratic
βᵀGβ / 2 - βᵀG1 + λ‖β‖₁ with the channels' contribution moments G. λ rises from 0 until few enough
are left, as the paper does it; least squares (`reconstruct_kept`) follows once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .channel_consumer import Consumer, Mask, Matrix, Vector, contribution_moments
from .channel_norms import keep_best

# Steps of λ from one ten-thousandth of the value that removes everything.
_PATH_START = 1e-4
_PATH_STEP = 1.5
_BISECTIONS = 40
_MAX_SWEEPS = 2000
_TOLERANCE = 1e-10


def select_by_lasso(consumers: Sequence[Consumer], keep: int) -> Mask:
    """bool [C]: the `keep` channels that the LASSO leaves. Raises `ValueError` for a `keep` that
    is no number of channels."""
    return keep_by_lasso(contribution_moments(consumers), keep)


def keep_by_lasso(moments: Matrix, keep: int) -> Mask:
    """G [C, C] => bool [C]. Where no λ leaves exactly `keep`, the largest β·√G_cc of the next
    larger set stay."""
    target = moments.sum(axis=1)
    highest = float(np.abs(target).max())
    scales = np.ones(len(moments))
    enough, low, high = scales, 0.0, highest * _PATH_START
    while high < highest * _PATH_STEP:
        scales = lasso(moments, target, high, enough)
        if np.count_nonzero(scales) < keep:
            break
        enough, low = scales, high
        high *= _PATH_STEP
    for _ in range(_BISECTIONS):
        if np.count_nonzero(enough) == keep:
            break
        middle = (low + high) / 2
        scales = lasso(moments, target, middle, enough)
        if np.count_nonzero(scales) >= keep:
            enough, low = scales, middle
        else:
            high = middle
    return keep_best(np.abs(enough) * np.sqrt(np.diag(moments)), keep)


def lasso(moments: Matrix, target: Vector, penalty: float, start: Vector) -> Vector:
    """argmin βᵀGβ / 2 - βᵀ`target` + `penalty`·‖β‖₁ by coordinate descent from `start`. [C].

    Channels that contribute nothing get 0. Sweeps over those that are not zero, and over all of
    them when these have settled.
    """
    diagonal = np.diag(moments).copy()
    live = np.flatnonzero(diagonal > _TOLERANCE * diagonal.max(initial=0.0))
    scales = np.zeros(len(moments))
    scales[live] = start[live]
    left = target - moments @ scales
    tolerance = _TOLERANCE * max(float(np.abs(target).max()), np.finfo(float).tiny)
    for _ in range(_MAX_SWEEPS):
        moved = _sweep(moments, diagonal, scales, left, live, penalty)
        if moved <= tolerance:
            break
        active = live[scales[live] != 0]
        for _ in range(_MAX_SWEEPS):
            if _sweep(moments, diagonal, scales, left, active, penalty) <= tolerance:
                break
    return scales


def _sweep(
    moments: Matrix,
    diagonal: Vector,
    scales: Vector,
    left: Vector,
    channels: NDArray[np.int64],
    penalty: float,
) -> float:
    """One update of each channel, in place; the largest change of a gradient."""
    largest = 0.0
    for c in channels:
        pull = left[c] + diagonal[c] * scales[c]
        wanted = np.sign(pull) * max(abs(pull) - penalty, 0.0) / diagonal[c]
        change = wanted - scales[c]
        if change:
            scales[c] = wanted
            left -= change * moments[c]
            largest = max(largest, abs(change) * diagonal[c])
    return largest
