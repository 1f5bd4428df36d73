"""Packed weights for cores without vectors."""

from __future__ import annotations

import numpy as np

from ...targets import Target
from ..layout import PackedLayout
from ..spec import Conv2dSpec, WeightedSpec
from ..weights import (
    in_nibbles,
    pack_codes,
    plain_depthwise,
    weight_codes,
    without_zero_point,
)
from ..window import window_of
from .matrix import takes


def channels_of(spec: WeightedSpec, target: Target) -> int:
    """Output channels whose weights lie side by side.

    Thumb-1 reads every channel at its own address: it has a load of signed bytes for registers as
    offsets only. Thumb-2 has registers for two channels of four positions, or eight of one.
    """
    if target.has("thumb") and not target.has("thumb2"):
        return 1
    one_position = window_of(spec).positions == 1
    most = (8 if one_position else 2) if target.has("thumb2") else (8 if one_position else 4)
    while most > 1 and most // 2 >= spec.columns:
        most //= 2
    return most


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
    if not takes(changed):
        return None
    layout = PackedLayout(channels_of(changed, target), 1, "R").name
    return changed.replace(weight_layout=layout), pack_codes(changed, codes, layout)
