"""Clip, Gather, Pad and Tile as Relax operators.

TVM's own converters emit raw TIR for some of them, and a gather that reads outside its table.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ...relay_passes.ir import array_const, constant, dtype_of, shape_of


def clip(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> tvm.ir.Expr:
    """Clip with constant bounds => `R.clip`; one-sided => `R.maximum` / `R.minimum`."""
    x = inputs[0]
    dtype = dtype_of(x)
    if opset < 11:
        low: Any = attributes.get("min", -math.inf)
        high: Any = attributes.get("max", math.inf)
    else:
        low, high = (_bound(inputs[i]) for i in (1, 2))
    if isinstance(low, tvm.ir.Expr) or isinstance(high, tvm.ir.Expr):
        for bound, operator in ((low, relax.op.maximum), (high, relax.op.minimum)):
            if bound is not None:
                x = operator(
                    x, bound if isinstance(bound, tvm.ir.Expr) else relax.const(bound, dtype)
                )
        return x
    low = None if low is None or math.isnan(low) or low == -math.inf else low
    high = None if high is None or math.isnan(high) or high == math.inf else high
    if low == 0 and high is None and dtype.startswith("float"):
        return relax.op.nn.relu(x)
    if low is not None and high is not None:
        return relax.op.clip(x, low, high)
    if low is not None:
        return relax.op.maximum(x, relax.const(low, dtype))
    if high is not None:
        return relax.op.minimum(x, relax.const(high, dtype))
    return x


def _bound(expr: tvm.ir.Expr | None) -> Any:
    if expr is None:
        return None
    array = constant(expr)
    return expr if array is None else array.reshape(-1)[0].item()


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def pad(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> tvm.ir.Expr:
    """Pad with constant widths => `R.nn.pad`; negative widths crop first."""
    x = inputs[0]
    shape = shape_of(x)
    if shape is None:
        raise ValueError("the input's shape is not known")
    mode = attributes.get("mode", b"constant").decode()
    if mode not in _PAD_MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(_PAD_MODES)}")
    if opset < 11:
        widths = np.array(attributes.get("pads", attributes.get("paddings")))
        value = float(attributes.get("value", 0.0))
    else:
        given = constant(inputs[1])
        if given is None:
            raise ValueError("the pad widths depend on an input value; pass it with --input-value")
        widths = given.reshape(-1)
        value = 0.0
        if inputs[2] is not None:
            fill = constant(inputs[2])
            if fill is None:
                raise ValueError("the pad value is not a constant")
            value = fill.reshape(-1)[0].item()
        if inputs[3] is not None:
            axes = constant(inputs[3])
            if axes is None:
                raise ValueError("the padded axes are not constant")
            full = np.zeros((2, len(shape)), "int64")
            full[:, axes % len(shape)] = widths.reshape(2, -1)
            widths = full.reshape(-1)
    before, after = widths.reshape(2, -1).tolist()
    if len(before) != len(shape):
        raise ValueError(f"{len(before)} pad widths for {len(shape)} dimensions")
    if min(before + after) < 0:
        begin = [max(-w, 0) for w in before]
        end = [size - max(-w, 0) for size, w in zip(shape, after, strict=True)]
        x = bb.emit(relax.op.strided_slice(x, list(range(len(shape))), begin, end))
        before, after = ([max(w, 0) for w in side] for side in (before, after))
    flat = [int(w) for pair in zip(before, after, strict=True) for w in pair]
    return relax.op.nn.pad(x, flat, _PAD_MODES[mode], value)


def gather(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> tvm.ir.Expr:
    """Gather => `R.take` that stays inside the table; one constant position => a slice."""
    x, indices = inputs[0], inputs[1]
    shape = shape_of(x)
    if shape is None:
        raise ValueError("the input's shape is not known")
    axis = attributes.get("axis", 0) % len(shape)
    known = constant(indices)
    if known is not None:
        if known.size and (known.min() < -shape[axis] or known.max() >= shape[axis]):
            raise ValueError(f"an index lies outside the axis of size {shape[axis]}")
        known = np.where(known < 0, known + shape[axis], known).astype(known.dtype)
        if known.ndim == 0:
            position = int(known)
            piece = relax.op.strided_slice(x, [axis], [position], [position + 1])
            return relax.op.reshape(piece, shape[:axis] + shape[axis + 1 :])
        return relax.op.take(x, array_const(known), axis, mode="clip")
    if dtype_of(indices).startswith("int"):  # negative ones count from the end
        limit = array_const(np.array(shape[axis], dtype_of(indices)))
        zero = array_const(np.array(0, dtype_of(indices)))
        from_end = relax.op.add(indices, limit)
        indices = relax.op.where(relax.op.less(indices, zero), from_end, indices)
    return relax.op.take(x, indices, axis, mode="clip")


def tile(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> tvm.ir.Expr:
    """Tile with constant repeats => `R.tile`."""
    repeats = constant(inputs[1])
    if repeats is None:
        raise ValueError("the repeats depend on an input value; pass it with --input-value")
    return relax.op.tile(inputs[0], [int(r) for r in repeats])
