"""2-D convolution, NHWC: acc[b, y, x, o] = sum over ky, kx, c of data[b, y*s+ky*d, x*s+kx*d, c] *
w[ky, kx, c, o].

The naive description is the specification. Grouped convolutions are included; a depthwise one has
its own file, with the loops in the order that suits it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .spec import Conv2dSpec
from .weights import decode_weight, kernel_attrs, weight_placeholders, weight_value

if TYPE_CHECKING:
    from tvm import te


def describe(spec: Conv2dSpec) -> tuple[list[te.Tensor], te.Tensor]:
    """TE description: arguments (data, weight, [scales, [zero_points]]) and the accumulators."""
    from tvm import te

    data = te.placeholder(spec.data_shape, spec.data_dtype, name="data")
    tensors = weight_placeholders(spec)
    padded = pad(data, spec.padding, spec.pad_value)
    channels = spec.in_channels // spec.groups
    ky = te.reduce_axis((0, spec.kernel[0]), name="ky")
    kx = te.reduce_axis((0, spec.kernel[1]), name="kx")
    c = te.reduce_axis((0, channels), name="c")
    acc = te.compute(
        spec.output_shape,
        lambda b, y, x, o: te.sum(
            padded[
                b,
                y * spec.strides[0] + ky * spec.dilation[0],
                x * spec.strides[1] + kx * spec.dilation[1],
                o // spec.columns * channels + c,
            ].astype(spec.acc_dtype)
            * weight_value(spec, tensors, (ky, kx), c, o),
            axis=[ky, kx, c],
        ),
        name="conv2d",
        attrs=kernel_attrs(spec),
    )
    return [data, *tensors], acc


def pad(data: te.Tensor, padding: tuple[int, int, int, int], value: int) -> te.Tensor:
    """NHWC data with `value` around it; `data` itself when nothing is to be added."""
    from tvm import te, tirx

    if not any(padding):
        return data
    batch, height, width, channels = (int(n) for n in data.shape)
    top, left, bottom, right = padding
    return te.compute(
        (batch, height + top + bottom, width + left + right, channels),
        lambda b, y, x, c: tirx.if_then_else(
            tirx.all(y >= top, y < top + height, x >= left, x < left + width),
            data[b, y - top, x - left, c],
            tirx.const(value, data.dtype),
        ),
        name="pad",
    )


def reference(spec: Conv2dSpec, data: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    """The same in NumPy, summed in float64 (exact for the integer dtypes here: sums stay below
    2**53)."""
    groups, channels = spec.groups, spec.in_channels // spec.groups
    values = decode_weight(spec, *weights).reshape(groups, *spec.kernel, channels, spec.columns)
    top, left, bottom, right = spec.padding
    padded = np.pad(
        data.astype(np.float64),
        ((0, 0), (top, bottom), (left, right), (0, 0)),
        constant_values=spec.pad_value,
    )
    acc = np.zeros((*spec.output_shape[:3], groups, spec.columns))
    rows, columns = spec.out_height, spec.out_width
    for ky in range(spec.kernel[0]):
        for kx in range(spec.kernel[1]):
            y, x = ky * spec.dilation[0], kx * spec.dilation[1]
            window = padded[
                :,
                y : y + (rows - 1) * spec.strides[0] + 1 : spec.strides[0],
                x : x + (columns - 1) * spec.strides[1] + 1 : spec.strides[1],
            ].reshape(spec.batch, rows, columns, groups, channels)
            for g in range(groups):
                acc[:, :, :, g] += window[:, :, :, g] @ values[g, ky, kx]
    return acc.reshape(spec.output_shape).astype(spec.acc_dtype)
