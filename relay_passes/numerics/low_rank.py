"""Weights as products of smaller ones. Matrices are [K, N], K summed, N outputs; kernels
[H, W, I, O].

Plain forms are nearest to the weight; data-aware ones to the layer's outputs on its calibration
patches, ‖Xᵀ(w - ŵ)‖², with `hessian` = X·Xᵀ [K, K] (`second_order.damped`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Sweeps of alternating least squares, and the relative gain below which they stop.
_SWEEPS = 60
_LEAST_GAIN = 1e-6


def split_matrix(weight: Array, rank: int, hessian: Array | None = None) -> tuple[Array, Array]:
    """w => u v, [K, N] => [K, r], [r, N]: the best product of that rank (Eckart-Young).

    With `hessian` the best for the layer's outputs: with H = L Lᵀ the error is ‖Lᵀ(w - u v)‖², so
    the singular vectors are those of Lᵀw. `u` then has orthonormal outputs on the data.
    """
    if hessian is None:
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        u = left[:, :rank] * np.sqrt(values[:rank])
        return u, np.sqrt(values[:rank])[:, None] * right[:rank]
    lower = np.linalg.cholesky(hessian)
    left, values, right = np.linalg.svd(lower.T @ weight, full_matrices=False)
    # Lᵀ u v = left values right; the middle tensor's channels get even ranges.
    scale = np.sqrt(values[:rank])
    u = np.linalg.solve(lower.T, left[:, :rank] * scale)
    return u, scale[:, None] * right[:rank]


def energies(weight: Array, hessian: Array | None = None) -> Array:
    """Share of the squared norm (of the outputs', with `hessian`) that ranks 1, 2, ... hold:
    ascending to 1."""
    seen = weight if hessian is None else np.linalg.cholesky(hessian).T @ weight
    squares = np.linalg.svd(seen, compute_uv=False) ** 2
    total = squares.sum()
    return np.cumsum(squares) / total if total > 0 else np.ones(len(squares))


def rank_for_energy(weight: Array, energy: float, hessian: Array | None = None) -> int:
    """The smallest rank that holds a share `energy` (0 to 1)."""
    held = energies(weight, hessian)
    return min(int(np.searchsorted(held, energy - 1e-12)) + 1, len(held))


def split_rows_and_columns(
    kernel: Array, rank: int, hessian: Array | None = None
) -> tuple[Array, Array]:
    """conv(x, w) => conv(conv(x, u), v), u [H, 1, I, r], v [1, W, r, O] (Jaderberg et al. 2014,
    section 2.2, scheme 2).

    Plain: the SVD of w as [(H, I), (W, O)]. With `hessian` (order [H, W, I]) factors are refined in
    turns for the error of the outputs: with one of them fixed that is linear least squares.
    """
    rows, columns, inputs, outputs = kernel.shape
    matrix = kernel.transpose(0, 2, 1, 3).reshape(rows * inputs, columns * outputs)
    u, v = split_matrix(matrix, rank)
    if hessian is not None:
        u, v = _refine_rows_and_columns(kernel, u, v, hessian)
    return (
        u.reshape(rows, 1, inputs, rank),
        v.reshape(rank, columns, outputs).transpose(1, 0, 2)[None],
    )


def _refine_rows_and_columns(
    kernel: Array, u: Array, v: Array, hessian: Array
) -> tuple[Array, Array]:
    """u [H I, r], v [r, W O] in turns; every step is the exact minimum for the other one fixed."""
    rows, columns, inputs, outputs = kernel.shape
    rank = u.shape[1]
    flat = kernel.reshape(-1, outputs)
    blocks = hessian.reshape(rows, columns, inputs, rows, columns, inputs)
    pulled = (hessian @ flat).reshape(rows, columns, inputs, outputs)
    total = float(np.einsum("ko,ko->", flat, hessian @ flat))
    before = np.inf
    for _ in range(_SWEEPS):
        down = u.reshape(rows, inputs, rank)
        # v: outputs have the same normal matrix [(W, r), (W, r)].
        normal = np.einsum("hir,hwigxj,gjs->wrxs", down, blocks, down, optimize=True)
        aim = np.einsum("hir,hwio->wro", down, pulled, optimize=True)
        solved = _solve(normal.reshape(columns * rank, -1), aim.reshape(columns * rank, outputs))
        across = solved.reshape(columns, rank, outputs)
        error = total - float((solved * aim.reshape(solved.shape)).sum())
        if before - error <= _LEAST_GAIN * total:
            break
        before = error
        # u: unknowns [(H, I, r)], since all outputs share it.
        mixed = np.einsum("wro,xso->wrxs", across, across, optimize=True)
        normal = np.einsum("hwigxj,wrxs->hirgjs", blocks, mixed, optimize=True)
        aim = np.einsum("hwio,wro->hir", pulled, across, optimize=True)
        size = rows * inputs * rank
        u = _solve(normal.reshape(size, size), aim.reshape(size, 1)).reshape(-1, rank)
    v = across.transpose(1, 0, 2).reshape(rank, -1)
    # The middle tensor's channels get even ranges, as in the plain form.
    even = np.sqrt(np.linalg.norm(u, axis=0) / np.maximum(np.linalg.norm(v, axis=1), 1e-30))
    even[even == 0] = 1.0
    return u / even, v * even[:, None]


def _solve(normal: Array, aim: Array) -> Array:
    """Least squares by normal equations, which a tiny ridge keeps solvable."""
    ridge = 1e-10 * np.trace(normal) / len(normal)
    return np.asarray(np.linalg.solve(normal + np.eye(len(normal)) * max(ridge, 1e-30), aim))


@dataclass(frozen=True)
class Tucker2:
    """w[h, w, i, o] ~ Σ first[i, a] core[h, w, a, b] last[b, o]."""

    first: Array
    core: Array
    last: Array

    def decode(self) -> Array:
        """The kernel [H, W, I, O]."""
        return np.einsum("ia,hwab,bo->hwio", self.first, self.core, self.last, optimize=True)


def tucker2(kernel: Array, rank_in: int, rank_out: int) -> Tucker2:
    """conv(x, w) => conv1x1(conv(conv1x1(x, first), core), last) (Kim et al. 2016, section 3.1), by
    higher-order orthogonal iteration."""
    last = _leading(kernel.reshape(-1, kernel.shape[3]).T, rank_out)
    before = 0.0
    for _ in range(_SWEEPS):
        by_input = np.einsum("hwio,ob->ihwb", kernel, last).reshape(kernel.shape[2], -1)
        first = _leading(by_input, rank_in)
        by_output = np.einsum("hwio,ia->ohwa", kernel, first).reshape(kernel.shape[3], -1)
        last = _leading(by_output, rank_out)
        core = np.einsum("hwio,ia,ob->hwab", kernel, first, last, optimize=True)
        held = float((core**2).sum())
        if held - before <= _LEAST_GAIN * held:
            break
        before = held
    return Tucker2(first, core, last.T)


def _leading(matrix: Array, rank: int) -> Array:
    """The leading left singular vectors, [rows, rank]."""
    # From the smaller Gram matrix: an unfolded kernel is wide.
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    return np.ascontiguousarray(vectors[:, np.argsort(-values)[:rank]])


@dataclass(frozen=True)
class CanonicalPolyadic:
    """w[h, w, i, o] ~ Σ_r first[i, r] rows[h, r] columns[w, r] last[r, o]."""

    first: Array
    rows: Array
    columns: Array
    last: Array

    def decode(self) -> Array:
        """The kernel [H, W, I, O]."""
        return np.einsum(
            "ir,hr,wr,ro->hwio", self.first, self.rows, self.columns, self.last, optimize=True
        )


def canonical_polyadic(kernel: Array, rank: int, seed: int = 0) -> CanonicalPolyadic:
    """conv(x, w) => 1x1, depthwise H x 1, depthwise 1 x W, 1x1 (Lebedev et al. 2015, section 3), by
    alternating least squares from the leading singular vectors."""
    rng = np.random.default_rng(seed)
    factors = []
    for axis in range(4):
        unfolded = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
        start = _leading(unfolded, min(rank, kernel.shape[axis]))
        extra = rng.normal(size=(len(start), rank - start.shape[1])) / np.sqrt(len(start))
        factors.append(np.concatenate([start, extra], axis=1))
    letters, total = "hwio", float((kernel**2).sum())
    before = np.inf
    for _ in range(4 * _SWEEPS):
        for axis in range(4):
            others = [index for index in range(4) if index != axis]
            normal = np.prod([factors[index].T @ factors[index] for index in others], axis=0)
            terms = ",".join(f"{letters[index]}r" for index in others)
            aim = np.einsum(
                f"{letters},{terms}->{letters[axis]}r", kernel,
                *(factors[index] for index in others), optimize=True,
            )  # fmt: skip
            factors[axis] = _solve(normal, aim.T).T
            if axis < 3:  # even norms keep the sums well scaled
                norms = np.linalg.norm(factors[axis], axis=0)
                factors[axis] = factors[axis] / np.where(norms > 0, norms, 1.0)
        error = total - float((aim * factors[3]).sum())
        if before - error <= _LEAST_GAIN * total:
            break
        before = error
    rows, columns, first, last = factors
    return CanonicalPolyadic(first, rows, columns, last.T)


def split_with_nonlinearity(
    weight: Array, bias: Array, rank: int, before: Array, wanted: Array, sweeps: int = 25
) -> tuple[Array, Array, Array]:
    """relu(w x + b) => relu(v u x + b'), [K, N] => [K, r], [r, N], [N].

    Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks", sections 3.2 and 3.3: the
    outputs behind the ReLU count, and `before` [P, K] are patches of the *compressed* network while
    `wanted` [P, N] are the original's sums before the ReLU (the asymmetric form). Auxiliary
    variables z with a growing penalty λ are solved in turns with the reduced-rank regression.
    """
    target = np.maximum(wanted, 0)
    mean_x = before.mean(axis=0)
    centred = before - mean_x
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += 1e-8 * np.trace(gram) / len(gram) + 1e-30
    lower = np.linalg.cholesky(gram)
    u, v = split_matrix(weight, rank)
    shift = bias
    for sweep in range(sweeps):
        penalty = 0.01 if sweep < sweeps // 2 else 1.0
        sums = before @ u @ v + shift
        # Of (relu(z) - target)² + penalty (z - sums)², by the sign of z.
        above = np.maximum((target + penalty * sums) / (1 + penalty), 0)
        below = np.minimum(sums, 0)
        cost_above = (above - target) ** 2 + penalty * (above - sums) ** 2
        cost_below = target**2 + penalty * (below - sums) ** 2
        z = np.where(cost_above <= cost_below, above, below)
        mean_z = z.mean(axis=0)
        aim = np.linalg.solve(lower, centred.T @ (z - mean_z))  # Lᵀ m for the full-rank m
        left, values, right = np.linalg.svd(aim, full_matrices=False)
        scale = np.sqrt(values[:rank])
        u = np.linalg.solve(lower.T, left[:, :rank] * scale)
        v = scale[:, None] * right[:rank]
        shift = mean_z - mean_x @ u @ v
    return u, v, shift
