"""Choosing a packed weight layout for x86 and packing into it."""

from __future__ import annotations

import numpy as np

from ...targets import Target
from .. import depthwise_kernel
from ..layout import PackedLayout
from ..matrix import takes_weight
from ..saturation import LONGEST_CHAIN, longest_chain
from ..spec import Conv2dSpec, Conv2dTransposeSpec, MatmulSpec, WeightedSpec, ceil_div
from ..weights import (
    pack_codes,
    padded_axis,
    plain_depthwise,
    weight_codes,
    without_zero_point,
)
from ..window import window_of
from . import nibbles
from .dot import ChainDot, select_dot

# A wider block is worth at most this much more memory for padded channels...
_PADDING_LIMIT = 1.07
# ... except where the weight is so small that nobody will notice.
_SMALL_WEIGHT_BYTES = 1024
# Up to so many positions a weight is read faster than it is used.
_MEMORY_BOUND_POSITIONS = 4


def choose_lanes(spec: WeightedSpec, target: Target) -> int:
    """Outputs a block: the vector's width, or a narrower one when padding would cost too much."""
    columns = spec.columns
    lanes = min(16, target.lanes(32))
    while lanes > 4:
        padded = ceil_div(columns, lanes) * lanes
        narrow = ceil_div(columns, 4) * 4
        small = (padded - narrow) * spec.reduction_size <= _SMALL_WEIGHT_BYTES
        if columns > lanes // 2 and (padded <= narrow * _PADDING_LIMIT or small):
            return lanes
        lanes //= 2
    return lanes


def choose_layout(spec: WeightedSpec, target: Target) -> PackedLayout | None:
    """The layout the x86 kernels read, or None when they have no form for the layer."""
    lanes = choose_lanes(spec, target)
    dot = select_dot(spec, target, lanes)
    if dot is None:
        return None
    return PackedLayout(lanes, dot.group, padded_axis(spec))


def pack_weight(
    spec: WeightedSpec, weight: np.ndarray, target: Target
) -> tuple[WeightedSpec, np.ndarray] | None:
    """The spec and weight array of the same layer in the layout the target's kernel reads; None:
    keep both."""
    if spec.weight_layout != spec.plain_layout:
        return None
    codes = weight_codes(spec, weight)
    if isinstance(spec, Conv2dSpec) and spec.is_depthwise:
        return plain_depthwise(spec, codes)
    spec, codes = without_zero_point(spec, codes)
    halved = _halved(spec, codes, target)
    if halved is not None:
        return halved
    chained = _chained(spec, codes, target)
    if chained is not None:
        return chained
    layout = choose_layout(spec, target)
    if layout is None:
        return None
    return spec.replace(weight_layout=layout.name), pack_codes(spec, codes, layout.name)


def _halved(
    spec: WeightedSpec, codes: np.ndarray, target: Target
) -> tuple[WeightedSpec, np.ndarray] | None:
    """Two codes in a byte, where all fit four bits and reading the weight is what the layer's time
    goes to: few positions share what is read."""
    fits = spec.weight_dtype == "int8" and codes.min() >= -8 and codes.max() <= 7
    if not fits or spec.data_dtype != "uint8" or spec.acc_dtype != "int32":
        return None
    if not isinstance(spec, (Conv2dSpec, MatmulSpec)):
        return None
    if window_of(spec).positions > _MEMORY_BOUND_POSITIONS:
        return None
    # Chains of 4-bit codes stay within int16 for so many steps: 8 * 2 * 255 * 8 < 2**15.
    asked = spec.replace(weight_dtype="int4", chain=LONGEST_CHAIN)
    layout = choose_layout(asked, target)
    if layout is None:
        return None
    halved = asked.replace(weight_layout=layout.name)
    dot = select_dot(halved, target, layout.width)
    if dot is None or not nibbles.takes_weight(halved, dot, target):
        return None
    return halved, pack_codes(halved, codes, layout.name)


def _chained(
    spec: WeightedSpec, codes: np.ndarray, target: Target
) -> tuple[WeightedSpec, np.ndarray] | None:
    """Packed for the bytes' products in pairs, where no better instruction exists and the weights
    prove that no sum saturates."""
    bytes_of_data = spec.data_dtype in ("int8", "uint8") and spec.acc_dtype == "int32"
    if not bytes_of_data or spec.weight_dtype != "int8":
        return None
    asked = spec.replace(chain=1)
    layout = choose_layout(asked, target)
    if layout is None or not isinstance(select_dot(asked, target, layout.width), ChainDot):
        return None
    packed = pack_codes(spec, codes, layout.name)
    chain = longest_chain(spec.replace(weight_layout=layout.name), packed)
    return (spec.replace(weight_layout=layout.name, chain=chain), packed) if chain else None


def decoded_spec(spec: WeightedSpec, target: Target) -> WeightedSpec | None:
    """The layer with a float weight in the layout its kernel reads, where no kernel reads the codes
    of a weight-only layer; None: one does, or floats have no kernel either."""
    if not spec.weight_only or spec.packed_layout is not None:
        return None
    plain = spec.replace(
        weight_dtype="float32", weight_zero_point=0, group_size=0, group_zero_points=False,
        table_channels=0,
    )  # fmt: skip
    if isinstance(spec, Conv2dSpec) and spec.is_depthwise:
        return None if depthwise_kernel.takes_weight(spec) else plain
    dot = select_dot(spec, target, choose_lanes(spec, target))
    if not isinstance(spec, (Conv2dSpec, Conv2dTransposeSpec, MatmulSpec)):
        return None
    if dot is not None and takes_weight(spec, dot, target):
        return None
    layout = choose_layout(plain, target)
    return None if layout is None else plain.replace(weight_layout=layout.name)
