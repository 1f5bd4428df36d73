"""Affine quantisation of numbers: real = scale * (integer - zero_point).

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 2.1; power-of-two scales are the dynamic fixed point of
Courbariaux et al. 2014, "Training deep neural networks with low precision multiplications".
Zero is always one of the representable numbers, because padding and ReLU produce it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

INTEGER_RANGES: dict[str, tuple[int, int]] = {
    "int4": (-8, 7),
    "int5": (-16, 15),
    "int6": (-32, 31),
    "int7": (-64, 63),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
}

# The product of two scales (activation * weight) must stay a normal float32 (>= 2**-126).
SMALLEST_SCALE = 2.0**-60


@dataclass(frozen=True, eq=False)
class QuantizationParameters:
    """How real numbers map to integers: `scale` float32 and `zero_point` int32, both of one shape.

    Both are scalars (`axis` None) or vectors along `axis`. `lowest` and `highest` bound the
    integers; they are the range of `dtype` except for narrow (sign-symmetric) ranges.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    dtype: str
    axis: int | None
    lowest: int
    highest: int

    @property
    def storage_dtype(self) -> str:
        """The NumPy dtype that holds one integer unpacked; fewer bits live in int8."""
        return "int8" if self.dtype in ("int4", "int5", "int6", "int7") else self.dtype


def choose_parameters(
    low: ArrayLike,
    high: ArrayLike,
    dtype: str,
    *,
    symmetric: bool,
    narrow: bool = False,
    power_of_two: bool = False,
    axis: int | None = None,
) -> QuantizationParameters:
    """The parameters whose grid covers [`low`, `high`] and holds zero exactly.

    `low` and `high` are scalars or vectors (one range for each slice along `axis`). A symmetric
    grid has its zero point at 0; for an unsigned type at 0 when no range is negative, else at the
    middle. `narrow` leaves out the most negative integer, so that the grid is its own mirror image.
    `power_of_two` rounds every scale up to a power of two (nothing is clipped by it). An empty
    range (all zero) gets the scale 1. Raises `ValueError` for NaN, infinity or low > high.
    """
    if dtype not in INTEGER_RANGES:
        raise ValueError(f"no integer type {dtype!r}; choose from {', '.join(INTEGER_RANGES)}")
    bottom, top = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if not (np.isfinite(bottom).all() and np.isfinite(top).all()):
        raise ValueError("a range is not finite; the data hold NaN or infinity")
    if (bottom > top).any():
        raise ValueError(f"empty range: low {bottom} > high {top}")
    bottom, top = np.minimum(bottom, 0.0), np.maximum(top, 0.0)
    lowest, highest = INTEGER_RANGES[dtype]
    if narrow and lowest < 0:
        lowest = -highest

    middle = 0 if lowest < 0 or not (bottom < 0).any() else 128
    if symmetric:
        scale = top / (highest - middle)
        if lowest < middle:
            scale = np.maximum(scale, bottom / (lowest - middle))
    else:
        scale = (top - bottom) / (highest - lowest)
    is_empty = top == bottom
    scale = np.where(is_empty, 1.0, np.maximum(scale, SMALLEST_SCALE))
    if power_of_two:
        scale = 2.0 ** np.ceil(np.log2(scale))
    single = scale.astype(np.float32)

    zero_point = np.full(single.shape, middle, np.int32)
    if not symmetric:
        nearest = np.clip(np.rint(lowest - bottom / single), lowest, highest)
        zero_point = np.where(is_empty, max(lowest, 0), nearest).astype(np.int32)
    return QuantizationParameters(single, zero_point, dtype, axis, lowest, highest)


def _along(axis: int | None, rank: int, values: NDArray) -> NDArray:
    """[C] -> [1, .., C, .., 1] with C at `axis` of `rank` axes; scalars pass."""
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * rank
    shape[axis] = values.shape[0]
    return values.reshape(shape)


def quantize_affine(x: NDArray[np.float32], parameters: QuantizationParameters) -> NDArray:
    """clip(round_half_even(x / scale) + zero_point), as `relax.quantize` computes it in float32."""
    scale = _along(parameters.axis, x.ndim, parameters.scale)
    zero_point = _along(parameters.axis, x.ndim, parameters.zero_point)
    integers = np.rint(np.asarray(x, np.float32) / scale) + zero_point
    return np.clip(integers, parameters.lowest, parameters.highest).astype(parameters.storage_dtype)


def dequantize_affine(integers: NDArray, parameters: QuantizationParameters) -> NDArray[np.float32]:
    """scale * (integer - zero_point) in float32, as `relax.dequantize` computes it."""
    scale = _along(parameters.axis, integers.ndim, parameters.scale)
    zero_point = _along(parameters.axis, integers.ndim, parameters.zero_point)
    return (integers.astype(np.int32) - zero_point).astype(np.float32) * scale
