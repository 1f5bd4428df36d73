"""Scales of groups as whole multiples of one scale for each output channel: [K, N], K summed.

    w[k, n] = codes[k, n] * multiples[k // g, n] * scales[n]

Two-level quantisation (Dai et al. 2021, "VS-Quant: Per-vector Scaled Quantization for Accurate
Low-Precision Neural Network Inference", section 4): with integer activations the whole sum stays in
integers, so every target computes the same ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .affine import INTEGER_RANGES, SMALLEST_SCALE
from .group_wise import quantize_group_wise

LARGEST_MULTIPLE = 255
# What a sum may reach: the zero point's share and the bias are added behind it, in 32 bits.
LARGEST_SUM = 2**30
LARGEST_ACTIVATION = 255


def split_scales(
    group_scales: NDArray[np.float32],
    smallest: NDArray[np.float64] | float = 0.0,
    largest: NDArray[np.int64] | int = LARGEST_MULTIPLE,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Scales [G, N] => multiples uint8 [G, N] of at least 1, and scales float32 [N].

    A channel's largest multiple is `largest` [N], unless its scale would be below `smallest`.
    """
    scales = group_scales.max(axis=0).astype(np.float64) / largest  # [N]
    scales = np.maximum(scales, np.maximum(smallest, SMALLEST_SCALE)).astype(np.float32)
    multiples = np.clip(np.rint(group_scales / scales), 1, LARGEST_MULTIPLE)
    return multiples.astype(np.uint8), scales


def quantize_two_level(
    weight: NDArray[np.float32],
    group_size: int,
    dtype: str = "int4",
    smallest_scale: NDArray[np.float64] | float = 0.0,
) -> tuple[NDArray[np.int8], NDArray[np.uint8], NDArray[np.float32]]:
    """Codes int8 [K, N], multiples uint8 [ceil(K/g), N] and scales float32 [N].

    Each group's scale has the least squared error; codes are rounded to what the multiples make of
    it. Multiples of a channel are halved until no sum with bytes of data leaves 31 bits.
    """
    lowest, highest = INTEGER_RANGES[dtype]
    _, wanted = quantize_group_wise(weight, group_size, dtype)  # [G, N]
    wanted = np.where(_is_empty(weight, group_size), np.float32(0), wanted)
    group = np.arange(weight.shape[0]) // group_size
    largest = np.full(weight.shape[1], LARGEST_MULTIPLE, np.int64)
    while True:
        multiples, scales = split_scales(wanted, smallest_scale, largest)
        step = multiples.astype(np.float32) * scales  # [G, N]
        codes = np.clip(np.rint(weight / step[group]), lowest, highest).astype(np.int8)
        is_large = _largest_sums(codes, multiples, group) > LARGEST_SUM
        if not np.any(is_large & (largest > 1)):
            return codes, multiples, scales
        largest[is_large] = np.maximum(largest[is_large] // 2, 1)


def _largest_sums(
    integers: NDArray[np.int8], multiples: NDArray[np.uint8], group: NDArray[np.int64]
) -> NDArray[np.int64]:
    """255 * Σ|w| for each output channel."""
    magnitudes = np.abs(integers.astype(np.int64)) * multiples[group]
    return np.asarray(LARGEST_ACTIVATION * magnitudes.sum(axis=0))


def _is_empty(weight: NDArray[np.float32], group_size: int) -> NDArray[np.bool_]:
    """Groups of zeros alone: their scale says nothing. [G, N]"""
    starts = np.arange(0, weight.shape[0], group_size)
    return np.asarray(np.maximum.reduceat(np.abs(weight), starts, axis=0) == 0)
