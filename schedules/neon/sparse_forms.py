"""Sparse forms of NEON and what they cost: instructions under qemu-user (README.md)."""

from __future__ import annotations

from ...targets import Target
from ..saturation import NarrowSums
from ..sparse_cost import DenseCost, EntryCost, GatheredCost
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec
from .dot import ByteDot, OutputsDot

# Products of signed bytes, each a sum of its own.
_SUMS = NarrowSums((-128, 127), 1)

_FLOATS = DenseCost(0.327, 0.7), EntryCost({16: 0.44, 8: 0.48, 4: 0.69}, 0.7)
_FLOATS_32 = DenseCost(0.85, 10.3), EntryCost({16: 0.60, 8: 0.60, 4: 1.1}, 2.0)
_PAIRS = (
    DenseCost(0.238, 4.3),
    GatheredCost({16: 0.25, 8: 0.29}, 2.9, woven=0.25, copied=0.4, tile=4, run=16),
)
_PAIRS_32 = (
    DenseCost(0.338, 7.4),
    GatheredCost({16: 0.43, 8: 0.50}, 4.0, woven=0.35, copied=0.6, tile=2, run=16),
)
_QUADS = (
    DenseCost(0.077, 3.3),
    GatheredCost({16: 0.098, 8: 0.107}, 2.8, woven=0.16, copied=0.4, tile=4, run=16),
)
# The same kernel beside dense layers by `smmla`.
_QUADS_I8MM = DenseCost(0.060, 3.0), _QUADS[1]


def sparse_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of float32 layers, and of bytes."""
    is_64 = target.has("aarch64")
    dtypes = spec.data_dtype, spec.weight_dtype, spec.acc_dtype
    if dtypes == ("float32",) * 3:
        dense, entries = _FLOATS if is_64 else _FLOATS_32
        return [entries.form(spec, block, dense.of(spec)) for block in entries.weights]
    signed, mixed = ("int8", "int8", "int32"), ("uint8", "int8", "int32")
    has_i8mm = target.has("i8mm")
    if target.has("dotprod") and (dtypes == signed or (dtypes == mixed and has_i8mm)):
        dense, gathered = _QUADS_I8MM if has_i8mm else _QUADS
        group, sums = ByteDot.group, None
    elif dtypes == signed:
        dense, gathered = _PAIRS if is_64 else _PAIRS_32
        group, sums = OutputsDot.group, _SUMS
    else:
        return []
    cost = dense.of(spec)
    return [gathered.form(spec, block, group, cost, sums) for block in gathered.weights]
