"""Some of a layer's input patches, with the outputs wanted for them: as many for any data."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .statistics import PatchSample


class PatchSampler:
    """Keeps `rows` patches of all that it is shown, each with the same chance.

    Every patch draws a number and the smallest are kept, so that the result depends on the data's
    order and shape alone.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self._rows = rows
        self._random = np.random.default_rng(seed)
        self._drawn = np.empty(0)
        self._inputs: NDArray[np.float32] | None = None
        self._wanted: NDArray[np.float32] | None = None

    def update(
        self, patches: NDArray[np.float32], spatial: int, wanted: NDArray[np.float32] | None
    ) -> None:
        """[groups, N, *positions, *kernel, C], [groups, N, *positions, O]; `spatial` axes."""
        places = patches.shape[1 : 2 + spatial]
        drawn = self._random.random(prod(places))
        full = len(self._drawn) == self._rows
        chosen = np.flatnonzero(drawn < self._drawn.max()) if full else np.arange(len(drawn))
        if len(chosen) > self._rows:
            chosen = chosen[np.argsort(drawn[chosen])[: self._rows]]
        if not len(chosen):
            return
        at: Any = (slice(None), *np.unravel_index(chosen, places))
        inputs = patches[at].reshape(len(patches), len(chosen), -1)
        outputs = None if wanted is None else wanted[at]
        if self._inputs is not None:
            inputs = np.concatenate([self._inputs, inputs], axis=1)
            if outputs is not None and self._wanted is not None:
                outputs = np.concatenate([self._wanted, outputs], axis=1)
        drawn = np.concatenate([self._drawn, drawn[chosen]])
        kept = np.sort(np.argsort(drawn, kind="stable")[: self._rows])
        self._drawn, self._inputs = drawn[kept], inputs[:, kept]
        self._wanted = None if outputs is None else outputs[:, kept]

    def result(self) -> PatchSample:
        """Raises `ValueError` when nothing was observed."""
        if self._inputs is None:
            raise ValueError("no values were observed")
        return PatchSample(self._inputs, self._wanted)
