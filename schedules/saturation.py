"""How many steps may be added in 16 bits: proven from the weights.

Data are known to lie in an interval, [0, 255] for vpmaddubsw of x86, which adds products in pairs
and saturates, and [-128, 127] for smull and smlal of NEON, which wrap. A sum of a chain then lies
between two numbers that the weights give: if both fit int16, neither an instruction saturates nor
an addition wraps, and the result is exact for every input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import PackedLayout
from .spec import WeightedSpec

LONGEST_CHAIN = 8
_LEAST, _LARGEST = -(2**15), 2**15 - 1


def longest_chain(
    spec: WeightedSpec,
    packed: np.ndarray,
    run: int | None = None,
    data: tuple[int, int] = (0, 255),
    added: int = 2,
) -> int:
    """The longest chain for a packed int8 weight [groups, blocks, steps, width, group] that is
    exact, and so is every shorter one; 0: a single step may saturate.

    Chains start anew with every `run` of steps, by default the kernel's innermost loop (`run_of`).
    `added` neighbouring products are one sum already in a step; data lie anywhere in `data`.
    """
    if run is None:
        layout = spec.packed_layout
        assert layout is not None
        run = run_of(spec, layout)
    return _longest(packed, run, data, added)


def _longest(packed: np.ndarray, run: int, data: tuple[int, int], added: int) -> int:
    groups, blocks, steps, width, group = packed.shape
    # The 16-bit sums of every output: [groups, blocks, runs, steps of a run, width, sums]
    missing = -steps % run
    full = np.pad(packed.astype(np.int32), ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
    pairs = full.reshape(groups, blocks, -1, run, width, group // added, added)
    low, high = data
    positive = np.maximum(pairs, 0).sum(axis=-1)
    negative = np.maximum(-pairs, 0).sum(axis=-1)
    largest, least = high * positive - low * negative, high * negative - low * positive
    longest = 0
    for chain in range(1, min(LONGEST_CHAIN, run) + 1):
        # Not implied by a longer chain's proof: theirs start elsewhere.
        starts = np.arange(0, run, chain)
        if (
            np.add.reduceat(largest, starts, axis=3).max() > _LARGEST
            or np.add.reduceat(least, starts, axis=3).max() > -_LEAST
        ):
            break
        longest = chain
    return longest


@dataclass(frozen=True)
class NarrowSums:
    """How a kernel for sparse weights adds products in 16 bits: `added` neighbours at once, data
    that lie anywhere in `data`."""

    data: tuple[int, int]
    added: int

    def fits(self, weights: np.ndarray) -> np.ndarray:
        """Whether products of weights [..., n] with any data may be added, all n of them."""
        low, high = self.data
        positive = np.maximum(weights, 0).sum(axis=-1)
        negative = np.maximum(-weights, 0).sum(axis=-1)
        largest, least = high * positive - low * negative, high * negative - low * positive
        return np.asarray((largest <= _LARGEST) & (least <= -_LEAST))

    def longest_chain(self, values: np.ndarray, starts: np.ndarray) -> int:
        """How many of a block's groups, values [groups, block, group], may be added; each block
        starts a chain. 0: a single group may saturate."""
        counts = np.diff(starts) // values.shape[2]
        steps = int(counts.max())
        packed = np.zeros((1, len(counts), steps, *values.shape[1:]), values.dtype)
        packed[0, np.arange(steps) < counts[:, None]] = values
        return _longest(packed, steps, self.data, self.added)


def run_of(spec: WeightedSpec, layout: PackedLayout) -> int:
    """Steps of the innermost, contiguous loop of the reduction."""
    row, column = layout.pitches(spec.reduction)
    return (row if layout.axis == "R" else column) // layout.group
