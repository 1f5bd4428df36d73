"""Winograd's minimal filtering F(m x m, 3 x 3): m x m outputs from (m + 2)**2 products a channel.

    Y = A' [(G g G') * (B' d B)] A        (Lavin & Gray 2016, equation 8; ' is the transpose)

instead of 9 m**2 products. The matrices are Cook and Toom's for the points 0, +-a, +-b ... and
infinity; G is applied to the weight at compile time. Points: of those with few operations (pairs of
opposite sign share half of theirs) the ones of least error, which are close to 1 and whose squares
multiply to 1 (Barabasz et al. 2018 search a wider set).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

KERNEL = 3
# Outputs a side => magnitudes of the pairs of points.
POINTS = {2: (1.0,), 4: (math.sqrt(0.5), math.sqrt(2.0))}


def side(outputs: int) -> int:
    """Inputs, and products, along one side of a tile."""
    return outputs + KERNEL - 1


@lru_cache(maxsize=8)
def points(outputs: int) -> tuple[float, ...]:
    """The finite points: 0, then pairs of opposite sign; infinity comes last."""
    return (0.0, *(value for p in POINTS[outputs] for value in (p, -p)))


def output_matrix(outputs: int) -> np.ndarray:
    """A': [m, m + 2]."""
    infinity = np.eye(outputs)[:, -1:]
    return np.hstack([np.vander(points(outputs), outputs, increasing=True).T, infinity])


def weight_matrix(outputs: int) -> np.ndarray:
    """G: [m + 2, 3]."""
    finite = points(outputs)
    norms = [math.prod(p - q for q in finite if q != p) for p in finite]
    rows = np.vander(finite, KERNEL, increasing=True) / np.array(norms)[:, None]
    return np.vstack([rows, np.eye(KERNEL)[-1:]])


def data_matrix(outputs: int) -> np.ndarray:
    """B': [m + 2, m + 2]; row p holds the polynomial of all other finite points."""
    finite = points(outputs)
    rows = np.zeros((side(outputs), side(outputs)))
    for index in range(len(finite)):
        others = finite[:index] + finite[index + 1 :]
        rows[index, : len(finite)] = np.poly(others)[::-1]
    rows[-1] = np.poly(finite)[::-1]
    rows[np.abs(rows) < 1e-12] = 0
    return rows


def transform_weight(outputs: int, weight: np.ndarray) -> np.ndarray:
    """[9, ...] => [(m + 2)**2, ...], computed in float64."""
    g = weight_matrix(outputs)
    taps = weight.astype(np.float64).reshape(KERNEL, KERNEL, -1)
    transformed = np.einsum("ay,bx,yxn->abn", g, g, taps)
    return transformed.reshape(side(outputs) ** 2, *weight.shape[1:])


def restoring(outputs: int, tap: int) -> tuple[tuple[int, float], ...]:
    """The weight's tap 0, 1 or 2 along one side as a sum of (place in the transform, factor).

    The points 0 and infinity hold the outer taps; the difference at the first pair holds the middle
    one.
    """
    g = weight_matrix(outputs)
    if tap == 0:
        return ((0, 1 / g[0, 0]),)
    if tap == KERNEL - 1:
        return ((side(outputs) - 1, 1.0),)
    return ((1, 0.5 / g[1, 1]), (2, 0.5 / g[2, 1]))


def restore_weight(outputs: int, transformed: np.ndarray) -> np.ndarray:
    """Inverse of `transform_weight`, in float64."""
    n = side(outputs)
    restore = np.zeros((KERNEL, n))
    for tap in range(KERNEL):
        for place, factor in restoring(outputs, tap):
            restore[tap, place] = factor
    square = transformed.astype(np.float64).reshape(n, n, -1)
    weight = np.einsum("ya,xb,abn->yxn", restore, restore, square)
    return weight.reshape(KERNEL**2, *transformed.shape[1:])
