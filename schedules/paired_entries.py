"""Entries of a sparse weight in an order in which neighbours may be added in 16 bits.

vpmaddubsw adds two products and saturates; with weights of 8 bits it does not where one of the two
is positive and one negative, or both are small. Which entries are neighbours is free, so each waits
for one that goes with it.
"""

from __future__ import annotations

import numpy as np

from .saturation import NarrowSums

# Entries of a block that wait at once. More would find partners for a few more, and take pairs
# further apart in the data.
_WAITING = 12


def pair_entries(
    values: np.ndarray, positions: np.ndarray, starts: np.ndarray, sums: NarrowSums
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts of `sparse_conv2d.encode` with the entries of every block in pairs that `sums`
    allows, by their first; one without a partner is followed by zeros at its position."""
    counts = np.diff(starts)
    blocks, longest = len(counts), int(counts.max(initial=0))
    exists = np.arange(longest) < counts[:, None]
    weights = np.zeros((blocks, longest, values.shape[1]), np.int32)
    weights[exists] = values
    partner = np.full((blocks, longest), -1)
    rows = np.arange(blocks)
    waiting = np.full((blocks, _WAITING), -1)  # entries, -1: a free place
    for entry in range(longest):
        theirs = weights[rows[:, None], waiting]  # [B, W, n]
        ours = np.broadcast_to(weights[:, entry, None], theirs.shape)
        goes = sums.fits(np.stack([theirs, ours], axis=-1)).all(axis=2) & (waiting >= 0)
        finds = exists[:, entry] & goes.any(axis=1)
        waits = exists[:, entry] & ~finds
        # The one that waits longest leaves with its partner, or gives up its place if none is free.
        place = np.where(finds, np.where(goes, waiting, longest).argmin(axis=1), waiting.argmin(1))
        first = waiting[finds, place[finds]]
        partner[finds, first] = entry
        partner[finds, entry] = first
        waiting[finds, place[finds]] = -1
        waiting[waits, place[waits]] = entry
    is_first = exists & ((partner < 0) | (partner > np.arange(longest)))
    owners, firsts = np.nonzero(is_first)
    seconds = partner[owners, firsts]
    pairs = np.stack([firsts, np.where(seconds < 0, firsts, seconds)], axis=1)
    where = starts[:-1][owners][:, None] + pairs
    paired = values[where]
    paired[seconds < 0, 1] = 0
    ends = np.concatenate([[0], np.cumsum(2 * is_first.sum(axis=1))]).astype(np.int32)
    return paired.reshape(-1, values.shape[1]), positions[where].reshape(-1), ends
