"""Choosing a packed weight layout for Arm and packing into it."""

from __future__ import annotations

import numpy as np

from ...targets import Target
from ..spec import Conv2dSpec, WeightedSpec
from ..weights import pack_codes, weight_codes, without_zero_point
from . import matrix, mve_depthwise, mve_matrix


def pack_weight(
    spec: WeightedSpec, weight: np.ndarray, target: Target
) -> tuple[WeightedSpec, np.ndarray] | None:
    """The spec and weight array of the same layer in the layout the target's kernel reads; None:
    keep both."""
    if spec.weight_layout != spec.plain_layout or not target.has("dsp"):
        return None
    changed, codes = without_zero_point(spec, weight_codes(spec, weight))
    if isinstance(changed, Conv2dSpec) and changed.is_depthwise:
        if target.has("mve") and mve_depthwise.takes(changed):
            layout = mve_depthwise.LAYOUT.name
            return changed.replace(weight_layout=layout), pack_codes(changed, codes, layout)
        if changed == spec:
            return None
        plain = codes.transpose(1, 0, 2).reshape(changed.weight_shape)
        return changed, np.ascontiguousarray(plain)
    if target.has("mve"):
        if not mve_matrix.takes(changed):
            return None
        layout = mve_matrix.layout_for(changed).name
    elif not matrix.takes(changed):
        return None
    else:
        halved = changed.replace(weight_dtype="int4")
        if matrix.takes(halved) and matrix.fits_nibbles(halved, codes):
            changed, layout = halved, matrix.LAYOUT.name
        else:
            changed = changed.replace(weight_dtype="int8")
            layout = matrix.layout_of(changed, codes).name
    return changed.replace(weight_layout=layout), pack_codes(changed, codes, layout)


def pack_parts(
    spec: WeightedSpec, parts: list[np.ndarray], target: Target
) -> tuple[WeightedSpec, list[np.ndarray]] | None:
    """The same for codes of four bits with whole-number scales of groups, [G, N] => [O, G, 2]."""
    if spec.weight_layout != spec.plain_layout or not matrix.takes(spec):
        return None
    codes = weight_codes(spec, parts[0])
    if not matrix.fits_nibbles(spec, codes):
        return None
    layout = matrix.LAYOUT
    scales = np.pad(parts[1], ((0, 0), (0, -parts[1].shape[1] % layout.width)))
    turned = scales.reshape(len(scales), -1, layout.width).transpose(1, 0, 2)
    packed = spec.replace(weight_layout=layout.name)
    return packed, [pack_codes(spec, codes, layout.name), np.ascontiguousarray(turned)]
