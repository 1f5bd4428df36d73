"""Matrices of Winograd's minimal filtering F(m x m, 3 x 3): m x m outputs of a channel from
(m + 2)**2 products.

    Y = A' [(G g G') * (B' d B)] A        (Lavin & Gray 2016, equation 8; ' is the transpose)

instead of 9 m**2 products. The matrices are Cook and Toom's for the points 0, +-a, +-b ... and
infinity. Points: of those with few operations (pairs of
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
