"""Greedy channel selection (Luo, Wu, Lin 2017, "ThiNet", section 3.2).

The channels T that leave are those whose sum is nearest to nothing: min Σ (Σ_{c∈T} x̂_c)² over all
patches and outputs, x̂_c = w_cᵀ x_c, one channel after the other (algorithm 1). The kept ones make
up for it by one scale each (equation 7, `kept_scales`), or by full least squares
(`channel_consumer.reconstruct_kept`), which is never worse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .channel_consumer import Consumer, Mask, Matrix, Vector, contribution_moments


def select_greedily(consumers: Sequence[Consumer], keep: int) -> Mask:
    """bool [C]: the `keep` channels that stay. Raises `ValueError` for a `keep` that is no number
    of channels."""
    return keep_greedily(contribution_moments(consumers), keep)


def keep_greedily(moments: Matrix, keep: int) -> Mask:
    """Contribution moments G [C, C] => bool [C], in C² operations.

    Another channel c in T adds G_cc + 2 Σ_{d∈T} G_cd.
    """
    if not 0 < keep <= len(moments):
        raise ValueError(f"keep is 1 to {len(moments)}, not {keep}")
    kept = np.ones(len(moments), bool)
    rise = np.diag(moments).copy()
    for _ in range(len(moments) - keep):
        worst = int(np.where(kept, rise, np.inf).argmin())
        kept[worst] = False
        rise += 2 * moments[worst]
    return kept


def kept_scales(moments: Matrix, kept: Mask) -> Vector:
    """argmin over β of Σ (Σ_c x̂_c - Σ_{c∈S} β_c x̂_c)²: G_SS β_S = (G 1)_S; 0 outside S. [C]."""
    scales = np.zeros(len(moments))
    inner = moments[np.ix_(kept, kept)]
    scales[kept] = np.linalg.lstsq(inner, moments.sum(axis=1)[kept], rcond=None)[0]
    return scales
