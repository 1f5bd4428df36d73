"""The arithmetic of evidence: signal to noise, intervals of accuracies and of their difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
HUGE = 1e300  # for what has no finite difference; reports are JSON, which has no infinity


class ErrorSums:
    """Streams pairs of tensors and keeps five sums; memory does not depend on how many."""

    def __init__(self) -> None:
        self._signal = 0.0
        self._noise = 0.0
        self._product = 0.0
        self._other = 0.0
        self.max_abs_error = 0.0

    def add(self, original: np.ndarray, compressed: np.ndarray) -> None:
        """Both of the same shape, real values.

        Where both hold the same infinity (an attention mask) or NaN, nothing differs and nothing is
        counted; where only one does, or they differ, the difference is `HUGE`.
        """
        x = original.astype(np.float64).ravel()
        y = compressed.astype(np.float64).ravel()
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.all():
            if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
                self.max_abs_error = HUGE
                self._noise = HUGE
            x, y = x[finite], y[finite]
        difference = x - y
        self._signal += float(x @ x)
        self._other += float(y @ y)
        self._noise += float(difference @ difference)
        self._product += float(x @ y)
        if difference.size:
            self.max_abs_error = max(self.max_abs_error, float(np.abs(difference).max()))

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(sum x^2 / sum (x - y)^2); `None` where there is no noise (or no signal)."""
        if self._noise == 0.0 or self._signal == 0.0:
            return None
        return 10.0 * math.log10(self._signal / self._noise)

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the two; `None` when one is all zero."""
        norms = math.sqrt(self._signal) * math.sqrt(self._other)
        return min(1.0, self._product / norms) if norms > 0.0 else None


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, JASA 22, 1927). `count` > 0."""
    p = successes / count
    z2 = Z_95 * Z_95
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class PairedDifference:
    """How two classifiers differ on the same samples."""

    drop: float  # accuracy of the first minus accuracy of the second
    low: float
    high: float
    p_value: float


def paired_difference(only_first: int, only_second: int, count: int) -> PairedDifference:
    """Difference of two accuracies on the same `count` samples from the discordant counts.

    The 95 % interval adds half a sample to each of the four cells (Agresti and Min, Statistics in
    Medicine 24, 2005); the p-value is McNemar's mid-p test (Fagerland, Lydersen and Laake, BMC
    Medical Research Methodology 13, 2013), which agrees with such intervals.
    """
    b, c, n = only_first + 0.5, only_second + 0.5, count + 2
    centre = (b - c) / n
    half = Z_95 * math.sqrt(max(0.0, (b + c) - (b - c) ** 2 / n)) / n
    return PairedDifference(
        drop=(only_first - only_second) / count,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
        p_value=_mid_p_mcnemar(only_first, only_second),
    )


def _mid_p_mcnemar(first: int, second: int) -> float:
    discordant = first + second
    smaller = min(first, second)
    if first == second:
        return 1.0
    chances = [
        math.exp(
            math.lgamma(discordant + 1)
            - math.lgamma(k + 1)
            - math.lgamma(discordant - k + 1)
            - discordant * math.log(2.0)
        )
        for k in range(smaller + 1)
    ]
    return min(1.0, 2.0 * sum(chances) - chances[-1])
