"""What a layer's kernel computes, read off its call: as it stands in graph form, float32."""

from __future__ import annotations

from math import prod
from typing import Any

import tvm

from ..schedules import Conv2dSpec, MatmulSpec, SpecError
from . import ir

LayerSpec = Conv2dSpec | MatmulSpec


def layer_spec(call: tvm.ir.Call) -> LayerSpec | None:
    """The float kernel of a conv1d, conv2d or matmul call, its weight constant or computed.

    A conv1d is a conv2d of height 1, a linear layer a product of all its rows. `None` for other
    operators (transposed convolutions too), weights with a batch axis, and shapes that are not
    known.
    """
    name = ir.op_name(call)
    if name == "relax.matmul":
        left, right = ir.shape_of(call.args[0]), ir.shape_of(call.args[1])
        if left is None or right is None or len(right) != 2 or len(left) < 2:
            return None
        return MatmulSpec(**matmul_sizes(left, right))
    if name not in ("relax.nn.conv1d", "relax.nn.conv2d"):
        return None
    if None in (ir.shape_of(call.args[0]), ir.shape_of(call.args[1])):
        return None
    if not has_known_layout(call):
        return None
    try:
        return Conv2dSpec(**conv_sizes(call))
    except SpecError:
        return None  # nothing is left of the input


def matmul_sizes(left: tuple[int, ...], right: tuple[int, ...]) -> dict[str, Any]:
    """Sizes in a `MatmulSpec` of [.., M, K] x [K, N]."""
    return {"rows": prod(left[:-1]), "in_features": left[-1], "out_features": right[1]}


def has_known_layout(call: tvm.ir.Call) -> bool:
    """Whether data and weight of a convolution are plain tensors, in any order of axes, and the
    result is like the data."""
    attrs = call.attrs
    layout, kernel_layout = str(attrs.data_layout), str(attrs.kernel_layout)
    space = spatial_axes(call)
    return (
        sorted(layout) == sorted(f"NC{space}")
        and sorted(kernel_layout) == sorted(f"OI{space}")
        and str(attrs.out_layout or layout) == layout
    )


def spatial_axes(call: tvm.ir.Call) -> str:
    """The axes that the window of a convolution moves along."""
    return "W" if "1d" in (ir.op_name(call) or "") else "HW"


def conv_sizes(call: tvm.ir.Call) -> dict[str, Any]:
    """Sizes in a `Conv2dSpec` or `Conv2dTransposeSpec` of a convolution whose layout and shapes
    are known."""
    attrs = call.attrs
    data_shape, weight_shape = ir.shape_of(call.args[0]), ir.shape_of(call.args[1])
    assert data_shape is not None and weight_shape is not None
    data = {"H": 1, **dict(zip(str(attrs.data_layout), data_shape, strict=True))}
    weight = {"H": 1, **dict(zip(str(attrs.kernel_layout), weight_shape, strict=True))}
    strides, dilation, padding = map(ir.ints, (attrs.strides, attrs.dilation, attrs.padding))
    if spatial_axes(call) == "W":
        strides, dilation = (1, *strides), (1, *dilation)
        padding = (0, padding[0], 0, padding[1])
    groups = int(attrs.groups)
    # Weights of transposed convolutions are [I, O / groups, ..].
    outputs = weight["O"] * (groups if "transpose" in (ir.op_name(call) or "") else 1)
    return {
        "batch": data["N"], "height": data["H"], "width": data["W"], "in_channels": data["C"],
        "out_channels": outputs, "kernel": (weight["H"], weight["W"]), "strides": strides,
        "padding": padding, "dilation": dilation, "groups": groups,
    }  # fmt: skip
