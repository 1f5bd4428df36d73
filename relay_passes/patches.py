"""Layers as matrices: which patches of its input a layer multiplies with which rows of its
weight."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from .ir import ints, op_name
from .numerics.moments import PatchShape


def patch_shape(call: relax.Call, weight_shape: tuple[int, ...]) -> PatchShape | None:
    """How `call` cuts its input; `None` for transposed convolutions and batched weights."""
    name = op_name(call)
    if name == "relax.matmul":
        return PatchShape() if len(weight_shape) == 2 else None
    if name not in ("relax.nn.conv1d", "relax.nn.conv2d"):
        return None
    attributes = call.attrs
    padding = ints(attributes.padding)
    axes = len(padding) // 2
    layout = str(attributes.kernel_layout)
    kernel = tuple(
        side for side, axis in zip(weight_shape, layout, strict=True) if axis not in "OI"
    )
    return PatchShape(
        kernel=kernel,
        strides=ints(attributes.strides),
        dilation=ints(attributes.dilation),
        padding=tuple((padding[i], padding[i + axes]) for i in range(axes)),
        groups=int(attributes.groups),
    )


def channels_first(x: NDArray, call: relax.Call) -> NDArray:
    """A layer's input as [N, C, *spatial]; of a matmul as [rows, C]."""
    if op_name(call) == "relax.matmul":
        return x.reshape(-1, x.shape[-1])
    layout = str(call.attrs.data_layout)
    order = "NC" + "".join(axis for axis in layout if axis not in "NC")
    return x.transpose([layout.index(axis) for axis in order])


def outputs_by_patch(y: NDArray, call: relax.Call) -> NDArray:
    """A layer's output as [groups, N, *positions, O // groups], of a matmul as [1, rows, O]:
    positions in the order of `moments.extract_patches`."""
    if op_name(call) == "relax.matmul":
        return y.reshape(1, -1, y.shape[-1])
    layout, groups = str(call.attrs.out_layout or call.attrs.data_layout), int(call.attrs.groups)
    spatial = "".join(axis for axis in str(call.attrs.data_layout) if axis not in "NC")
    rows = y.transpose([layout.index(axis) for axis in f"N{spatial}C"])
    return np.moveaxis(rows.reshape(*rows.shape[:-1], groups, -1), -2, 0)


def weight_matrix(weight: NDArray, call: relax.Call) -> NDArray:
    """A weight as [groups, O // groups, K], K in the order of `moments.extract_patches`."""
    if op_name(call) == "relax.matmul":
        return weight.T[None]  # [K, O] -> [1, O, K]
    layout, groups = str(call.attrs.kernel_layout), int(call.attrs.groups)
    order = "O" + "".join(axis for axis in layout if axis not in "OI") + "I"
    rows = weight.transpose([layout.index(axis) for axis in order])  # [O, *kernel, I]
    outputs = rows.shape[0]
    return np.ascontiguousarray(rows).reshape(groups, outputs // groups, -1)


def weight_of_matrix(matrix: NDArray, call: relax.Call, shape: tuple[int, ...]) -> NDArray:
    """Inverse of `weight_matrix`: [groups, O // groups, K] => the weight of `shape`."""
    if op_name(call) == "relax.matmul":
        return np.ascontiguousarray(matrix[0].T)
    layout = str(call.attrs.kernel_layout)
    order = "O" + "".join(axis for axis in layout if axis not in "OI") + "I"
    rows = matrix.reshape([shape[layout.index(axis)] for axis in order])
    return np.ascontiguousarray(rows.transpose([order.index(axis) for axis in layout]))
