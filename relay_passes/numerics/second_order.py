"""Optimal Brain Surgeon, layer by layer: which weights go, and what the others become.

A layer's squared error over its calibration patches is Σ_n (w_n - ŵ_n)ᵀ H (w_n - ŵ_n), H = X·Xᵀ
[K, K], w [K, N]: quadratic, and each output has its own. Removing w_p optimally costs
w_p² / [H⁻¹]_pp / 2 and moves the others by -w_p / [H⁻¹]_pp · H⁻¹_:p (Hassibi & Stork 1993).

Two ways to choose: `prune_greedily` removes the cheapest unit again and again with the exact
inverse (Frantar & Alistarh 2022, "Optimal Brain Compression", section 4), `prune_in_order` decides
input by input (Frantar & Alistarh 2023, "SparseGPT", section 3), which costs K² an output instead
of K³. `reconstruct` then solves for the weights that are left, which no order of updates can beat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .sparsity_pattern import Block, SemiStructured, SparsityPattern

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Added to the diagonal, as a part of its mean (SparseGPT, appendix A).
DAMPING = 0.01
# Inputs that `prune_in_order` decides on together.
_ORDERED_INPUTS = 128


def damped(second: Matrix, damping: float = DAMPING) -> Matrix:
    """X·Xᵀ [K, K] with a ridge, so that it has an inverse."""
    hessian = second.astype(np.float64, copy=True)
    mean = np.diag(hessian).mean()
    hessian[np.diag_indices_from(hessian)] += damping * mean if mean > 0 else 1.0
    return hessian


def layer_error(change: Matrix, second: Matrix) -> float:
    """Squared error of the layer's outputs over all patches when its weight moves by `change`
    [K, N]."""
    return float(np.einsum("kn,kn->", change, second @ change))


def reconstruct(weight: Matrix, hessian: Matrix, kept: Mask) -> Matrix:
    """The weights with zeros where not `kept` that come closest to `weight` in the layer's error.

    argmin ‖Xᵀw - Xᵀŵ‖² with ŵ = 0 outside `kept`: H_SS ŵ_S = (H w)_S for each output's own S.
    [K, N], [K, K], [K, N] => [K, N]. Outputs with one S are solved together.
    """
    result = np.zeros_like(weight, dtype=np.float64)
    wanted = hessian @ weight
    supports, owner = np.unique(kept.T, axis=0, return_inverse=True)
    for index, support in enumerate(supports):
        columns = np.flatnonzero(owner.ravel() == index)
        rows = np.flatnonzero(support)
        if rows.size:
            inner = hessian[np.ix_(rows, rows)]
            solved = np.linalg.solve(inner, wanted[np.ix_(rows, columns)])
            result[np.ix_(rows, columns)] = solved
    return result


def prune_in_order(
    weight: Matrix, hessian: Matrix, pattern: SparsityPattern, sparsity: float
) -> tuple[Matrix, Mask]:
    """(ŵ, kept), both [K, N]. Runs of inputs are decided one after the other at the same sparsity;
    what an input loses, later ones make up for."""
    size = len(weight)
    step = _run_of_inputs(pattern)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T  # H⁻¹ = Uᵀ U
    left = weight.astype(np.float64, copy=True)
    kept = np.ones(weight.shape, bool)
    for start in range(0, size, step):
        end = min(start + step, size)
        inner = slice(start, end)
        scores = left[inner] ** 2 / np.diag(upper)[inner, None] ** 2
        kept[inner] = pattern.choose(scores, sparsity)
        errors = np.zeros((end - start, weight.shape[1]))
        for k in range(start, end):
            lost = np.where(kept[k], 0.0, left[k])
            errors[k - start] = lost / upper[k, k]
            left[k] -= lost
            left[k + 1 : end] -= np.outer(upper[k, k + 1 : end], errors[k - start])
        left[end:] -= upper[inner, end:].T @ errors
    return left * kept, kept


def _run_of_inputs(pattern: SparsityPattern) -> int:
    """How many inputs are decided on together: whole units."""
    if isinstance(pattern, SemiStructured):
        return pattern.of
    unit = pattern.inputs if isinstance(pattern, Block) else 1
    return max(1, _ORDERED_INPUTS // unit) * unit


def prune_greedily(
    weight: Matrix,
    hessian: Matrix,
    pattern: Block | SemiStructured,
    sparsity: float,
    together: int = 1,
) -> tuple[Matrix, Mask]:
    """(ŵ, kept), both [K, N]. Outputs that share a pattern are pruned unit by unit; how many units
    each such group of outputs gives is decided over all of them, by what each would cost.

    `together` units of a group are removed between two updates of their prices: 1 is the published
    algorithm, more do the same K³ operations a group of outputs as fewer, larger products.
    """
    kept = GreedyRemoval(weight, hessian, pattern, together).kept(sparsity)
    return reconstruct(weight, hessian, kept), kept


class GreedyRemoval:
    """In which order `prune_greedily` removes units, and what each costs: whatever the sparsity."""

    def __init__(
        self, weight: Matrix, hessian: Matrix, pattern: Block | SemiStructured, together: int = 1
    ) -> None:
        self._pattern, self._shape = pattern, weight.shape
        inverse = np.asarray(np.linalg.inv(hessian), np.float64)
        self._groups = [
            slice(start, min(start + pattern.outputs, weight.shape[1]))
            for start in range(0, weight.shape[1], pattern.outputs)
        ]
        traces = [
            _remove_units(weight[:, group], inverse, pattern, together) for group in self._groups
        ]
        self._orders = [order for order, _ in traces]
        # Where a later unit of a trace is cheaper it still waits for the one before it.
        self._costs = [np.maximum.accumulate(cost) for _, cost in traces]

    @property
    def costs(self) -> NDArray[np.float64]:
        """What the units cost, the cheapest first."""
        return np.sort(np.concatenate(self._costs))

    def kept(self, sparsity: float) -> Mask:
        """[K, N]; a pattern with a sparsity of its own ignores `sparsity`."""
        if isinstance(self._pattern, SemiStructured):
            counts = np.array([len(order) for order in self._orders])
        else:
            removed = round(sum(len(cost) for cost in self._costs) * sparsity)
            owners = np.repeat(np.arange(len(self._groups)), [len(cost) for cost in self._costs])
            cheapest = np.argsort(np.concatenate(self._costs), kind="stable")[:removed]
            counts = np.bincount(owners[cheapest], minlength=len(self._groups))
        kept = np.ones(self._shape, bool)
        for group, order, count in zip(self._groups, self._orders, counts, strict=True):
            if count:
                kept[np.concatenate(order[:count]), group] = False
        return kept


def _remove_units(
    weight: Matrix, inverse: Matrix, pattern: Block | SemiStructured, together: int
) -> tuple[list[NDArray[np.int64]], NDArray[np.float64]]:
    """(units in the order in which they go, what each costs) for outputs [K, n] that share all
    zeros. A unit is some neighbouring inputs; of N:M those that must go go."""
    size = len(weight)
    unit = pattern.inputs if isinstance(pattern, Block) else 1
    units = [np.arange(start, min(start + unit, size)) for start in range(0, size, unit)]
    may_go = np.ones(len(units), bool)
    room: NDArray[np.int64] | None = None  # how many may still go, by window
    if isinstance(pattern, SemiStructured):
        lengths = np.minimum(pattern.of, size - np.arange(0, size, pattern.of))
        room = lengths - -(-pattern.kept * lengths // pattern.of)
    left, inverse = weight.astype(np.float64, copy=True), inverse.copy()
    rows = np.arange(size)  # where each input is in `left` and `inverse`
    removed = np.zeros(size, bool)
    order: list[NDArray[np.int64]] = []
    costs: list[float] = []
    while may_go.any():
        prices = _prices(left, inverse, rows, units, may_go)
        chosen: list[int] = []
        for index in np.argsort(prices, kind="stable")[: max(1, together)]:
            if not may_go[index]:
                break
            chosen.append(int(index))
            may_go[index] = False
            if room is not None and isinstance(pattern, SemiStructured):
                window = index // pattern.of
                room[window] -= 1
                if room[window] == 0:
                    may_go[window * pattern.of : (window + 1) * pattern.of] = False
        inputs = np.concatenate([units[index] for index in chosen])
        taken = rows[inputs]
        moved = inverse[taken]
        columns = np.linalg.solve(moved[:, taken], moved)  # [removed, K]
        left -= columns.T @ left[taken]
        inverse -= moved.T @ columns
        removed[inputs] = True
        order += [units[index] for index in chosen]
        costs += [float(prices[index]) for index in chosen]
        if 8 * np.count_nonzero(~removed) <= 7 * len(left):  # smaller matrices from here on
            stay = np.flatnonzero(~removed)
            local = rows[stay]
            left, inverse = left[local], inverse[np.ix_(local, local)]
            rows[stay] = np.arange(len(stay))
    return order, np.array(costs)


def _prices(
    left: Matrix,
    inverse: Matrix,
    rows: NDArray[np.int64],
    units: Sequence[NDArray[np.int64]],
    may_go: Mask,
) -> NDArray[np.float64]:
    """What each unit's removal costs, wᵀ [H⁻¹_uu]⁻¹ w / 2 over its outputs; inf for those that may
    not go. `rows`: where each input is in `left` and `inverse`."""
    prices = np.full(len(units), np.inf)
    if len(units) == len(rows):
        inputs = rows[may_go]
        prices[may_go] = (left[inputs] ** 2).sum(axis=1) / np.diag(inverse)[inputs] / 2
        return prices
    for index in np.flatnonzero(may_go):
        inputs = rows[units[int(index)]]
        values = left[inputs]
        solved = np.linalg.solve(inverse[np.ix_(inputs, inputs)], values)
        prices[index] = float((values * solved).sum()) / 2
    return prices
