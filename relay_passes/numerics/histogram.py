"""A streaming histogram with a fixed number of bins, growing its range by merging pairs of bins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 8192  # one-sided data use at least a quarter of them: 8 bins for each of 256 levels


@dataclass(frozen=True, eq=False)
class Histogram:
    """`counts[c, i]` values of channel c lie in [i - bins/2, i + 1 - bins/2) times `width[c]`.

    counts: int64 [C, bins]; width: float64 [C], 0 where a channel has only seen zeros.
    """

    counts: NDArray[np.int64]
    width: NDArray[np.float64]

    def centers(
        self, channel: int = 0, chosen: NDArray[np.intp] | None = None
    ) -> NDArray[np.float64]:
        """The middle of each bin, or of those `chosen`. [bins]"""
        bins = self.counts.shape[1]
        if chosen is None:
            chosen = np.arange(bins)
        return (chosen - bins // 2 + 0.5) * self.width[channel]


class StreamingHistogram:
    """Counts values in bins of equal width around zero; memory does not depend on how many.

    The first values set the width; when a later value falls outside, neighbouring bins are merged
    (the width doubles, the zero stays a bin edge), so that no count is ever lost or guessed.
    """

    def __init__(self, channels: int = 1, bins: int = BINS) -> None:
        if bins < 4 or bins % 4:
            raise ValueError(f"bins {bins} must be a positive multiple of 4")
        self._counts = np.zeros((channels, bins), np.int64)
        self._width = np.zeros(channels, np.float64)

    def update(self, x: NDArray) -> Histogram:
        """Count one sample's values, one row for each channel; returns its counts alone. [C, N]"""
        channels, bins = self._counts.shape
        peak = np.abs(x).max(axis=1).astype(np.float64)  # [C, N] -> [C]
        self._grow(peak)
        half = bins // 2
        width = np.where(self._width > 0, self._width, 1.0)
        index = np.floor(x / width[:, None]).astype(np.int64)  # float64: exact for every float32
        np.clip(index, -half, half - 1, out=index)
        index += half
        if channels > 1:
            index += np.arange(channels)[:, None] * bins
        counts = np.bincount(index.ravel(), minlength=channels * bins).reshape(channels, bins)
        self._counts += counts
        return Histogram(counts, self._width.copy())

    def _grow(self, peak: NDArray[np.float64]) -> None:
        bins = self._counts.shape[1]
        half = bins // 2
        first = (self._width == 0) & (peak > 0)
        # A power of two keeps merging exact; zeros counted before stay just right of the middle.
        with np.errstate(divide="ignore"):
            self._width[first] = 2.0 ** np.ceil(np.log2(peak[first] / (half - 1)))
        while (small := (self._width > 0) & (peak >= self._width * half)).any():
            merged = self._counts[small].reshape(-1, half, 2).sum(axis=2)  # [c, bins] -> [c, half]
            self._counts[small] = 0
            self._counts[small, bins // 4 : bins // 4 + half] = merged
            self._width[small] *= 2

    def result(self) -> Histogram:
        """What was counted so far, as a value."""
        return Histogram(self._counts.copy(), self._width.copy())
