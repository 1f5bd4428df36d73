"""A weight as a product of smaller ones and a sparse rest: w ~ l + s."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .second_order import layer_error, reconstruct
from .sparsity_pattern import Mask, SparsityPattern

Array = NDArray[np.float64]
Parts = TypeVar("Parts")

_SWEEPS = 16


def split_with_residual(
    weight: Array,
    fit: Callable[[Array], tuple[Parts, Array]],
    pattern: SparsityPattern,
    sparsity: float,
    hessian: Array | None = None,
) -> tuple[Parts, Array]:
    """(parts of l, s), s [K, N] with a share `sparsity` of zeros in `pattern`.

    `fit` gives the parts that are nearest to a weight, and their product. Zhou & Tao 2011, "GoDec",
    section 2: l is fitted to w - s and s is what matters most of w - l, in turns. With `hessian`,
    X·Xᵀ, both are nearest to the outputs: an entry of w - l matters by its square times that of its
    input, and those that stay are solved for together. The places of s settle in the first half of
    the sweeps; from there on the error only falls.
    """
    metric = np.eye(len(weight)) if hessian is None else hessian
    rest = np.zeros_like(weight)
    kept: Mask | None = None
    best: tuple[float, Parts, Array] | None = None
    for sweep in range(_SWEEPS):
        parts, low = fit(weight - rest)
        change = weight - low
        if kept is None or sweep < _SWEEPS // 2:
            kept = pattern.choose(change**2 * np.diag(metric)[:, None], sparsity)
        rest = change * kept if hessian is None else reconstruct(change, hessian, kept)
        error = layer_error(change - rest, metric)
        if best is None or error < best[0]:
            best = error, parts, rest
    assert best is not None
    return best[1], best[2]
