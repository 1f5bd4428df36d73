"""Weights in the layouts that the kernels for RISC-V's vectors read."""

from __future__ import annotations

import numpy as np

from ...targets import Target
from ..layout import PackedLayout
from ..spec import Conv2dSpec, Conv2dTransposeSpec, MatmulSpec, WeightedSpec, ceil_div
from ..weights import pack_whole, padded_axis
from .dot import MOST_REGISTERS, select_dot

_LANES = (32, 16, 8, 4)
# A wider group is worth so much more memory for padded channels...
_PADDING_LIMIT = 1.07
# ... except where the weight is so small that nobody will notice.
_SMALL_WEIGHT_BYTES = 1024


def choose_lanes(spec: WeightedSpec, target: Target) -> int:
    """Outputs of a group of registers: eight of them, or fewer when padding would cost too much."""
    narrow = ceil_div(spec.columns, _LANES[-1]) * _LANES[-1]
    for lanes in _LANES[:-1]:
        if lanes * 32 > MOST_REGISTERS * target.vector_bits:
            continue
        padded = ceil_div(spec.columns, lanes) * lanes
        small = (padded - narrow) * spec.reduction_size <= _SMALL_WEIGHT_BYTES
        if spec.columns > lanes // 2 and (padded <= narrow * _PADDING_LIMIT or small):
            return lanes
    return _LANES[-1]


def pack_weight(
    spec: WeightedSpec, weight: np.ndarray, target: Target
) -> tuple[WeightedSpec, np.ndarray] | None:
    """The spec and weight array of the same layer in the layout the target's kernel reads; None:
    keep both."""

    def layout_of(spec: WeightedSpec) -> PackedLayout | None:
        lanes = choose_lanes(spec, target)
        is_ours = isinstance(spec, (Conv2dSpec, Conv2dTransposeSpec, MatmulSpec))
        if not is_ours or select_dot(spec, lanes) is None:
            return None
        return PackedLayout(lanes, 1, padded_axis(spec))

    return pack_whole(spec, weight, layout_of)
