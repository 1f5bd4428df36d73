"""Weights in groups that share a scale, along the sum of a layer: [K, N], K summed, N outputs."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from .affine import INTEGER_RANGES, SMALLEST_SCALE

# Scales tried, relative to the one that covers the largest weight of a group: with 16 levels, a few
# clipped weights can cost less than coarse steps for all the others.
CANDIDATES = np.linspace(0.7, 1.0, 16)


def quantize_group_wise(
    weight: NDArray[np.float32],
    group_size: int,
    dtype: str,
    power_of_two: bool = False,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes int8 [K, N] and scales float32 [ceil(K/g), N], with least squared error by group.

    The scale of each group is found by trying (for 8 bits nothing is gained by clipping, and the
    largest weight decides). The last group may be shorter.
    """
    lowest, highest = INTEGER_RANGES[dtype]
    outputs = weight.shape[1]
    grouped = _grouped(weight, group_size)  # [G, g, N]
    # The most negative code reaches further than the most positive one.
    covering = np.maximum(grouped.max(axis=1) / highest, grouped.min(axis=1) / lowest)  # [G, N]
    fractions = CANDIDATES if dtype == "int4" else np.ones(1)
    best = np.full(covering.shape, np.inf)
    scales = np.ones(covering.shape, np.float32)
    for fraction in fractions:
        scale = np.maximum(covering * fraction, SMALLEST_SCALE)
        if power_of_two:
            scale = 2.0 ** np.rint(np.log2(scale)) if dtype == "int4" else _next_power(scale)
        scale = scale.astype(np.float32)
        codes = np.clip(np.rint(grouped / scale[:, None]), lowest, highest)
        error = ((codes * scale[:, None] - grouped).astype(np.float64) ** 2).sum(axis=1)
        better = error < best
        best[better], scales[better] = error[better], scale[better]
    scales[covering <= 0] = 1.0
    codes = np.clip(np.rint(grouped / scales[:, None]), lowest, highest).astype(np.int8)
    return codes.reshape(-1, outputs)[: weight.shape[0]], scales


def quantize_group_wise_asymmetric(
    weight: NDArray[np.float32], group_size: int, dtype: str
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int8]]:
    """Codes int8 [K, N], scales float32 and zero points int8 [ceil(K/g), N]: the same, each group
    with a range of its own on either side of zero, shrunk for least squared error."""
    lowest, highest = INTEGER_RANGES[dtype]
    outputs = weight.shape[1]
    grouped = _grouped(weight, group_size)  # [G, g, N]
    low = np.minimum(grouped.min(axis=1), 0).astype(np.float64)  # [G, N]
    high = np.maximum(grouped.max(axis=1), 0).astype(np.float64)
    fractions = CANDIDATES if dtype == "int4" else np.ones(1)
    best = np.full(low.shape, np.inf)
    scales, zero_points = np.ones(low.shape, np.float32), np.zeros(low.shape, np.int8)
    for below, above in itertools.product(fractions[::3], fractions[::3]):
        span = np.maximum(high * above - low * below, SMALLEST_SCALE)
        scale = (span / (highest - lowest)).astype(np.float32)
        zero = np.clip(np.rint(lowest - low * below / scale), lowest, highest)
        codes = np.clip(np.rint(grouped / scale[:, None]) + zero[:, None], lowest, highest)
        decoded = (codes - zero[:, None]) * scale[:, None]
        error = ((decoded - grouped).astype(np.float64) ** 2).sum(axis=1)
        better = error < best
        best[better], scales[better] = error[better], scale[better]
        zero_points[better] = zero[better].astype(np.int8)
    is_empty = (low == 0) & (high == 0)
    scales[is_empty], zero_points[is_empty] = 1.0, 0
    codes = np.rint(grouped / scales[:, None]) + zero_points[:, None]
    codes = np.clip(codes, lowest, highest).astype(np.int8)
    return codes.reshape(-1, outputs)[: weight.shape[0]], scales, zero_points


def dequantize_group_wise(
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    group_size: int,
    zero_points: NDArray[np.int8] | None = None,
) -> NDArray[np.float32]:
    """(codes[k, n] - zero_points[k // group_size, n]) * scales[k // group_size, n]. [K, N]"""
    group = np.arange(codes.shape[0]) // group_size
    values = codes.astype(np.float32)
    if zero_points is not None:
        values = values - zero_points[group].astype(np.float32)
    return np.asarray(values * scales[group])


def _grouped(weight: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    """[K, N] -> [G, g, N], a ragged last group filled with zeros."""
    reduction, outputs = weight.shape
    groups = -(-reduction // group_size)
    padded = np.zeros((groups * group_size, outputs), np.float32)
    padded[:reduction] = weight
    return padded.reshape(groups, group_size, outputs)


def _next_power(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2.0 ** np.ceil(np.log2(scale))
