"""How many steps of vpmaddubsw may be added in 16 bits: proven from the weights.

One instruction multiplies unsigned bytes of data with signed bytes of weights and adds the products
in pairs, saturating at int16. For data anywhere in 0..255 the sum of a chain lies between 255 times
its negative weights and 255 times its positive ones: if both stay within int16, neither an
instruction saturates nor an addition wraps, and the result is exact for every input.
"""

from __future__ import annotations

import numpy as np

from ..layout import PackedLayout
from ..spec import WeightedSpec

LARGEST_DATA = 255
LONGEST_CHAIN = 8
_POSITIVE, _NEGATIVE = 32767 // LARGEST_DATA, 32768 // LARGEST_DATA


def longest_chain(spec: WeightedSpec, packed: np.ndarray, run: int | None = None) -> int:
    """The longest chain for a packed int8 weight [groups, blocks, steps, width, 4] that is exact,
    and so is every shorter one; 0: a single step may saturate.

    Chains start anew with every `run` of steps, by default the kernel's innermost loop (`run_of`).
    """
    layout = spec.packed_layout
    assert layout is not None
    groups, blocks, steps, width, four = packed.shape
    run = run or run_of(spec, layout)
    # The two 16-bit halves of every output: [groups, blocks, runs, steps of a run, width, 2]
    missing = -steps % run
    full = np.pad(packed.astype(np.int32), ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
    pairs = full.reshape(groups, blocks, -1, run, width, four // 2, 2)
    positive = np.maximum(pairs, 0).sum(axis=-1)
    negative = np.maximum(-pairs, 0).sum(axis=-1)
    longest = 0
    for chain in range(1, min(LONGEST_CHAIN, run) + 1):
        # Not implied by a longer chain's proof: theirs start elsewhere.
        starts = np.arange(0, run, chain)
        if (
            np.add.reduceat(positive, starts, axis=3).max() > _POSITIVE
            or np.add.reduceat(negative, starts, axis=3).max() > _NEGATIVE
        ):
            break
        longest = chain
    return longest


def run_of(spec: WeightedSpec, layout: PackedLayout) -> int:
    """Steps of the innermost, contiguous loop of the reduction."""
    row, column = layout.pitches(spec.reduction)
    return (row if layout.axis == "R" else column) // layout.group
