"""2-D transposed convolution, NHWC: the convolution of the spread-out input with the turned kernel.

Values that the operator leaves out (between the spread inputs and around them) are `pad_value`, so
that `acc - pad_value * sum(w)` is the transposed convolution of `data - pad_value` everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .spec import Conv2dTransposeSpec
from .weights import decode_weight, kernel_attrs, weight_placeholders, weight_value

if TYPE_CHECKING:
    from tvm import te


def describe(spec: Conv2dTransposeSpec) -> tuple[list[te.Tensor], te.Tensor]:
    """TE description: arguments (data, weight, [scales, [zero_points]]) and the accumulators."""
    from tvm import te

    data = te.placeholder(spec.data_shape, spec.data_dtype, name="data")
    tensors = weight_placeholders(spec)
    spread = spread_out(spec, data)
    channels = spec.in_channels // spec.groups
    kh, kw = spec.kernel
    ky = te.reduce_axis((0, kh), name="ky")
    kx = te.reduce_axis((0, kw), name="kx")
    c = te.reduce_axis((0, channels), name="c")
    acc = te.compute(
        spec.output_shape,
        lambda b, y, x, o: te.sum(
            spread[
                b,
                y + (kh - 1 - ky) * spec.dilation[0],
                x + (kw - 1 - kx) * spec.dilation[1],
                o // spec.columns * channels + c,
            ].astype(spec.acc_dtype)
            * weight_value(spec, tensors, (ky, kx), c, o),
            axis=[ky, kx, c],
        ),
        name="conv2d_transpose",
        attrs=kernel_attrs(spec),
    )
    return [data, *tensors], acc


def spread_origin(spec: Conv2dTransposeSpec) -> tuple[int, int]:
    """Row and column of the spread-out array where the input's first value lies (may be
    negative)."""
    return (
        spec.dilation[0] * (spec.kernel[0] - 1) - spec.padding[0],
        spec.dilation[1] * (spec.kernel[1] - 1) - spec.padding[1],
    )


def spread_shape(spec: Conv2dTransposeSpec) -> tuple[int, int, int, int]:
    """Shape of the spread-out array: what a stride-1 convolution needs for the result."""
    return (
        spec.batch,
        spec.out_height + spec.dilation[0] * (spec.kernel[0] - 1),
        spec.out_width + spec.dilation[1] * (spec.kernel[1] - 1),
        spec.in_channels,
    )


def spread_out(spec: Conv2dTransposeSpec, data: te.Tensor) -> te.Tensor:
    """The input with strides - 1 times `pad_value` between its values and around it."""
    from tvm import te, tirx

    (top, left), (sh, sw) = spread_origin(spec), spec.strides

    def value(b: tirx.Var, y: tirx.Var, x: tirx.Var, c: tirx.Var) -> tirx.PrimExpr:
        # Shifted by a multiple of the stride so that // and % see no negative number.
        row, column = y - top + sh * spec.padding[0], x - left + sw * spec.padding[1]
        iy, ix = row // sh - spec.padding[0], column // sw - spec.padding[1]
        return tirx.if_then_else(
            tirx.all(
                row % sh == 0,
                column % sw == 0,
                iy >= 0,
                iy < spec.height,
                ix >= 0,
                ix < spec.width,
            ),
            data[b, iy, ix, c],
            tirx.const(spec.pad_value, spec.data_dtype),
        )

    return te.compute(spread_shape(spec), value, name="spread")


def reference(spec: Conv2dTransposeSpec, data: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    """The same in NumPy by scattering, the operator's usual definition, summed in float64."""
    groups, channels = spec.groups, spec.in_channels // spec.groups
    values = decode_weight(spec, *weights).reshape(groups, *spec.kernel, channels, spec.columns)
    (sh, sw), (dh, dw), (kh, kw) = spec.strides, spec.dilation, spec.kernel
    full = np.zeros(
        (
            spec.batch,
            (spec.height - 1) * sh + dh * (kh - 1) + 1 + spec.output_padding[0],
            (spec.width - 1) * sw + dw * (kw - 1) + 1 + spec.output_padding[1],
            groups,
            spec.columns,
        )
    )
    centred = data.astype(np.float64) - spec.pad_value
    grouped = centred.reshape(*data.shape[:3], groups, channels)
    for ky in range(kh):
        for kx in range(kw):
            for g in range(groups):
                full[
                    :,
                    ky * dh : ky * dh + (spec.height - 1) * sh + 1 : sh,
                    kx * dw : kx * dw + (spec.width - 1) * sw + 1 : sw,
                    g,
                ] += grouped[:, :, :, g] @ values[g, ky, kx]
    full += spec.pad_value * values.sum(axis=(1, 2, 3))
    top, left = spec.padding[:2]
    cut = full[:, top : top + spec.out_height, left : left + spec.out_width]
    return cut.reshape(spec.output_shape).astype(spec.acc_dtype)
