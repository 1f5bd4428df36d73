"""Greedy channel selection (Luo, Wu, Lin 2017, "ThiNet", section 3.2).

The channels T that leave are those whose sum is nearest to nothing: min Σ (Σ_{c∈T} x̂_c)² over all
patches and outputs, x̂_c = w_cᵀ x_c, one channel after the other (algorithm 1). In the paper the
kept ones make up for it by a scale each (equation 7); least squares for all their weights
(`channel_consumer.reconstruct_kept`) are never worse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .channel_consumer import Consumer, Mask, Matrix, contribution_moments


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
