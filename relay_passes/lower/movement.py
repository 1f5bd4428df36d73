"""Operators that only move data: codes pass through with their parameters.

    f(dq(q)) => dq(f(q))

Permutations cost nothing: only the record of the physical order changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import tvm
from tvm import relax

from .. import ir
from .context import Lowering
from .values import Concat, Constant, Dequantised, Many, QuantParams, Tensor, Value


def _source(ctx: Lowering, expr: tvm.ir.Expr) -> tuple[Tensor, Callable[[Tensor], Value]]:
    """The operand's tensor and how to wrap the result: codes stay codes."""
    value = ctx.value(expr)
    if isinstance(value, Dequantised):
        return value.codes, Dequantised
    return ctx.as_float(expr), lambda tensor: tensor


def _shape(expr: tvm.ir.Expr) -> tuple[int, ...] | None:
    """Result shape that type inference gives the original call."""
    return ir.shape_of(expr)


def reshape(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """reshape, flatten, squeeze, expand_dims."""
    shape = _shape(call)
    if shape is None:
        return None
    value = ctx.value(call.args[0])
    if isinstance(value, Constant):
        codes = value.codes.reshape(shape) if value.codes is not None else None
        array = value.array.reshape(shape)
        axis = _channel_axis(shape, value.scale)
        if axis is None:
            codes = None
        return replace(value, array=array, expr=relax.const(array), codes=codes, axis=axis or 0)
    data, wrap = _source(ctx, call.args[0])
    identity = ir.renormalise_perm(len(data.shape))
    if not data.is_native:
        data = ctx.permuted(data, identity, f"{name}.native")
    expr = ctx.reshape(data.expr, shape, name)
    return wrap(replace(data, expr=expr, shape=shape, perm=ir.renormalise_perm(len(shape))))


def _channel_axis(shape: tuple[int, ...], scale: np.ndarray | None) -> int | None:
    """Where a per-channel scale sits after a reshape: 0 when there is one scale, None when
    unclear."""
    if scale is None or scale.size == 1:
        return 0
    candidates = [axis for axis, dim in enumerate(shape) if dim == scale.size]
    return candidates[0] if len(candidates) == 1 else None


def permute_dims(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """A new logical order over the same memory."""
    value = ctx.value(call.args[0])
    source_shape = ir.shape_of(call.args[0])
    if source_shape is None:
        return None
    rank = len(source_shape)
    axes = call.attrs.axes
    order = [int(a) % rank for a in axes] if axes is not None else list(range(rank))[::-1]
    if isinstance(value, Constant):
        array = np.ascontiguousarray(value.array.transpose(order))
        codes = None if value.codes is None else np.ascontiguousarray(value.codes.transpose(order))
        return replace(
            value, array=array, expr=relax.const(array), codes=codes, axis=order.index(value.axis)
        )
    data, wrap = _source(ctx, call.args[0])
    perm = tuple(order.index(axis) for axis in data.perm)
    return wrap(replace(data, shape=tuple(data.shape[axis] for axis in order), perm=perm))


def concat(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """Equal parameters: codes are joined. Different ones: each part is rescaled when the result's
    parameters are known."""
    shape = _shape(call)
    parts = ctx.value(call.args[0])
    if not isinstance(parts, Many) or shape is None:
        return None
    axis = int(call.attrs.axis) % len(shape)
    if all(isinstance(part, Tensor) for part in parts.values):
        tensors = [part for part in parts.values if isinstance(part, Tensor)]
        if len({t.dtype for t in tensors}) == 1:
            return ctx.concatenated(tensors, axis, name)
    if not all(isinstance(part, Dequantised) for part in parts.values):
        return ctx.no("an operand is not quantised")
    codes = tuple(part.codes for part in parts.values if isinstance(part, Dequantised))
    if all(code.quant == codes[0].quant for code in codes):
        return Dequantised(ctx.concatenated(codes, axis, name))
    return Concat(codes, axis)


def split(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """Each part keeps the parameters."""
    data, wrap = _source(ctx, call.args[0])
    rank = len(data.shape)
    axis = int(call.attrs.axis) % rank
    size = data.shape[axis]
    sections = call.attrs.indices_or_sections
    if isinstance(sections, (int,)) or hasattr(sections, "value"):
        count = int(getattr(sections, "value", sections))
        step = -(-size // count)
        edges = [min(k * step, size) for k in range(count + 1)]
    else:
        edges = [0, *ir.ints(sections), size]
    parts = []
    for k, (begin, end) in enumerate(pairwise(edges)):
        expr = ctx.emit(
            relax.op.strided_slice(data.expr, [data.perm.index(axis)], [begin], [end]),
            f"{name}.{k}",
        )
        shape = tuple(end - begin if a == axis else dim for a, dim in enumerate(data.shape))
        parts.append(wrap(replace(data, expr=expr, shape=shape)))
    return Many(tuple(parts))


def _numbers(expr: tvm.ir.Expr) -> list[int] | None:
    """A tuple of integer immediates or a shape => ints."""
    fields = getattr(expr, "fields", None) or getattr(expr, "values", None)
    if fields is None:
        return None
    values = [getattr(field, "value", None) for field in fields]
    return [int(v) for v in values] if all(isinstance(v, int) for v in values) else None  # type: ignore[arg-type]


def strided_slice(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """Slices along logical axes => along physical ones."""
    shape = _shape(call)
    axes = _numbers(call.args[1])
    if shape is None or axes is None or isinstance(ctx.value(call.args[0]), Constant):
        return None
    data, wrap = _source(ctx, call.args[0])
    physical = [data.perm.index(axis % len(data.shape)) for axis in axes]
    new_axes = relax.Tuple([tvm.tirx.IntImm("int64", axis) for axis in physical])
    expr = ctx.emit(
        tvm.ir.Call(call.op, [data.expr, new_axes, *call.args[2:]], call.attrs, call.ty_args), name
    )
    return wrap(replace(data, expr=expr, shape=shape))


def pad(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """Constant padding; codes are padded with the code of the value."""
    shape = _shape(call)
    mode = str(getattr(call.attrs, "pad_mode", "constant"))
    if shape is None:
        return None
    if mode != "constant":
        return ctx.no(f"{mode} padding")
    value = float(getattr(call.attrs, "pad_value", 0.0))
    widths = ir.ints(call.attrs.pad_width)
    data, wrap = _source(ctx, call.args[0])
    code: float = value
    if data.quant is not None:
        low, high = data.quant.bounds
        exact = value / data.quant.scale + data.quant.zero_point
        if not low <= exact <= high or exact != round(exact):
            return ctx.no(f"padding value {value} has no code")
        code = round(exact)
    pairs = [widths[2 * axis : 2 * axis + 2] for axis in data.perm]
    flat = [width for pair in pairs for width in pair]
    expr = ctx.emit(relax.op.nn.pad(data.expr, flat, "constant", float(code)), name)
    return wrap(replace(data, expr=expr, shape=shape))


def resize2d(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """Nearest-neighbour resizing copies codes; other methods interpolate in float."""
    attrs, shape = call.attrs, _shape(call)
    layout = str(attrs.layout)
    if shape is None or set(layout) != set("NCHW"):
        return None
    data, wrap = _source(ctx, call.args[0])
    if data.quant is not None and str(attrs.method) != "nearest_neighbor":
        return ctx.no(f"{attrs.method} resizing")
    data = ctx.permuted(data, tuple(layout.index(x) for x in "NHWC"), f"{name}.nhwc")
    resized = relax.op.image.resize2d(
        data.expr, call.args[1], [float(x) for x in attrs.roi], "NHWC", str(attrs.method),
        str(attrs.coordinate_transformation_mode), str(attrs.rounding_method),
        float(attrs.cubic_alpha), int(attrs.cubic_exclude), float(attrs.extrapolation_value),
    )  # fmt: skip
    return wrap(replace(data, expr=ctx.emit(resized, name), shape=shape))


def as_it_is(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """Any other copying operator, on codes in their native order."""
    shape = _shape(call)
    value = ctx.value(call.args[0])
    if shape is None or not isinstance(value, Dequantised):
        return None
    identity = ir.renormalise_perm(len(value.codes.shape))
    data = ctx.permuted(value.codes, identity, f"{name}.native")
    rest = [ctx.native(argument) for argument in call.args[1:]]
    expr = ctx.emit(tvm.ir.Call(call.op, [data.expr, *rest], call.attrs, call.ty_args), name)
    return Dequantised(replace(data, expr=expr, shape=shape, perm=ir.renormalise_perm(len(shape))))


def take(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """Rows of a quantised table (an embedding): take(dq(w), i) => dq(take(w, i)); else as any
    copy."""
    table, axis, shape = ctx.value(call.args[0]), call.attrs.axis, _shape(call)
    if not isinstance(table, Constant) or table.codes is None or axis is None or shape is None:
        return as_it_is(ctx, name, call)
    assert table.scale is not None and table.zero_point is not None
    rank = table.codes.ndim
    axis = int(axis) % rank
    indices = ctx.native(call.args[1])

    def picked(array: np.ndarray, hint: str) -> tvm.ir.Expr:
        source = ir.array_const(array)
        if array.shape[axis] == 1:
            return source
        return ctx.emit(relax.op.take(source, indices, axis, str(call.attrs.mode)), hint)

    codes = picked(table.codes, f"{name}.codes")
    if table.scale.size == table.zero_point.size == 1:
        params = QuantParams(
            float(table.scale[0]), int(table.zero_point[0]), str(table.codes.dtype)
        )
        identity = ir.renormalise_perm(len(shape))
        return Dequantised(Tensor(codes, shape, str(table.codes.dtype), identity, params))
    # A scale per row or per column: the picked rows become floats, the table stays codes.
    aligned = [1] * rank
    aligned[table.axis] = -1
    value: tvm.ir.Expr = ctx.emit(relax.op.astype(codes, "float32"), f"{name}.values")
    if table.zero_point.any():
        zeros = np.broadcast_to(table.zero_point, table.scale.shape).astype(np.float32)
        shift = _like(ctx, picked(zeros.reshape(aligned), f"{name}.zeros"), axis, rank, shape, name)
        value = ctx.emit(relax.op.subtract(value, shift), f"{name}.centred")
    scales = _like(
        ctx, picked(table.scale.reshape(aligned), f"{name}.scales"), axis, rank, shape, name
    )
    expr = ctx.emit(relax.op.multiply(value, scales), name)
    return Tensor(expr, shape, "float32", ir.renormalise_perm(len(shape)))


def _like(
    ctx: Lowering, expr: tvm.ir.Expr, axis: int, rank: int, shape: tuple[int, ...], name: str
) -> tvm.ir.Expr:
    """Parameters of a table that has no picked axis yet get the axes that the indices have."""
    own = ir.shape_of(expr)
    assert own is not None
    extra = len(shape) - len(own)
    if not extra:
        return expr
    wanted = (*own[:axis], *(1,) * (extra + 1), *own[axis + 1 :])
    return ctx.reshape(expr, wanted, f"{name}.aligned")


HANDLERS = {
    **{
        f"relax.{name}": reshape
        for name in ("reshape", "squeeze", "expand_dims", "flatten", "nn.batch_flatten")
    },
    "relax.permute_dims": permute_dims,
    "relax.concat": concat,
    "relax.split": split,
    "relax.strided_slice": strided_slice,
    "relax.nn.pad": pad,
    "relax.take": take,
    "relax.image.resize2d": resize2d,
    **{
        f"relax.{name}": as_it_is
        for name in ("tile", "repeat", "flip", "broadcast_to", "gather_nd")
    },
}
