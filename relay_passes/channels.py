"""Weights of layers by channel: the ranges and the scaling of input and output channels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from .ir import op_name
from .quantize_weights import weight_layout


def output_ranges(weight: NDArray, call: relax.Call) -> NDArray[np.float64]:
    """The largest absolute weight of each output channel."""
    return np.abs(_outputs_first(weight, call)).max(axis=1).astype(np.float64)


def input_ranges(weight: NDArray, call: relax.Call) -> NDArray[np.float64]:
    """The largest absolute weight on each input channel, those of all groups in order."""
    return np.abs(_inputs_first(weight, call)).max(axis=(1, 3)).reshape(-1).astype(np.float64)


def scale_outputs(weight: NDArray, call: relax.Call, scales: NDArray) -> NDArray[np.float32]:
    """Each output channel times its scale."""
    axis = weight_layout(call).index("O")
    shape = [1] * weight.ndim
    shape[axis] = -1
    return (weight * scales.reshape(shape)).astype(np.float32)


def scale_inputs(weight: NDArray, call: relax.Call, scales: NDArray) -> NDArray[np.float32]:
    """The weights on each input channel times its scale."""
    layout, groups = weight_layout(call), _groups(call)
    inputs = scales.reshape(groups, 1, -1)  # [G, 1, I]
    outputs = weight.shape[layout.index("O")] // groups
    table = np.broadcast_to(inputs, (groups, outputs, inputs.shape[2]))
    table = table.reshape(groups * outputs, -1)  # [O, I]
    if layout.index("O") > layout.index("I"):
        table = table.T
    shape = [side if axis in "OI" else 1 for side, axis in zip(weight.shape, layout, strict=True)]
    return (weight * table.reshape(shape)).astype(np.float32)


def _groups(call: relax.Call) -> int:
    return 1 if op_name(call) == "relax.matmul" else int(call.attrs.groups)


def _outputs_first(weight: NDArray, call: relax.Call) -> NDArray:
    """[O, everything else]"""
    moved = np.moveaxis(weight, weight_layout(call).index("O"), 0)
    return moved.reshape(moved.shape[0], -1)


def _inputs_first(weight: NDArray, call: relax.Call) -> NDArray:
    """[G, O / G, I, kernel]"""
    layout, groups = weight_layout(call), _groups(call)
    order = "OI" + "".join(axis for axis in layout if axis not in "OI")
    moved = weight.transpose([layout.index(axis) for axis in order])
    return moved.reshape(groups, moved.shape[0] // groups, moved.shape[1], -1)
