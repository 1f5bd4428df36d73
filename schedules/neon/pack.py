"""Weights in the layouts that NEON's kernels read."""

from __future__ import annotations

import numpy as np

from ...targets import Target
from ..layout import PackedLayout
from ..saturation import longest_chain, run_of
from ..spec import Conv2dSpec, Conv2dTransposeSpec, MatmulSpec, WeightedSpec
from ..weights import pack_codes, padded_axis, weight_codes, without_zero_point
from ..window import window_of
from .depthwise import taps_in_turn
from .dot import LANES, ByteDot, PairsDot, TileDot, WordDot, multiplies_bytes

# Zeros between the rows of a kernel may make it so much longer before 16-bit operands pay: in the
# stem of an image network, 27 => 48, they do on AArch64, not on ARMv7 (counted).
_PADDING_LIMIT, _PADDING_LIMIT_32 = 1.5, 4
# What data are where they are multiplied as signed bytes.
_DATA = (-128, 127)


def choose_layout(spec: WeightedSpec, target: Target) -> PackedLayout | None:
    """The layout of a layer; None: no kernel reads it."""
    if not isinstance(spec, (Conv2dSpec, Conv2dTransposeSpec, MatmulSpec)):
        return None
    if spec.weight_dtype not in ("float32", "int8", "uint8"):
        return None
    axis = padded_axis(spec)
    by_words = PackedLayout(LANES, WordDot.group, axis)
    if not multiplies_bytes(spec):
        return by_words
    if target.has("i8mm") and window_of(spec).positions > 1:
        return PackedLayout(LANES, TileDot.group, axis)
    if target.has("dotprod"):
        return PackedLayout(LANES, ByteDot.group, axis)
    by_pairs = PackedLayout(LANES, PairsDot.group, axis)
    padded = by_pairs.steps(spec.reduction) * by_pairs.group
    limit = _PADDING_LIMIT if target.has("aarch64") else _PADDING_LIMIT_32
    return by_pairs if padded <= limit * spec.reduction_size else by_words


def pack_weight(
    spec: WeightedSpec, weight: np.ndarray, target: Target
) -> tuple[WeightedSpec, np.ndarray] | None:
    """The spec and weight array of the same layer in the layout the target's kernel reads; None:
    keep both."""
    if spec.weight_layout != spec.plain_layout:
        return None
    changed, codes = without_zero_point(spec, weight_codes(spec, weight))
    if isinstance(spec, Conv2dSpec) and spec.is_depthwise:
        plain = codes.transpose(1, 0, 2).reshape(changed.weight_shape)
        if multiplies_bytes(changed):
            steps = plain.reshape(1, 1, changed.reduction_size, -1, 1)
            run = taps_in_turn(changed)
            changed = changed.replace(chain=longest_chain(changed, steps, run, _DATA, added=1))
        return None if changed == spec else (changed, np.ascontiguousarray(plain))
    layout = choose_layout(changed, target)
    if layout is None:
        return None
    changed = changed.replace(weight_layout=layout.name)
    packed = pack_codes(changed, codes, layout.name)
    if layout.group == PairsDot.group:
        changed = changed.replace(chain=_chain(changed, packed, layout))
    return changed, packed


def _chain(spec: WeightedSpec, packed: np.ndarray, layout: PackedLayout) -> int:
    """How many halves of a register are added in 16 bits. One product always fits."""
    half = PairsDot.HALF
    halves = packed.reshape(*packed.shape[:-1], layout.group // half, half)
    *outer, width, count, _ = halves.shape
    steps = np.moveaxis(halves, -2, -3).reshape(*outer[:-1], outer[-1] * count, width, half)
    return longest_chain(spec, steps, run_of(spec, layout) * count, _DATA, added=1)
