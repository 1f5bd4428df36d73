"""Integer sums for pooling and mean; the division belongs to the requantisation behind them."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx

from .prim import REDUCE, make_prim_func


def sum_pool2d(
    shape: Sequence[int],
    dtype: str,
    pool: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    out_hw: tuple[int, int],
    pad_value: int,
) -> tirx.PrimFunc:
    """(codes NHWC) -> int32 sums [N, OH, OW, C]; positions outside count as `pad_value`.

    `padding` is (top, left, bottom, right); with ceil-mode windows may reach further, so the border
    test is against the data itself.
    """
    n, height, width, channels = shape
    x = te.placeholder(shape, dtype, name="x")
    ry, rx = te.reduce_axis((0, pool[0]), "ry"), te.reduce_axis((0, pool[1]), "rx")
    inside_everywhere = (
        padding == (0, 0, 0, 0)
        and (out_hw[0] - 1) * strides[0] + (pool[0] - 1) * dilation[0] < height
        and (out_hw[1] - 1) * strides[1] + (pool[1] - 1) * dilation[1] < width
    )

    def compute(b: tirx.Var, oy: tirx.Var, ox: tirx.Var, c: tirx.Var) -> tirx.PrimExpr:
        y = oy * strides[0] + ry * dilation[0] - padding[0]
        z = ox * strides[1] + rx * dilation[1] - padding[1]
        value = x[b, y, z, c].astype("int32")
        if not inside_everywhere:
            inside = tirx.all(y >= 0, y < height, z >= 0, z < width)
            value = tirx.if_then_else(inside, value, tirx.const(pad_value, "int32"))
        return te.sum(value, axis=[ry, rx])

    out = te.compute((n, *out_hw, channels), compute, name="sum_pool")
    return make_prim_func("sum_pool2d", [x], out, ["data"], REDUCE)


def sum_axes(
    shape: Sequence[int], dtype: str, axes: Sequence[int], keepdims: bool
) -> tirx.PrimFunc:
    """(codes) -> int32 sums over `axes`."""
    x = te.placeholder(shape, dtype, name="x")
    reduce = {axis: te.reduce_axis((0, shape[axis]), f"r{axis}") for axis in axes}
    kept = [axis for axis in range(len(shape)) if axis not in reduce]
    if keepdims:
        out_shape = [1 if axis in reduce else dim for axis, dim in enumerate(shape)]
    else:
        out_shape = [shape[axis] for axis in kept]

    def compute(*i: tirx.Var) -> tirx.PrimExpr:
        outer = dict(enumerate(i)) if keepdims else dict(zip(kept, i, strict=True))
        index = tuple(reduce.get(axis, outer.get(axis)) for axis in range(len(shape)))
        return te.sum(x[index].astype("int32"), axis=list(reduce.values()))

    out = te.compute(out_shape, compute, name="sum")
    return make_prim_func("sum", [x], out, ["data"], REDUCE)
