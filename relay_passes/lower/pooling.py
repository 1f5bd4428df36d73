"""Pooling and mean: maxima pass codes through, averages are integer sums with a rescale behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import tvm
from tvm import relax

from ...schedules.reduce import sum_axes, sum_pool2d
from .. import ir
from .context import Lowering
from .values import Accumulator, Dequantised, Tensor, Value


def _nhwc(layout: str) -> tuple[int, ...]:
    return tuple(layout.index(letter) for letter in "NHWC")


def _source(ctx: Lowering, call: tvm.ir.Call) -> tuple[Tensor, bool]:
    """The operand (codes when quantised) and whether it is codes."""
    value = ctx.value(call.args[0])
    if isinstance(value, Dequantised):
        return value.codes, True
    return ctx.as_float(call.args[0]), False


def max_pool2d(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """max_pool(dq(q)) => dq(max_pool(q)), channels last."""
    attrs = call.attrs
    layout = str(attrs.layout)
    if set(layout) != set("NCHW"):
        return ctx.no(f"layout {layout}")
    data, quantised = _source(ctx, call)
    data = ctx.permuted(data, _nhwc(layout), f"{name}.nhwc")
    pooled = relax.op.nn.max_pool2d(
        data.expr, ir.ints(attrs.pool_size), ir.ints(attrs.strides), ir.ints(attrs.padding),
        ir.ints(attrs.dilation), bool(attrs.ceil_mode), bool(attrs.count_include_pad), "NHWC",
    )  # fmt: skip
    expr = ctx.emit(pooled, name)
    physical = ir.shape_of(expr)
    assert physical is not None
    shape = tuple(physical["NHWC".index(letter)] for letter in layout)
    result = replace(data, expr=expr, shape=shape)
    return Dequantised(result) if quantised else result


def avg_pool2d(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """avg_pool(dq(q)) => (Σq - z*n) * s/n with n the number of averaged positions."""
    attrs = call.attrs
    layout = str(attrs.layout)
    if set(layout) != set("NCHW"):
        return ctx.no(f"layout {layout}")
    data, quantised = _source(ctx, call)
    if not quantised:
        data = ctx.permuted(data, _nhwc(layout), f"{name}.nhwc")
        averaged = _average(call, data.expr)
        shape = _logical(ir.shape_of(ctx.bb.normalize(averaged)), layout)
        return replace(data, expr=ctx.emit(averaged, name), shape=shape)
    assert data.quant is not None
    sums, counts = window_sums(ctx, name, call, data, data.quant.zero_point)
    # Every window sums pool positions; those outside hold the zero point, whose real value is 0.
    positions = int(np.prod(ir.ints(attrs.pool_size)))
    bias = np.array(-data.quant.zero_point * positions, np.int64)
    reach = np.array(positions * data.quant.span)
    scale = np.float64(data.quant.scale) / counts
    return Accumulator(sums, scale, bias, centre=bias, reach=reach)


def window_sums(
    ctx: Lowering, name: str, call: tvm.ir.Call, data: Tensor, pad_value: int
) -> tuple[Tensor, np.ndarray]:
    """(int32 sums of codes over the windows of an avg_pool2d, positions that each averages).

    Positions outside the data count as `pad_value`; the counts broadcast against the logical shape.
    """
    attrs = call.attrs
    layout = str(attrs.layout)
    pool, strides = ir.ints(attrs.pool_size), ir.ints(attrs.strides)
    padding, dilation = ir.ints(attrs.padding), ir.ints(attrs.dilation)
    data = ctx.permuted(data, _nhwc(layout), f"{name}.nhwc")
    physical = ir.shape_of(ctx.bb.normalize(_average(call, data.expr)))
    assert physical is not None
    height, width = data.physical_shape[1:3]
    include = bool(attrs.count_include_pad)
    rows = _counts(
        height, pool[0], strides[0], padding[0], padding[2], dilation[0], physical[1], include
    )
    columns = _counts(
        width, pool[1], strides[1], padding[1], padding[3], dilation[1], physical[2], include
    )
    counts = np.outer(rows, columns).astype(np.float64)  # [OH, OW]
    if np.all(counts == counts[0, 0]):
        counts = counts[:1, :1]
    counts = counts.reshape(1, *counts.shape, 1).transpose(["NHWC".index(x) for x in layout])
    func = sum_pool2d(
        data.physical_shape, data.dtype, pool, strides, padding, dilation,  # type: ignore[arg-type]
        physical[1:3], pad_value,  # type: ignore[arg-type]
    )  # fmt: skip
    expr = ctx.kernel(func, [data.expr], physical, "int32", f"{name}.sum", "sum_pool2d")
    return Tensor(expr, _logical(physical, layout), "int32", data.perm), counts


def _average(call: tvm.ir.Call, data: tvm.ir.Expr) -> tvm.ir.Call:
    """The pooling on channels-last data."""
    attrs = call.attrs
    return relax.op.nn.avg_pool2d(
        data, ir.ints(attrs.pool_size), ir.ints(attrs.strides), ir.ints(attrs.padding),
        ir.ints(attrs.dilation), bool(attrs.ceil_mode), bool(attrs.count_include_pad), "NHWC",
    )  # fmt: skip


def _logical(physical: tuple[int, ...] | None, layout: str) -> tuple[int, ...]:
    assert physical is not None
    return tuple(physical["NHWC".index(letter)] for letter in layout)


def _counts(
    size: int,
    pool: int,
    stride: int,
    before: int,
    after: int,
    dilation: int,
    out: int,
    include_pad: bool,
) -> np.ndarray:
    """Positions that each window averages along one axis."""
    starts = np.arange(out) * stride - before
    taps = starts[:, None] + np.arange(pool) * dilation
    low, high = (-before, size + after) if include_pad else (0, size)
    return ((taps >= low) & (taps < high)).sum(axis=1)


def pool1d(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """A 2-D pool of height 1."""
    attrs, shape = call.attrs, ir.shape_of(call.args[0])
    layout = str(attrs.layout)
    if shape is None or set(layout) != set("NCW"):
        return ctx.no(f"layout {layout}")
    is_max = ir.op_name(call) == "relax.nn.max_pool1d"
    data, quantised = _source(ctx, call)
    data = ctx.permuted(data, tuple(layout.index(x) for x in "NWC"), f"{name}.nwc")
    n, width, channels = data.physical_shape
    rows = ctx.reshape(data.expr, (n, 1, width, channels), f"{name}.rows")
    wide = replace(data, expr=rows, shape=(n, 1, width, channels), perm=(0, 1, 2, 3))
    image = relax.Var(f"{name}.image", relax.TensorType(list(wide.shape), wide.dtype))
    ctx.env[image] = Dequantised(wide) if quantised else wide
    pool = relax.op.nn.max_pool2d if is_max else relax.op.nn.avg_pool2d
    before, after = ir.ints(attrs.padding)
    plane = pool(
        image, (1, *ir.ints(attrs.pool_size)), (1, *ir.ints(attrs.strides)), (0, before, 0, after),
        (1, *ir.ints(attrs.dilation)), bool(attrs.ceil_mode), bool(attrs.count_include_pad), "NHWC",
    )  # fmt: skip
    value = (max_pool2d if is_max else avg_pool2d)(ctx, name, plane)

    def row(tensor: Tensor) -> Tensor:
        n, _, width, channels = tensor.physical_shape
        out = tuple({"N": n, "W": width, "C": channels}[letter] for letter in layout)
        expr = ctx.reshape(tensor.expr, (n, width, channels), f"{name}.row")
        return replace(tensor, expr=expr, shape=out, perm=data.perm)

    def constant(array: np.ndarray) -> np.ndarray:
        if np.ndim(array) < 4:
            return array
        return array[:, 0].transpose(np.argsort(data.perm))  # NHWC -> NWC -> the layout

    if isinstance(value, Accumulator):
        return replace(
            value, sums=row(value.sums), scale=constant(value.scale), bias=constant(value.bias)
        )
    if isinstance(value, Dequantised):
        return Dequantised(row(value.codes))
    return row(value) if isinstance(value, Tensor) else None


def adaptive_avg_pool2d(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """Global average pooling; other sizes when they divide the input."""
    layout = str(call.attrs.layout)
    shape = ir.shape_of(call.args[0])
    if shape is None or set(layout) != set("NCHW"):
        return ctx.no(f"layout {layout}")
    spatial = [layout.index("H"), layout.index("W")]
    wanted = call.attrs.output_size
    out = ir.ints(wanted) if wanted is not None else tuple(shape[axis] for axis in spatial)
    out = out * 2 if len(out) == 1 else out
    if out == (1, 1):
        return _mean(ctx, name, call, spatial, keepdims=True)
    sizes = [shape[axis] for axis in spatial]
    if any(size % o for size, o in zip(sizes, out, strict=True)):
        return ctx.no(f"adaptive pooling of {sizes} to {list(out)}")
    window = [size // o for size, o in zip(sizes, out, strict=True)]
    plain = relax.op.nn.avg_pool2d(call.args[0], window, window, 0, 1, False, False, layout)
    return avg_pool2d(ctx, name, plain)


def mean(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """mean(dq(q), axes) => (Σq - z*n) * s/n."""
    axes = _axes(call)
    return None if axes is None else _mean(ctx, name, call, axes, bool(call.attrs.keepdims))


def total(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """sum(dq(q), axes) => (Σq - z*n) * s."""
    axes, shape = _axes(call), ir.shape_of(call.args[0])
    if axes is None or shape is None or not isinstance(ctx.value(call.args[0]), Dequantised):
        return None
    value = _mean(ctx, name, call, axes, bool(call.attrs.keepdims))
    if not isinstance(value, Accumulator):
        return None
    count = float(np.prod([shape[axis] for axis in axes]))
    return replace(value, scale=value.scale * count)


def _axes(call: tvm.ir.Call) -> list[int] | None:
    shape = ir.shape_of(call.args[0])
    if shape is None:
        return None
    axis = call.attrs.axis
    return [int(a) % len(shape) for a in axis] if axis is not None else list(range(len(shape)))


def _mean(
    ctx: Lowering, name: str, call: tvm.ir.Call, axes: Sequence[int], keepdims: bool
) -> Value | None:
    data, quantised = _source(ctx, call)
    physical_axes = sorted(data.perm.index(axis) for axis in axes)
    if keepdims:
        shape = tuple(1 if axis in axes else dim for axis, dim in enumerate(data.shape))
        perm = data.perm
    else:
        kept = [axis for axis in range(len(data.shape)) if axis not in axes]
        shape = tuple(data.shape[axis] for axis in kept)
        perm = tuple(kept.index(axis) for axis in data.perm if axis in kept)
    if not quantised:
        expr = ctx.emit(relax.op.mean(data.expr, physical_axes, keepdims), name)
        return Tensor(expr, shape, data.dtype, perm)
    count = int(np.prod([data.shape[axis] for axis in axes]))
    assert data.quant is not None
    if count * max(abs(bound) for bound in data.quant.bounds) >= 2**31:
        return ctx.no(f"a sum of {count} codes may not fit int32")
    func = sum_axes(data.physical_shape, data.dtype, physical_axes, keepdims)
    physical = tuple(shape[axis] for axis in perm)
    expr = ctx.kernel(func, [data.expr], physical, "int32", f"{name}.sum", "sum")
    scale = np.array(np.float64(data.quant.scale) / count)
    bias = np.array(-data.quant.zero_point * count, np.int64)
    limit = np.array(count * max(abs(bound) for bound in data.quant.bounds))
    reach = np.array(count * data.quant.span)
    sums = Tensor(expr, shape, "int32", perm)
    return Accumulator(sums, scale, bias, limit=limit, centre=bias, reach=reach)


HANDLERS = {
    "relax.nn.max_pool2d": max_pool2d,
    "relax.nn.avg_pool2d": avg_pool2d,
    "relax.nn.max_pool1d": pool1d,
    "relax.nn.avg_pool1d": pool1d,
    "relax.nn.adaptive_avg_pool2d": adaptive_avg_pool2d,
    "relax.mean": mean,
    "relax.sum": total,
}
