"""Quantisation noise of every candidate range, in decibels, summed over streamed samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OCTAVES = 8  # candidates reach this far below and above the first sample's peak
PER_OCTAVE = 8  # neighbouring ends differ by 9 %; twice as many gain less than 0.1 dB more
LEVELS = (256, 65536)  # sizes of the grids that activations are quantised to


@dataclass(frozen=True, eq=False)
class RangeNoise:
    """`decibels[g, i, j]`: noise relative to the signal for the range [-ends[i], ends[j]].

    Summed over samples, for a grid of `LEVELS[g]` levels: float64 [2, E, E]. `ends` is float64 [E]
    and starts with 0, for one-sided tensors; empty while only zeros were seen.
    """

    ends: NDArray[np.float64]
    decibels: NDArray[np.float64]

    def best_range(self, levels: int, symmetric: bool) -> tuple[float, float]:
        """The range with the least noise. Raises `ValueError` when nothing was observed."""
        if self.ends.size == 0:
            raise ValueError("no values were observed")
        costs = self.decibels[LEVELS.index(levels)]
        if symmetric and not self._is_one_sided():
            best = int(np.argmin(np.diagonal(costs)))
            return (0.0 - float(self.ends[best]), float(self.ends[best]))
        low, high = np.unravel_index(int(np.argmin(costs)), costs.shape)
        return (0.0 - float(self.ends[low]), float(self.ends[high]))

    def _is_one_sided(self) -> bool:
        """Whether leaving out one side altogether costs nothing: it has no values."""
        costs = self.decibels[0]
        return bool(costs[0].min() <= costs.min() or costs[:, 0].min() <= costs.min())


class StreamingNoise:
    """Sums the noise of all candidate ranges; memory does not depend on the samples."""

    def __init__(self) -> None:
        self._ends = np.zeros(0)
        self._decibels = np.zeros((len(LEVELS), 0, 0))

    def update(self, counts: NDArray[np.int64], centers: NDArray[np.float64], zeros: int) -> None:
        """Take in one sample as a histogram; `zeros` of its values are exactly zero. [bins]"""
        used = np.flatnonzero(counts)
        weights, x = counts[used].astype(np.float64), centers[used]
        energy = float(weights @ x**2)
        values = weights.sum() - zeros
        if values == 0:
            return
        if self._ends.size == 0:
            peak = 2.0 ** np.ceil(np.log2(np.abs(x).max()))
            octaves = np.arange(-OCTAVES * PER_OCTAVE, OCTAVES * PER_OCTAVE + 1) / PER_OCTAVE
            self._ends = np.concatenate([[0.0], peak * 2.0**octaves])
            self._decibels = np.zeros((len(LEVELS), self._ends.size, self._ends.size))
        below = clipped_energy(weights[::-1], -x[::-1], self._ends)
        above = clipped_energy(weights, x, self._ends)
        clipped = below[:, None] + above[None, :]  # [E, E]
        width = self._ends[:, None] + self._ends[None, :]
        for index, levels in enumerate(LEVELS):
            noise = clipped + values * (width / (levels - 1)) ** 2 / 12
            self._decibels[index] += 10 * np.log10(np.maximum(noise / energy, 1e-30))

    def result(self) -> RangeNoise:
        """What was summed so far, as a value."""
        return RangeNoise(self._ends.copy(), self._decibels.copy())


def clipped_energy(
    counts: NDArray[np.float64], x: NDArray[np.float64], ends: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Σ counts * (x - end)² over x > end, for each end; `x` ascending. [E]"""
    # Suffix sums of 1, x and x²: Σ (x - e)² = Σ x² - 2 e Σ x + e² Σ 1
    start = np.searchsorted(x, ends, side="right")
    sums = [
        np.concatenate([np.cumsum((counts * x**power)[::-1])[::-1], [0.0]])[start]
        for power in range(3)
    ]
    return np.maximum(sums[2] - 2 * ends * sums[1] + ends**2 * sums[0], 0.0)
