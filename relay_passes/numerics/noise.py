"""Quantisation noise of every candidate range, in decibels, summed over streamed samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OCTAVES = 8  # candidates reach this far below and above the first sample's peak
PER_OCTAVE = 8  # neighbouring ends differ by 9 %; twice as many gain less than 0.1 dB more
LEVELS = (256, 65536)  # sizes of the grids that activations are quantised to
MAX_RATIO = 1e30  # of noise and signal, and of signal and noise
PER_LOGARITHM = 10  # products of that many ratios stay within float64


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
    """Sums the noise of all candidate ranges; memory does not depend on the samples.

    Decibels add where ratios multiply: ratios are multiplied up, and their logarithm, which costs
    ten times as much as all the rest, is taken once for `PER_LOGARITHM` samples.
    """

    def __init__(self) -> None:
        self._ends = np.zeros(0)
        self._steps = np.zeros((len(LEVELS), 0, 0))  # noise of one value by rounding
        self._decibels = np.zeros((len(LEVELS), 0, 0))
        self._product = np.ones((len(LEVELS), 0, 0))  # of the samples not yet in `_decibels`
        self._pending = 0

    def update(self, counts: NDArray[np.int64], centers: NDArray[np.float64], zeros: int) -> None:
        """Take in one sample as a histogram; `zeros` of its values are exactly zero. [bins]

        `centers` ascend; empty bins may be left out.
        """
        used = np.flatnonzero(counts)
        weights, x = counts[used].astype(np.float64), centers[used]
        energy = float(weights @ x**2)
        values = float(weights.sum()) - zeros
        if values == 0:
            return
        if self._ends.size == 0:
            self._start(float(np.abs(x).max()))
        below, above = clipped_energy(weights, x, self._ends) / energy
        noise = self._steps * (values / energy)  # [2, E, E]
        noise += below[:, None] + above[None, :]
        self._product *= np.clip(noise, 1 / MAX_RATIO, MAX_RATIO, out=noise)
        self._pending += 1
        if self._pending == PER_LOGARITHM:
            self._decibels = self._sum()
            self._product.fill(1.0)
            self._pending = 0

    def _start(self, peak: float) -> None:
        octaves = np.arange(-OCTAVES * PER_OCTAVE, OCTAVES * PER_OCTAVE + 1) / PER_OCTAVE
        self._ends = np.concatenate([[0.0], 2.0 ** np.ceil(np.log2(peak)) * 2.0**octaves])
        width = self._ends[:, None] + self._ends[None, :]
        self._steps = np.stack([(width / (levels - 1)) ** 2 / 12 for levels in LEVELS])
        self._decibels = np.zeros_like(self._steps)
        self._product = np.ones_like(self._steps)

    def _sum(self) -> NDArray[np.float64]:
        return self._decibels + 10 * np.log10(self._product)

    def result(self) -> RangeNoise:
        """What was summed so far, as a value."""
        return RangeNoise(self._ends.copy(), self._sum())


def clipped_energy(
    counts: NDArray[np.float64], x: NDArray[np.float64], ends: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Σ counts * (|x| - end)² over x < -end, and over x > end, for each end; `x` ascends. [2, E]"""
    weighted = counts * np.stack([np.ones_like(x), x, x**2])  # [3, bins]
    count = np.searchsorted(x, -ends, side="left"), x.size - np.searchsorted(x, ends, side="right")
    below, above = (
        np.concatenate([np.zeros((3, 1)), np.cumsum(values, axis=1)], axis=1)[:, chosen]
        for values, chosen in zip((weighted, weighted[:, ::-1]), count, strict=True)
    )
    # Σ (|x| - e)² = Σ x² - 2 e Σ |x| + e² Σ 1, where |x| is -x below
    below[1] *= -1
    sums = np.stack([below, above])  # [2, 3, E]
    return np.maximum(sums[:, 2] - 2 * ends * sums[:, 1] + ends**2 * sums[:, 0], 0.0)
