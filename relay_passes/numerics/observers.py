"""Streaming observers: `update` with one sample's tensor, `result` for the statistics so far.

Memory depends on the number of bins and channels, never on the number of samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .histogram import BINS, StreamingHistogram
from .noise import StreamingNoise
from .statistics import ChannelStatistics, TensorStatistics

MOMENTUM = 0.01  # weight of the newest sample in the moving average


class TensorObserver:
    """Extremes, moving average of extremes, histogram and noise of candidate ranges."""

    def __init__(self, bins: int = BINS) -> None:
        self._histogram = StreamingHistogram(bins=bins)
        self._noise = StreamingNoise()
        self._low, self._high = np.inf, -np.inf
        self._average = np.zeros(2)
        self._samples = 0

    def update(self, x: NDArray) -> None:
        """Take in one sample's tensor. Raises `ValueError` for NaN or infinity."""
        if x.size == 0:
            return
        low, high = float(x.min()), float(x.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("NaN" if np.isnan(low) or np.isnan(high) else "infinity")
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._average += MOMENTUM * (np.array([low, high]) - self._average)
        self._samples += 1
        sample = self._histogram.update(x.reshape(1, -1))
        zeros = x.size - int(np.count_nonzero(x))
        used = np.flatnonzero(sample.counts[0])
        self._noise.update(sample.counts[0, used], sample.centers(0, used), zeros)

    def result(self) -> TensorStatistics:
        """Statistics of everything seen. Raises `ValueError` when nothing was."""
        if self._samples == 0:
            raise ValueError("no values were observed")
        # It started from zero: divide by the weight that the samples have had (as Adam does).
        average = self._average / (1.0 - (1.0 - MOMENTUM) ** self._samples)
        return TensorStatistics(
            self._low,
            self._high,
            float(average[0]),
            float(average[1]),
            self._histogram.result(),
            self._noise.result(),
        )


class ChannelObserver:
    """Extremes and means of each channel along `axis`."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._low = self._high = self._sum = np.zeros(0)
        self._count = 0

    def update(self, x: NDArray) -> None:
        """Take in one sample's tensor."""
        if x.size == 0:
            return
        others = tuple(index for index in range(x.ndim) if index != self._axis)
        low, high = x.min(axis=others), x.max(axis=others)
        total = x.sum(axis=others, dtype=np.float64)
        if self._count == 0:
            self._low = np.full(low.shape, np.inf)
            self._high = np.full(high.shape, -np.inf)
            self._sum = np.zeros(total.shape)
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        self._sum += total
        self._count += x.size // x.shape[self._axis]

    def result(self) -> ChannelStatistics:
        """Statistics of everything seen. Raises `ValueError` when nothing was."""
        if self._count == 0:
            raise ValueError("no values were observed")
        return ChannelStatistics(self._axis, self._low, self._high, self._sum / self._count)
