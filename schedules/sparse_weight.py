"""Whether a weight's zeros are worth a kernel that skips them, and the weight for that kernel.

Zeros are looked at as they lie, wherever they came from: a step of the recipe, or a model that was
pruned elsewhere. A layer whose sparse kernel is predicted to be slower than its dense one keeps the
dense one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..targets import Target
from .sparse_conv2d import (
    BYTES,
    GROUP,
    encode,
    group_entries,
    neighbours_read_neighbours,
    offsets_of,
)
from .spec import Conv2dSpec, MatmulSpec, SparseConv2dSpec, WeightedSpec
from .weights import weight_codes

# Outputs that share their inputs => cycles of a sparse multiply-add against a dense one: indices,
# data without an order, narrow vectors (measured on Zen 4: 1.05 to 1.3 for blocks of 16).
_COST = {16: 1.15, 8: 1.4, 4: 2.0}
# The same of bytes in blocks of 16: gathering them costs as much as some products, and channels
# first a copy that short sums do not repay (measured on Zen 4: 3.9 for 64 inputs, else 1.6-1.9).
_COST_BYTES, _COPY_BYTES = 1.6, 150
# Winograd's filtering makes a dense 3x3 layer so much cheaper (measured, 14x14 and up).
_WINOGRAD = 0.42


def sparse_form(
    spec: WeightedSpec, weight: np.ndarray, target: Target
) -> tuple[SparseConv2dSpec, list[np.ndarray]] | None:
    """The layer by its nonzero weights alone, with the arrays values, offsets and starts; None:
    dense is as fast, or no kernel of the target skips zeros."""
    if not _has_kernel(spec, target):
        return None
    codes = weight_codes(spec, weight)[0]  # [K, N]
    kept = codes != 0
    if kept.mean() > 0.9:
        return None
    costs = _COST
    if spec.is_integer:
        costs = {16: _COST_BYTES + _COPY_BYTES / spec.reduction_size}
    cost, block = min(
        (_entries(kept, block) * block / kept.size * cost, block) for block, cost in costs.items()
    )
    if cost >= _dense_cost(spec):
        return None
    return _encoded(spec, codes, block, GROUP if spec.is_integer else 1)


def _has_kernel(spec: WeightedSpec, target: Target) -> bool:
    if not target.is_x86 or not isinstance(spec, (Conv2dSpec, MatmulSpec)):
        return False
    if spec.groups_of_channels > 1 or spec.weight_layout != spec.plain_layout:
        return False
    dtypes = spec.data_dtype, spec.weight_dtype, spec.acc_dtype
    if dtypes == ("float32",) * 3:
        return True
    from .x86.dot import widest_byte_dot

    return (
        widest_byte_dot(target) is not None
        and dtypes == BYTES
        and (isinstance(spec, MatmulSpec) or neighbours_read_neighbours(spec))
        and not spec.weight_zero_point
    )


def _dense_cost(spec: WeightedSpec) -> float:
    """Of a multiply-add of the dense layer."""
    from .x86 import winograd

    is_filtered = (
        isinstance(spec, Conv2dSpec)
        and winograd.is_applicable(spec)
        and min(spec.out_height, spec.out_width) >= 8
    )
    return _WINOGRAD if is_filtered else 1.0


def _entries(kept: np.ndarray, block: int) -> int:
    """How many inputs all blocks of so many outputs read."""
    starts = np.arange(0, kept.shape[1], block)
    return int(np.count_nonzero(np.logical_or.reduceat(kept, starts, axis=1)))


def _encoded(
    spec: WeightedSpec, codes: np.ndarray, block: int, group: int
) -> tuple[SparseConv2dSpec, list[np.ndarray]]:
    values, positions, starts = encode(codes, block)
    if not len(values):  # nothing is left of the layer, and arrays are not empty
        values, positions = np.zeros((1, block), codes.dtype), np.zeros(1, np.int32)
        starts[1:] = 1
    if group > 1:
        values, positions, starts = group_entries(values, positions, starts, group)
    common: dict[str, Any] = {
        "data_dtype": spec.data_dtype, "weight_dtype": spec.weight_dtype,
        "acc_dtype": spec.acc_dtype, "block": block, "group": group,
        "entries": len(positions), "longest": int(np.diff(starts).max()),
    }  # fmt: skip
    if isinstance(spec, MatmulSpec):
        sparse = SparseConv2dSpec(
            batch=1, height=1, width=spec.rows, in_channels=spec.in_features,
            out_channels=spec.out_features, kernel=(1, 1), is_flat=True, **common,
        )  # fmt: skip
    else:
        assert isinstance(spec, Conv2dSpec)
        sparse = SparseConv2dSpec(
            batch=spec.batch, height=spec.height, width=spec.width, in_channels=spec.in_channels,
            out_channels=spec.out_channels, kernel=spec.kernel, strides=spec.strides,
            padding=spec.padding, dilation=spec.dilation, pad_value=spec.pad_value, **common,
        )  # fmt: skip
    return sparse, [values, offsets_of(sparse, positions), starts]
