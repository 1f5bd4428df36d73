"""Circulant blocks and diagonals between Hadamard transforms, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.structured import (
    circulant_matrix,
    frequency_factors,
    hadamard,
    nearest_circulant,
    nearest_fastfood,
)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_product_in_the_frequency_domain(size: int) -> None:
    rng = np.random.default_rng(size)
    rows, x = rng.normal(size=(4, 3, size)), rng.normal(size=(4, size))
    direct = np.zeros((3, size))
    for i in range(4):
        for j in range(3):
            for n in range(size):
                direct[j, n] += sum(x[i, k] * rows[i, j, (n - k) % size] for k in range(size))
    assert np.allclose(x.ravel() @ circulant_matrix(rows), direct.ravel())
    factors = frequency_factors(rows)
    parts = (x @ factors.forward).reshape(4, 2, -1)  # [p, part, f]
    products = np.einsum("pxf,fpwq->qxwf", parts, factors.weight)
    assert np.allclose(np.einsum("qxwf,xwfb->qb", products, factors.inverse), direct)


@pytest.mark.parametrize("size", [2, 4])
def test_nearest_circulant_is_the_least_squares_solution(size: int) -> None:
    """Against the system of all unknowns, written out."""
    rng = np.random.default_rng(0)
    inputs, outputs = 3 * size, 2 * size
    weight, x = rng.normal(size=(inputs, outputs)), rng.normal(size=(40, inputs))
    x[:, 0] *= 5
    count = inputs * outputs // size
    basis = [
        circulant_matrix(np.eye(count)[n].reshape(inputs // size, outputs // size, size))
        for n in range(count)
    ]
    for data in (np.eye(inputs), x):
        columns = np.stack([(data @ item).ravel() for item in basis], axis=1)
        wanted = np.linalg.lstsq(columns, (data @ weight).ravel(), rcond=None)[0]
        hessian = None if data is not x else x.T @ x
        found = nearest_circulant(weight, size, hessian)
        assert np.allclose(found.ravel(), wanted, atol=1e-9)
    exact = circulant_matrix(found)
    assert np.allclose(nearest_circulant(exact, size), found)


def test_hadamard_transforms() -> None:
    matrix = hadamard(8)
    assert np.allclose(matrix @ matrix, np.eye(8))
    assert np.allclose(np.kron(hadamard(2), hadamard(4)), matrix)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (12, 7), (5, 14)])
def test_fastfood_fits(inputs: int, outputs: int) -> None:
    """Better in each norm than the fit to the other, and never worse with more rounds."""
    rng = np.random.default_rng(1)
    weight, x = rng.normal(size=(inputs, outputs)), rng.normal(size=(200, inputs))
    x[:, ::2] *= 4
    hessian = x.T @ x

    def error(rounds: int, norm: np.ndarray | None) -> float:
        fitted = nearest_fastfood(weight, 0, norm, rounds)
        return float(np.sum((x @ (weight - fitted.matrix(inputs, outputs))) ** 2))

    errors = [error(rounds, hessian) for rounds in (1, 5, 30)]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < error(30, None)
    assert errors[2] < np.sum((x @ weight) ** 2)
