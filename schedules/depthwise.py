"""Depthwise 2-D convolution, NHWC: each input channel has `multiplier` output channels of its own.

acc[b, y, x, o] = sum over ky, kx of data[b, y*s+ky*d, x*s+kx*d, o // multiplier] * w[ky, kx, 0, o]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .conv2d import pad
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
    ky = te.reduce_axis((0, spec.kernel[0]), name="ky")
    kx = te.reduce_axis((0, spec.kernel[1]), name="kx")
    acc = te.compute(
        spec.output_shape,
        lambda b, y, x, o: te.sum(
            padded[
                b,
                y * spec.strides[0] + ky * spec.dilation[0],
                x * spec.strides[1] + kx * spec.dilation[1],
                o // spec.columns,
            ].astype(spec.acc_dtype)
            * weight_value(spec, tensors, (ky, kx), 0, o),
            axis=[ky, kx],
        ),
        name="depthwise",
        attrs=kernel_attrs(spec),
    )
    return [data, *tensors], acc


def reference(spec: Conv2dSpec, data: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    """The same in NumPy, summed in float64."""
    values = decode_weight(spec, *weights)[:, :, :]  # [C, kh*kw, m]
    top, left, bottom, right = spec.padding
    padded = np.pad(
        data.astype(np.float64),
        ((0, 0), (top, bottom), (left, right), (0, 0)),
        constant_values=spec.pad_value,
    )
    acc = np.zeros((*spec.output_shape[:3], spec.groups, spec.columns))
    for ky in range(spec.kernel[0]):
        for kx in range(spec.kernel[1]):
            y, x = ky * spec.dilation[0], kx * spec.dilation[1]
            window = padded[
                :,
                y : y + (spec.out_height - 1) * spec.strides[0] + 1 : spec.strides[0],
                x : x + (spec.out_width - 1) * spec.strides[1] + 1 : spec.strides[1],
            ]
            acc += window[..., None] * values[:, ky * spec.kernel[1] + kx]
    return acc.reshape(spec.output_shape).astype(spec.acc_dtype)
