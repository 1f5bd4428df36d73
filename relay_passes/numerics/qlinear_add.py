"""The sum of two 8-bit tensors as ONNX Runtime's QLinearAdd computes it, in integers.

ONNX Runtime adds in float32, so that a sum within 10^-5 of half a step may fall on its other side
than the exact sum does, and on another one again on another instruction set. That is one pair of
codes in 10^5, but each is an input of all layers behind it. A rescaled sum (`requantize_sum`) has
no float addition; its constants are chosen so that every pair of codes gives what ONNX Runtime's
AVX2 kernel (fused multiply-add) gives, on every target.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from .requantize import scale_float32

# How many float32 values on either side of a multiplier are tried.
REACH = 8


def _fused_multiply_add(
    a: np.ndarray, b: np.ndarray | np.float32, c: np.ndarray | np.float32
) -> np.ndarray:
    """float32(a * b + c), rounded once: codes a, ratios b and steps c leave float64 exact."""
    total = np.asarray(a, np.float64) * np.float64(b) + np.asarray(c, np.float64)
    return np.asarray(total, np.float32)


def qlinear_add(
    a: np.ndarray,
    b: np.ndarray,
    scales: Sequence[float],
    zero_points: Sequence[int],
    bounds: tuple[int, int],
) -> np.ndarray:
    """Codes of s_a*(a - z_a) + s_b*(b - z_b) at (s_y, z_y), as int64; a and b broadcast.

    `scales` and `zero_points` are those of a, b and the result.
    """
    step = np.float32(scales[2])
    ratio_a, ratio_b = (np.float32(np.float32(scale) / step) for scale in scales[:2])
    zero_a, zero_b, zero_y = (np.float32(zero) for zero in zero_points)
    fixed = zero_y - _fused_multiply_add(np.asarray(zero_a), ratio_a, np.float32(ratio_b * zero_b))
    total = _fused_multiply_add(a, ratio_a, _fused_multiply_add(b, ratio_b, fixed))
    return np.clip(np.rint(total), *bounds).astype(np.int64)


def matching_constants(
    wanted: np.ndarray,
    integers: Sequence[np.ndarray],
    multipliers: Sequence[np.float32],
    clamps: Sequence[tuple[int, int]],
    bounds: tuple[int, int],
    fraction_bits: int,
) -> tuple[tuple[np.float32, np.float32], int] | None:
    """(multipliers, offset) with which `requantize_sum` gives `wanted`; None: not found nearby.

    `wanted` [A, B] are steps for all values `integers` of the two terms [A] and [B], clipped to
    `bounds`. Multipliers, clamps and offset count units of 2^-fraction_bits; the multipliers given
    are the exact ones.
    """
    low, high = bounds
    far = np.int64(1) << 62
    half = 1 << (fraction_bits - 1)
    odd = wanted & 1  # half a step goes to the even one
    centre = wanted << fraction_bits
    lower = np.where(wanted == low, -far, centre - half + odd)
    upper = np.where(wanted == high, far, centre + half - odd)
    nudges = itertools.product(range(-REACH, REACH + 1), repeat=2)
    for nudge in sorted(nudges, key=lambda pair: abs(pair[0]) + abs(pair[1])):
        chosen = tuple(_nudged(m, n) for m, n in zip(multipliers, nudge, strict=True))
        first, second = (
            np.clip(scale_float32(x, np.asarray(m)), *clamp).astype(np.int64)
            for x, m, clamp in zip(integers, chosen, clamps, strict=True)
        )
        total = first[:, None] + second
        least, most = int((lower - total).max()), int((upper - total).min())
        if least <= most:
            return (chosen[0], chosen[1]), min(max(0, least), most)
    return None


def _nudged(value: np.float32, steps: int) -> np.float32:
    """The float32 value that many values above (below when negative) a positive one."""
    return (np.float32(value).view(np.int32) + np.int32(steps)).view(np.float32)
