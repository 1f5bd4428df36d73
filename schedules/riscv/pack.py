"""Weights in the layouts that the kernels for RISC-V's vectors read."""

from __future__ import annotations

import numpy as np

from ...targets import Target
from ..layout import PackedLayout
from ..spec import Conv2dSpec, Conv2dTransposeSpec, MatmulSpec, WeightedSpec, ceil_div
from ..weights import (
    in_nibbles,
    pack_codes,
    padded_axis,
    plain_depthwise,
    weight_codes,
    without_zero_point,
)
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
    if spec.weight_layout != spec.plain_layout or spec.weight_dtype == "int4":
        return None
    codes = weight_codes(spec, weight)
    if isinstance(spec, Conv2dSpec) and spec.is_depthwise:
        return plain_depthwise(spec, codes)
    changed, codes = without_zero_point(spec, codes)
    halved = in_nibbles(changed, codes)
    if halved is not None:
        return halved
    lanes = choose_lanes(changed, target)
    if not isinstance(spec, (Conv2dSpec, Conv2dTransposeSpec, MatmulSpec)):
        return None
    if select_dot(changed, lanes) is None:
        return None
    layout = PackedLayout(lanes, 1, padded_axis(spec)).name
    return changed.replace(weight_layout=layout), pack_codes(changed, codes, layout)
