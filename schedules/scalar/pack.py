"""Packed weights for cores without vectors."""

from __future__ import annotations

import numpy as np

from ...targets import Target
from ..layout import PackedLayout
from ..spec import WeightedSpec
from ..weights import pack_whole
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

    def layout_of(spec: WeightedSpec) -> PackedLayout | None:
        return PackedLayout(channels_of(spec, target), 1, "R") if takes(spec) else None

    return pack_whole(spec, weight, layout_of)
