"""From statistics to the range [low, high] that a quantiser covers: one type for each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .affine import INTEGER_RANGES
from .histogram import Histogram
from .statistics import TensorStatistics

Range = tuple[float, float]


@dataclass(frozen=True)
class MinMax:
    """The smallest and largest value seen."""


@dataclass(frozen=True)
class MovingAverage:
    """The moving average of each sample's extremes (Krishnamoorthi 2018, section 3.1.1)."""


@dataclass(frozen=True)
class Percentile:
    """`percent` of all values lie inside; the rest is clipped, half at each end."""

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50.0 < self.percent <= 100.0:
            raise ValueError(f"percentile {self.percent} must be over 50 and at most 100")


@dataclass(frozen=True)
class Entropy:
    """Least Kullback-Leibler divergence between the values and their quantised form.

    Migacz 2017, "8-bit Inference with TensorRT", here with both ends of the range chosen in turn.
    """


@dataclass(frozen=True)
class Mse:
    """Least squared error between all values and their quantised form.

    Banner et al. 2019, "Post-training 4-bit quantization of convolution networks", section 3,
    found on the histogram itself rather than on a fitted distribution.
    """


@dataclass(frozen=True)
class Sqnr:
    """Largest signal-to-noise ratio in decibels, averaged over the samples.

    Noise is what is clipped plus step²/12 for each value inside (Banner et al. 2019, section 3). A
    mean of logarithms: a few loud samples may be clipped where all others gain from a finer step.
    """


RangeMethod = MinMax | MovingAverage | Percentile | Entropy | Mse | Sqnr

CANDIDATES = 64  # ends tried between a quarter of the extreme and the extreme
SWEEPS = 2  # times each end is improved while the other is held


def choose_range(
    statistics: TensorStatistics, method: RangeMethod, dtype: str, symmetric: bool
) -> Range:
    """The range to cover. `dtype` and `symmetric` describe the grid that Entropy and Mse try."""
    extremes = (min(statistics.low, 0.0), max(statistics.high, 0.0))
    if isinstance(method, MinMax) or extremes[0] == extremes[1]:
        return extremes
    if isinstance(method, MovingAverage):
        return (min(statistics.average_low, 0.0), max(statistics.average_high, 0.0))
    if isinstance(method, Percentile):
        return _percentile(statistics.histogram, method.percent, extremes)
    lowest, highest = INTEGER_RANGES[dtype]
    levels = highest - lowest + 1
    if isinstance(method, Sqnr):
        low, high = statistics.noise.best_range(levels, symmetric)
        return (max(low, extremes[0]), min(high, extremes[1]))
    measure = _divergence if isinstance(method, Entropy) else _squared_error
    return _search(statistics.histogram, extremes, levels, symmetric, measure)


def _percentile(histogram: Histogram, percent: float, extremes: Range) -> Range:
    counts, edges = histogram.counts[0], _edges(histogram)
    below = np.cumsum(counts)
    outside = (1.0 - percent / 100.0) * below[-1]
    # A one-sided distribution (after ReLU) has all its outliers at one end.
    ends = 1 if 0.0 in extremes else 2
    low = edges[np.searchsorted(below, outside / ends, side="right")]
    high = edges[np.searchsorted(below, below[-1] - outside / ends, side="left") + 1]
    return (min(max(low, extremes[0]), 0.0), max(min(high, extremes[1]), 0.0))


def _edges(histogram: Histogram) -> NDArray[np.float64]:
    bins = histogram.counts.shape[1]
    return (np.arange(bins + 1) - bins // 2) * histogram.width[0]


Measure = Callable[[NDArray, NDArray, float, float, int], float]


def _search(
    histogram: Histogram, extremes: Range, levels: int, symmetric: bool, measure: Measure
) -> Range:
    """Coordinate descent over the two ends; one shared end for a symmetric grid."""
    used = np.flatnonzero(histogram.counts[0])
    window = slice(used[0], used[-1] + 1)
    x = histogram.centers()[window]
    counts = histogram.counts[0][window]
    if measure is _divergence:
        # Zero is exact on every grid; after ReLU its bin would outweigh all others.
        counts = np.where(np.abs(x) <= histogram.width[0], 0, counts)
    fractions = np.linspace(0.25, 1.0, CANDIDATES)
    low, high = extremes
    if symmetric and low < 0:
        peak = max(-low, high)
        costs = [measure(counts, x, -peak * f, peak * f, levels) for f in fractions]
        best = peak * fractions[_last_minimum(costs)]
        return (max(-best, low), min(best, high))
    for _ in range(SWEEPS):
        costs = [measure(counts, x, low, extremes[1] * f, levels) for f in fractions]
        high = extremes[1] * fractions[_last_minimum(costs)]
        if extremes[0] == 0:
            break
        costs = [measure(counts, x, extremes[0] * f, high, levels) for f in fractions]
        low = extremes[0] * fractions[_last_minimum(costs)]
    return (low, high)


def _last_minimum(costs: list[float]) -> int:
    """Among equal costs the widest range: it clips least."""
    values = np.asarray(costs)
    return int(np.flatnonzero(values == values.min())[-1])


def _squared_error(counts: NDArray, x: NDArray, low: float, high: float, levels: int) -> float:
    """Σ counts * (x - quantised x)², with x the bin centres."""
    step = (high - low) / (levels - 1)
    width = x[1] - x[0] if len(x) > 1 else step
    clipped = np.clip(x, low, high)
    # Bins wider than a step say nothing about where in a step a value lies: step²/12 each.
    inside = step**2 / 12
    if width < step / 2:
        inside = (clipped - np.rint(clipped / step) * step) ** 2
    return float(np.sum(counts * ((x - clipped) ** 2 + inside)))


def _divergence(counts: NDArray, x: NDArray, low: float, high: float, levels: int) -> float:
    """KL(p || q): p the clipped values, q their quantised form spread over the occupied bins."""
    inside = (x >= low) & (x <= high)
    if not inside.any():
        return np.inf
    first, last = np.flatnonzero(inside)[[0, -1]]
    kept = counts[first : last + 1].astype(np.float64)
    p = kept.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last + 1 :].sum()
    step = (high - low) / (levels - 1)
    level = np.rint(x[first : last + 1] / step).astype(np.int64)
    level -= level[0]
    occupied = kept > 0
    mass = np.bincount(level, weights=kept)
    holders = np.bincount(level, weights=occupied)
    q = np.where(occupied, mass[level] / np.maximum(holders[level], 1), 0.0)
    total_p, total_q = p.sum(), q.sum()
    if total_p == 0 or total_q == 0:
        return np.inf
    both = (p > 0) & (q > 0)
    # Clipped values that fall where q has none: counted as if q had a millionth of the mass there.
    q_safe = np.where(q > 0, q / total_q, 1e-6)
    p = p / total_p
    either = p > 0
    return float(np.sum(p[either] * np.log(p[either] / q_safe[either]))) if both.any() else np.inf
