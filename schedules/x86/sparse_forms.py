"""Sparse forms of x86 and what they cost against dense kernels, measured on Zen 4."""

from __future__ import annotations

from ...targets import Target
from ..sparse_conv2d import BYTES, GROUP, neighbours_read_neighbours
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec
from . import winograd
from .dot import widest_byte_dot

# Outputs that share their inputs => cycles of a sparse multiply-add against a dense one: indices,
# data without an order, narrow vectors (1.05 to 1.3 for blocks of 16).
_COST = {16: 1.15, 8: 1.4, 4: 2.0}
# The same of bytes in blocks of 16: gathering them costs as much as some products, and channels
# first a copy that short sums do not repay (3.9 for 64 inputs, else 1.6-1.9).
_COST_BYTES, _COPY_BYTES = 1.6, 150
# Winograd's filtering makes a dense 3x3 layer so much cheaper (14x14 and up).
_WINOGRAD = 0.42


def sparse_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of float32 layers, and of bytes where `vpdpbusd` multiplies them."""
    dtypes = spec.data_dtype, spec.weight_dtype, spec.acc_dtype
    if dtypes == ("float32",) * 3:
        dense = _dense_cost(spec)
        return [SparseForm(block, cost / dense) for block, cost in _COST.items()]
    has_rows = isinstance(spec, MatmulSpec) or neighbours_read_neighbours(spec)
    if dtypes == BYTES and has_rows and widest_byte_dot(target) is not None:
        return [SparseForm(16, _COST_BYTES + _COPY_BYTES / spec.reduction_size, GROUP)]
    return []


def _dense_cost(spec: Conv2dSpec | MatmulSpec) -> float:
    """Of a multiply-add of the dense layer, in times of the direct kernel's."""
    is_filtered = (
        isinstance(spec, Conv2dSpec)
        and winograd.is_applicable(spec)
        and min(spec.out_height, spec.out_width) >= 8
    )
    return _WINOGRAD if is_filtered else 1.0
