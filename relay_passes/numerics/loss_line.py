"""What a network's outputs lose when one layer is compressed: measured at some points, else in
proportion to the layer's own error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LossLine:
    """Straight from 0 through the points (error, loss), both ascending; the last line from 0 on
    beyond them."""

    errors: tuple[float, ...]
    losses: tuple[float, ...]

    @staticmethod
    def through(points: Iterable[tuple[float, float]]) -> LossLine:
        """Noise in what was measured does not let a larger error lose less."""
        ordered = sorted(points)
        losses = np.maximum.accumulate([0.0, *(loss for _, loss in ordered)])
        return LossLine((0.0, *(error for error, _ in ordered)), tuple(losses.tolist()))

    def at(self, error: float) -> float:
        """The loss with this error of the layer."""
        last, loss = self.errors[-1], self.losses[-1]
        if error <= last or last <= 0:
            return float(np.interp(error, self.errors, self.losses))
        return loss * error / last
