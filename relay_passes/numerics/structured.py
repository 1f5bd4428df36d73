"""Matrices of few numbers: block-circulant, and diagonals between Hadamard transforms.

A linear layer is y = x·W with W [K, N]; all fits are least squares, of the weight or, with
X·Xᵀ [K, K] of the layer's inputs, of its outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


# --- block-circulant ------------------------------------------------------------------------------


def circulant_matrix(rows: Matrix) -> Matrix:
    """[p, q, b] => [p * b, q * b]: in block (i, j) input k has the weight rows[i, j, (n - k) mod b]
    for output n, so that x·W is a sum of circular convolutions."""
    blocks_in, blocks_out, size = rows.shape
    place = np.arange(size)
    taken = rows[:, :, (place[None, :] - place[:, None]) % size]  # [p, q, k, n]
    return taken.transpose(0, 2, 1, 3).reshape(blocks_in * size, blocks_out * size)


def nearest_circulant(weight: Matrix, size: int, hessian: Matrix | None = None) -> Matrix:
    """The blocks [p, q, size] whose `circulant_matrix` is nearest to `weight` [K, N].

    Ding et al. 2017, "CirCNN", section 3, trains such layers; of a trained weight the nearest is
    the mean over each wrapped diagonal, and in the norm of the layer's outputs (`hessian`, positive
    definite) a system of K unknowns for each block of outputs: with P_n, which picks the weights of
    output n from a block column c, sum over n of P_nᵀ H (w_n - P_n c) = 0. K and N are multiples
    of `size`.
    """
    inputs, outputs = weight.shape
    blocks = weight.reshape(inputs // size, size, outputs // size, size)
    place = np.arange(size)
    shift = (place[None, :] - place[:, None]) % size  # of input k for output n
    if hessian is None:
        rows: Matrix = np.zeros((inputs // size, outputs // size, size))
        for k in range(size):
            rows[:, :, shift[k]] += blocks[:, k] / size
        return np.asarray(rows)
    normal: Matrix = np.zeros((inputs, inputs))
    right: Matrix = np.zeros((inputs, outputs // size))
    product = (hessian @ weight).reshape(blocks.shape)
    for n in range(size):
        # Position of unknown (i, d) among the inputs: k = (n - d) mod size.
        index = (np.arange(0, inputs, size)[:, None] + (n - place) % size).ravel()
        normal += hessian[np.ix_(index, index)]
        right += product[:, (n - place) % size, :, n].transpose(1, 0, 2).reshape(right.shape)
    solved = np.linalg.solve(normal, right)
    return np.asarray(solved.reshape(inputs // size, size, outputs // size).transpose(0, 2, 1))


@dataclass(frozen=True)
class FrequencyFactors:
    """A block-circulant product in the frequency domain; f frequencies are b // 2 + 1.

    With x as [p, b]: X = x·forward; for each frequency (re, im) of X times `weight`; what results,
    (re, im) of X by (Re, Im) of the weight, times `inverse`.
    """

    forward: Matrix
    """[b, 2 f]: real parts, then imaginary parts."""
    weight: Matrix
    """[f, p, 2, q]: real parts, imaginary parts."""
    inverse: Matrix
    """[2, 2, f, b]: first axis the data's part, second the weight's."""


def frequency_factors(rows: Matrix) -> FrequencyFactors:
    """The convolution theorem for blocks [p, q, b], with real numbers only."""
    size = rows.shape[2]
    count = size // 2 + 1
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(count)) / size  # [b, f]
    transformed = np.fft.rfft(rows, axis=2)  # [p, q, f]
    twice = np.full(count, 2.0)
    twice[0] = 1.0
    if size % 2 == 0:
        twice[-1] = 1.0
    real, imaginary = ((twice / size * part(angle)).T for part in (np.cos, np.sin))  # [f, b]
    return FrequencyFactors(
        forward=np.concatenate([np.cos(angle), -np.sin(angle)], axis=1),
        weight=np.stack([transformed.real, transformed.imag]).transpose(3, 1, 0, 2),
        inverse=np.stack([np.stack([real, -imaginary]), np.stack([-imaginary, -real])]),
    )


# --- diagonals between Hadamard transforms --------------------------------------------------------


def hadamard(size: int) -> Matrix:
    """Sylvester's Hadamard matrix of a power of two, its rows orthonormal."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


@dataclass(frozen=True)
class Fastfood:
    """W = first·H·Π·middle·H·last, cut to K x N: 3 n numbers and a permutation (Le, Sarlós, Smola
    2013, section 3; trained as a layer by Yang et al. 2015, "Deep Fried Convnets")."""

    first: Matrix
    """[n], of the inputs."""
    order: NDArray[np.int64]
    """[n]: position i reads order[i]."""
    middle: Matrix
    last: Matrix
    """[n], of the outputs."""

    def matrix(self, inputs: int, outputs: int) -> Matrix:
        """The weight [inputs, outputs]."""
        transform = hadamard(len(self.first))
        left = (self.first[:, None] * transform)[:inputs, self.order]
        right = (self.middle[:, None] * transform * self.last)[:, :outputs]
        return np.asarray(left @ right)


def nearest_fastfood(
    weight: Matrix, seed: int, hessian: Matrix | None = None, rounds: int = 30
) -> Fastfood:
    """Three diagonals for a random permutation, each in turn by least squares.

    A random matrix has K N degrees of freedom and this has 3 n: most of an ordinary layer is lost,
    and what is gained has to be trained.
    """
    inputs, outputs = weight.shape
    size = 1 << (max(inputs, outputs) - 1).bit_length()
    random = np.random.default_rng(seed)
    norm = np.eye(inputs) if hessian is None else hessian
    target = norm @ weight
    transform = hadamard(size)
    order = random.permutation(size)
    first, middle, last = np.ones(size), random.choice([-1.0, 1.0], size), np.ones(size)
    for _ in range(rounds):
        left = (first[:, None] * transform)[:inputs, order]
        whole = (left * middle) @ transform[:, :outputs]
        scale = np.einsum("kn,kn->n", whole, norm @ whole)
        last[:outputs] = np.einsum("kn,kn->n", whole, target) / np.maximum(scale, 1e-300)
        right = (transform * last)[:, :outputs]
        normal = (left.T @ norm @ left) * (right @ right.T)
        middle = _solved(normal, np.einsum("kg,kg->g", left, target @ right.T))
        rest = transform[:, order][:inputs] @ (middle[:, None] * right)
        normal = norm * (rest @ rest.T)
        first[:inputs] = _solved(normal, np.einsum("kn,kn->k", rest, target))
    return Fastfood(first, order, middle, last)


def _solved(normal: Matrix, right: Matrix) -> Matrix:
    """Least squares; directions that nothing depends on stay 0."""
    return np.asarray(np.linalg.lstsq(normal, right, rcond=1e-10)[0])
