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
    """Extremes, moving average of extremes and histogram; with `channel_axis` also per channel."""

    def __init__(self, channel_axis: int | None = None, bins: int = BINS) -> None:
        self._channel_axis = channel_axis
        self._histogram = StreamingHistogram(bins=bins)
        self._noise = StreamingNoise()
        self._low, self._high = np.inf, -np.inf
        self._average = np.zeros(2)
        self._samples = 0
        self._channels: _ChannelSums | None = None

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
        self._noise.update(sample.counts[0], sample.centers(), zeros)
        if self._channel_axis is not None:
            rows = np.moveaxis(x, self._channel_axis, 0).reshape(x.shape[self._channel_axis], -1)
            if self._channels is None:
                self._channels = _ChannelSums(rows.shape[0])
            self._channels.update(rows)

    def result(self) -> TensorStatistics:
        """Statistics of everything seen. Raises `ValueError` when nothing was."""
        if self._samples == 0:
            raise ValueError("no values were observed")
        # It started from zero: divide by the weight that the samples have had (as Adam does).
        average = self._average / (1.0 - (1.0 - MOMENTUM) ** self._samples)
        channels = None
        if self._channels is not None and self._channel_axis is not None:
            channels = self._channels.result(self._channel_axis)
        return TensorStatistics(
            self._low,
            self._high,
            float(average[0]),
            float(average[1]),
            self._histogram.result(),
            self._noise.result(),
            channels,
        )


class _ChannelSums:
    def __init__(self, channels: int) -> None:
        self._low = np.full(channels, np.inf)
        self._high = np.full(channels, -np.inf)
        self._sum = np.zeros(channels)
        self._count = 0

    def update(self, rows: NDArray) -> None:
        """[C, N]"""
        self._low = np.minimum(self._low, rows.min(axis=1))
        self._high = np.maximum(self._high, rows.max(axis=1))
        self._sum += rows.sum(axis=1, dtype=np.float64)
        self._count += rows.shape[1]

    def result(self, axis: int) -> ChannelStatistics:
        return ChannelStatistics(axis, self._low, self._high, self._sum / self._count)
