"""Weights as products of smaller ones. Matrices are [K, N], K summed, N outputs; kernels
[H, W, I, O].

Plain forms are nearest to the weight; data-aware ones to the layer's outputs on its calibration
patches, ‖Xᵀ(w - ŵ)‖², with `hessian` = X·Xᵀ [K, K] (`second_order.damped`), K in order [H, W, I].
Forms that no decomposition solves start from the plain one, whose factors are then improved in
turns, the others fixed: that is linear least squares, exact for factors at the output side, by
conjugate gradients for the others (whose normal equations would be as large as a factor squared).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .second_order import layer_error

Array = NDArray[np.float64]

# Sweeps of alternating least squares, and the relative gain below which they stop.
_SWEEPS = 60
_LEAST_GAIN = 1e-6
# The same for data: a sweep costs products with X·Xᵀ.
_DATA_SWEEPS = 30
_LEAST_DATA_GAIN = 1e-4
# Conjugate gradients on one factor before the others move.
_STEPS = 8


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


def split_rows_and_columns(
    kernel: Array, rank: int, hessian: Array | None = None
) -> tuple[Array, Array]:
    """conv(x, w) => conv(conv(x, u), v), u [H, 1, I, r], v [1, W, r, O] (Jaderberg et al. 2014,
    section 2.2, scheme 2).

    Plain: the SVD of w as [(H, I), (W, O)].
    """
    rows, columns, inputs, outputs = kernel.shape
    matrix = kernel.transpose(0, 2, 1, 3).reshape(rows * inputs, columns * outputs)
    u, v = split_matrix(matrix, rank)
    down = u.reshape(rows, inputs, rank)
    across = v.reshape(rank, columns, outputs).transpose(1, 0, 2)
    if hessian is not None:
        down, across = _refine_rows_and_columns(kernel, down, across, hessian)
    return down[:, None], across[None]


def _refine_rows_and_columns(
    kernel: Array, down: Array, across: Array, hessian: Array
) -> tuple[Array, Array]:
    """[H, I, r], [W, r, O]."""
    columns, outputs, rank = kernel.shape[1], kernel.shape[3], down.shape[2]
    flat = kernel.reshape(-1, outputs)
    pulled = hessian @ flat

    def sweep() -> float:
        nonlocal down, across
        # [(h, w, i), (w, r)]: each column of the window has its own coefficients.
        basis = np.einsum("hir,wx->hwixr", down, np.eye(columns)).reshape(len(flat), -1)
        across = _last(basis, hessian, pulled).reshape(columns, rank, outputs)
        down = _descend(
            down, hessian, pulled,
            lambda f: np.einsum("hir,wro->hwio", f, across, optimize=True).reshape(flat.shape),
            lambda p: np.einsum("hwio,wro->hir", p.reshape(kernel.shape), across, optimize=True),
        )  # fmt: skip
        change = flat - np.einsum("hir,wro->hwio", down, across, optimize=True).reshape(flat.shape)
        return layer_error(change, hessian)

    _in_turns(sweep, float((flat * pulled).sum()))
    # The middle tensor's channels get even ranges, as in the plain form.
    even = np.linalg.norm(across, axis=(0, 2)) / np.maximum(_norms(down), 1e-30)
    even = np.sqrt(np.where(even > 0, even, 1.0))
    return down * even, across / even[:, None]


def _norms(factor: Array) -> Array:
    """Of what each term (last axis) has."""
    return np.asarray(np.linalg.norm(factor.reshape(-1, factor.shape[-1]), axis=0))


def _in_turns(sweep: Callable[[], float], total: float) -> None:
    """Sweeps until the error they return gains little."""
    before = np.inf
    for _ in range(_DATA_SWEEPS):
        error = sweep()
        if before - error <= _LEAST_DATA_GAIN * total:
            break
        before = error


def _last(basis: Array, hessian: Array, pulled: Array) -> Array:
    """The exact last factor of basis @ factor, [K, r] => [r, N]; `pulled` = H w."""
    return _solve(basis.T @ (hessian @ basis), basis.T @ pulled)


def _descend(
    factor: Array,
    hessian: Array,
    pulled: Array,
    decode: Callable[[Array], Array],
    adjoint: Callable[[Array], Array],
) -> Array:
    """A factor that is nearer to the least error; `decode` (linear) makes a weight [K, N] of it,
    `adjoint` is the transposed map."""
    left = adjoint(pulled - hessian @ decode(factor))
    direction, size = left, float((left**2).sum())
    for _ in range(_STEPS):
        image = decode(direction)
        bent = hessian @ image
        curvature = float((image * bent).sum())
        if size <= 0 or curvature <= 0:
            break
        factor = factor + size / curvature * direction
        left = left - size / curvature * adjoint(bent)
        size, before = float((left**2).sum()), size
        direction = left + size / before * direction
    return factor


def _solve(normal: Array, aim: Array) -> Array:
    """Least squares by normal equations."""
    return np.asarray(np.linalg.solve(_ridged(normal), aim))


def _ridged(normal: Array) -> Array:
    """A tiny ridge keeps them solvable."""
    ridge = 1e-10 * np.trace(normal) / len(normal)
    return np.asarray(normal + np.eye(len(normal)) * max(ridge, 1e-30))


@dataclass(frozen=True)
class Tucker2:
    """w[h, w, i, o] ~ Σ first[i, a] core[h, w, a, b] last[b, o]."""

    first: Array
    core: Array
    last: Array

    def decode(self) -> Array:
        """The kernel [H, W, I, O]."""
        return np.einsum("ia,hwab,bo->hwio", self.first, self.core, self.last, optimize=True)


def tucker2(kernel: Array, rank_in: int, rank_out: int, hessian: Array | None = None) -> Tucker2:
    """conv(x, w) => conv1x1(conv(conv1x1(x, first), core), last) (Kim et al. 2016, section 3.1), by
    higher-order orthogonal iteration.

    With `hessian`: for a given `first` the best core and last are a reduced-rank regression.
    """
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
    found = Tucker2(first, core, last.T)
    return found if hessian is None else _refine_tucker2(kernel, found, hessian)


def _refine_tucker2(kernel: Array, start: Tucker2, hessian: Array) -> Tucker2:
    rows, columns, _, outputs = kernel.shape
    found, rank_out = start, start.core.shape[3]
    flat = kernel.reshape(-1, outputs)
    pulled = hessian @ flat

    def sweep() -> float:
        nonlocal found
        first = np.linalg.qr(found.first)[0]
        basis = np.kron(np.eye(rows * columns), first)  # [(h, w, i), (h, w, a)]
        normal = basis.T @ (hessian @ basis)
        wanted = _solve(normal, basis.T @ pulled)
        core, last = split_matrix(wanted, rank_out, _ridged(normal))
        core = core.reshape(rows, columns, -1, rank_out)
        # Errors are the same seen along the rows of `last`.
        across, inner = np.linalg.qr(last.T)  # [O, b], [b, b]
        seen = np.einsum("hwab,cb->hwac", core, inner)
        first = _descend(
            first, hessian, pulled @ across,
            lambda f: np.einsum("ia,hwac->hwic", f, seen, optimize=True).reshape(len(flat), -1),
            lambda p: np.einsum("hwic,hwac->ia", p.reshape(*kernel.shape[:3], -1), seen),
        )  # fmt: skip
        found = Tucker2(first, core, last)
        return layer_error(flat - found.decode().reshape(flat.shape), hessian)

    _in_turns(sweep, float((flat * pulled).sum()))
    return found


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


def canonical_polyadic(
    kernel: Array, rank: int, hessian: Array | None = None, seed: int = 0
) -> CanonicalPolyadic:
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
    found = CanonicalPolyadic(first, rows, columns, last.T)
    return found if hessian is None else _refine_canonical_polyadic(kernel, found, hessian)


def _refine_canonical_polyadic(
    kernel: Array, start: CanonicalPolyadic, hessian: Array
) -> CanonicalPolyadic:
    outputs = kernel.shape[3]
    flat = kernel.reshape(-1, outputs)
    pulled = hessian @ flat
    factors = {"i": start.first, "h": start.rows, "w": start.columns}
    last = start.last

    def sweep() -> float:
        nonlocal last
        basis = np.einsum("hr,wr,ir->hwir", factors["h"], factors["w"], factors["i"])
        last = _last(basis.reshape(len(flat), -1), hessian, pulled)
        # Errors are the same seen along the rows of `last`.
        across, inner = np.linalg.qr(last.T)  # [O, c], [c, r]
        for letter in "ihw":
            others = {other: factors[other] for other in "hwi" if other != letter}
            decode, adjoint = _term_maps(letter, others, inner, kernel.shape[:3])
            factors[letter] = _descend(factors[letter], hessian, pulled @ across, decode, adjoint)
        for letter in "hw":  # even norms keep the sums well scaled
            norms = _norms(factors[letter])
            factors[letter] = factors[letter] / np.where(norms > 0, norms, 1.0)
            last = last * norms[:, None]
        found = CanonicalPolyadic(factors["i"], factors["h"], factors["w"], last)
        return layer_error(flat - found.decode().reshape(flat.shape), hessian)

    _in_turns(sweep, float((flat * pulled).sum()))
    return CanonicalPolyadic(factors["i"], factors["h"], factors["w"], last)


def _term_maps(
    letter: str, others: dict[str, Array], last: Array, sides: tuple[int, ...]
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """One factor => the weight [K, c], the others fixed; and the transposed map."""
    terms = ",".join(f"{other}r" for other in others) + ",cr"
    fixed = [*others.values(), last]

    def decode(factor: Array) -> Array:
        found = np.einsum(f"{letter}r,{terms}->hwic", factor, *fixed, optimize=True)
        return np.asarray(found).reshape(-1, len(last))

    def adjoint(weight: Array) -> Array:
        opened = weight.reshape(*sides, len(last))
        return np.asarray(np.einsum(f"hwic,{terms}->{letter}r", opened, *fixed, optimize=True))

    return decode, adjoint
