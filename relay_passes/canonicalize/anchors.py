"""What the canonical passes ask of an anchor: which axis of what is the output channel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr

from ..ir import op_name, shape_of

CONVOLUTIONS: dict[str, Callable[..., Expr]] = {
    "relax.nn.conv1d": relax.op.nn.conv1d,
    "relax.nn.conv2d": relax.op.nn.conv2d,
    "relax.nn.conv3d": relax.op.nn.conv3d,
}
TRANSPOSED: dict[str, Callable[..., Expr]] = {
    "relax.nn.conv1d_transpose": relax.op.nn.conv1d_transpose,
    "relax.nn.conv2d_transpose": relax.op.nn.conv2d_transpose,
    "relax.nn.conv3d_transpose": relax.op.nn.conv3d_transpose,
}
ANCHORS = frozenset({*CONVOLUTIONS, *TRANSPOSED, "relax.matmul"})


def is_anchor(expr: Expr) -> bool:
    """Whether an expression is a convolution, transposed convolution or matmul."""
    return op_name(expr) in ANCHORS


def channel_axis(anchor: Expr) -> int:
    """Axis of the output channels in an anchor's result."""
    rank = len(shape_of(anchor) or ())
    if op_name(anchor) == "relax.matmul":
        return rank - 1
    layout = str(anchor.attrs.out_layout or anchor.attrs.data_layout)
    return layout.index("C")


def per_channel(array: np.ndarray, anchor: Expr) -> np.ndarray | None:
    """A constant that broadcasts against an anchor's result, as one value a channel `[C]`.

    `None` when it varies along another axis or would make the result larger.
    """
    shape = shape_of(anchor)
    if shape is None or array.ndim > len(shape) or not shape:
        return None
    axis = channel_axis(anchor)
    aligned = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if any(size != 1 for i, size in enumerate(aligned.shape) if i != axis):
        return None
    if aligned.shape[axis] not in (1, shape[axis]):
        return None
    return np.broadcast_to(aligned.reshape(-1), (shape[axis],))


def broadcast_channels(values: np.ndarray, anchor: Expr) -> np.ndarray:
    """`[C]` => the shape that broadcasts against an anchor's result: `[C, 1, 1]` or `[C]`."""
    rank = len(shape_of(anchor) or ())
    axis = channel_axis(anchor)
    shape = [1] * rank
    shape[axis] = values.size
    return values.reshape(shape[axis:] if op_name(anchor) == "relax.matmul" else shape)


def scaled_weight(anchor: Expr, weight: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
    """`weight * scale` with one factor an output channel `[C]`; `None` when it has no such axis."""
    name = op_name(anchor)
    if name == "relax.matmul":
        return None if weight.ndim < 2 else weight * scale
    layout = str(anchor.attrs.kernel_layout)
    out_axis, in_axis = layout.index("O"), layout.index("I")
    groups = int(anchor.attrs.groups)
    if name in TRANSPOSED and groups > 1:  # [I, O/groups, ...]: group g owns a slice of both axes
        if weight.shape[out_axis] * groups != scale.size or in_axis != 0 or out_axis != 1:
            return None
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        factors = scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        return (split * factors).reshape(weight.shape)
    if weight.shape[out_axis] == scale.size:
        aligned = [1] * weight.ndim
        aligned[out_axis] = scale.size
        return weight * scale.reshape(aligned)
    return None


def with_weight(anchor: Expr, weight: Expr) -> Expr:
    """The same call on another weight."""
    return relax.Call(anchor.op, [anchor.args[0], weight], anchor.attrs, anchor.ty_args)


def with_data_and_padding(anchor: Expr, data: Expr, padding: list[int]) -> Expr:
    """The same convolution on other data with other padding (all begins, then all ends)."""
    attrs = anchor.attrs
    return CONVOLUTIONS[str(op_name(anchor))](
        data,
        anchor.args[1],
        strides=[int(s) for s in attrs.strides],
        padding=padding,
        dilation=[int(d) for d in attrs.dilation],
        groups=int(attrs.groups),
        data_layout=str(attrs.data_layout),
        kernel_layout=str(attrs.kernel_layout),
        out_layout=str(attrs.out_layout) or None,
        out_dtype=_dtype(attrs.out_dtype),
    )


def _dtype(dtype: tvm.DataType | None) -> str | None:
    text = "" if dtype is None else str(dtype)
    return text if text not in ("", "void") else None
