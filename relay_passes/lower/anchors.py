"""Convolutions and matrix products.

    conv2d(dq(x), dq(w)) => (Σ x*w - z_x*Σw) * s_x*s_w       exact integers

The kernel sums raw codes with the input's zero point as padding; `- z_x*Σw` joins the bias. Data
goes channels-last. The accumulator is int32 when the weights prove that no sum can leave it, else
int64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from ...schedules import BatchMatmulSpec, Conv2dSpec, Conv2dTransposeSpec, MatmulSpec, prim_func
from ...schedules.prim import ROLES_ATTR
from .. import ir
from ..encodings import FourBit, GroupWise, kernel_order
from ..layer_spec import conv_sizes, has_known_layout, matmul_sizes, spatial_axes
from .context import QUANTISED, Lowering
from .values import Accumulator, Constant, Dequantised, QuantParams, Tensor, Value

# The bias and the zero-point term are added behind the sum, and checked there.
INT32_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Weight:
    """A constant weight in kernel order: values or codes [.., K.., N], channels last.

    `scale` is one float per output channel (or one in all) to be applied behind the sum; group-wise
    encodings carry `group_scales` [K/g, N] that the kernel applies: floats with float data, whole
    numbers (`multiples`) with integers. `integers` [K, N] are what 4-bit codes stand for there.
    """

    values: np.ndarray
    dtype: str
    scale: np.ndarray | None = None
    zero_point: int = 0
    group_size: int = 0
    group_scales: np.ndarray | None = None
    group_zero_points: np.ndarray | None = None
    multiples: np.ndarray | None = None
    tables: np.ndarray | None = None
    table_channels: int = 0
    integers: np.ndarray | None = None

    @property
    def has_integers(self) -> bool:
        """Whether a sum of integers has one scale for each output channel."""
        return self.scale is not None and self.group_scales is None

    def centred(self) -> np.ndarray:
        """Codes less their zero point, or what they stand for, int64 [.., N]."""
        if self.integers is not None:
            return self.integers
        return self.values.astype(np.int64) - self.zero_point


def to_kernel_order(array: np.ndarray, layout: str, wanted: str) -> np.ndarray:
    """Transpose a weight by the letters of its layout."""
    return np.ascontiguousarray(array.transpose([layout.index(letter) for letter in wanted]))


def weight_of(ctx: Lowering, expr: tvm.ir.Expr, layout: str, wanted: str) -> Weight | None:
    """The constant weight of an anchor in `wanted` order; None when it is not constant."""
    constant = ctx.value(expr)
    if not isinstance(constant, Constant):
        return None
    if isinstance(constant.encoding, FourBit):
        return _four_bit_weight(constant.encoding, layout, wanted)
    if constant.encoding is not None:
        return _group_weight(constant.encoding, layout, wanted)
    codes, scale, zero_point = constant.codes, constant.scale, constant.zero_point
    usable = (
        codes is not None
        and scale is not None
        and zero_point is not None
        and str(codes.dtype) in ("int8", "uint8", "int16")
        and (scale.size == 1 or layout[constant.axis] == "O")
        and (zero_point.size == 1 or layout[constant.axis] == "O")
    )
    if not usable:
        values = to_kernel_order(constant.array.astype(np.float32), layout, wanted)
        return Weight(values, "float32")
    assert codes is not None and zero_point is not None
    ordered = to_kernel_order(codes, layout, wanted)
    if np.any(zero_point != zero_point.flat[0]):
        # A zero point per channel: centred codes need one bit more.
        centred = ordered.astype(np.int64) - zero_point.astype(np.int64)  # [.., O] - [O]
        if np.abs(centred).max() > np.iinfo(np.int16).max:
            return Weight(
                to_kernel_order(constant.array.astype(np.float32), layout, wanted), "float32"
            )
        return Weight(centred.astype(np.int16), "int16", scale)
    return Weight(ordered, str(codes.dtype), scale, int(zero_point.flat[0]))


def _group_weight(encoding: GroupWise, layout: str, wanted: str) -> Weight | None:
    """Group-wise codes stay as they are stored: int4 flat, int8 in the kernel's own shape."""
    if encoding.layout != layout or kernel_order(layout) != wanted:
        return None
    values = encoding.stored
    if encoding.dtype == "int8":
        values = values.reshape([encoding.shape[layout.index(letter)] for letter in wanted])
    return Weight(
        values, encoding.dtype, np.ones(1, np.float32), 0, encoding.group_size,
        encoding.scales, encoding.zero_points,
    )  # fmt: skip


def _four_bit_weight(encoding: FourBit, layout: str, wanted: str) -> Weight | None:
    """Codes, tables and multiples as they are stored."""
    if encoding.layout != layout or kernel_order(layout) != wanted:
        return None
    return Weight(
        encoding.stored, "int4", encoding.scales, group_size=encoding.group_size,
        multiples=encoding.multiples, tables=encoding.tables,
        table_channels=encoding.table_channels, integers=encoding.integers(),
    )  # fmt: skip


def _opened(weight: Weight, shape: tuple[int, ...], integer: bool) -> Weight | None:
    """The same weight for kernels that read no 4-bit integers: bytes [.., O] where their values fit
    one, else floats; `shape` is the kernel's order."""
    if weight.integers is None or weight.scale is None:
        return weight
    if integer and weight.multiples is None:
        return Weight(weight.integers.astype(np.int8).reshape(shape), "int8", weight.scale)
    if integer:
        return None
    values = weight.integers.astype(np.float32) * weight.scale
    return Weight(values.reshape(shape), "float32")


def largest_sums(largest: int, weight: Weight) -> np.ndarray:
    """max|x| * Σ|w| for each output channel, for |x| up to `largest`: no sum can be larger."""
    centred = weight.centred()
    return np.asarray(largest * np.abs(centred).sum(axis=tuple(range(centred.ndim - 1))))


def largest_code(dtype: str) -> int:
    """max|x| of a dtype."""
    info = np.iinfo(dtype)
    return max(abs(int(info.min)), int(info.max))


def accumulator_dtype(limit: np.ndarray) -> str:
    """int32 when the sums provably fit, else int64."""
    return "int32" if int(limit.max()) <= INT32_LIMIT else "int64"


def _note_float(ctx: Lowering, name: str, call: tvm.ir.Call, source: Value, integer: bool) -> None:
    """List a layer that computes in float though its input was quantised."""
    if not integer and isinstance(source, QUANTISED):
        ctx.leave_float(name, call, "its weight or its input is not in integers")


def _scale_bias(
    data: Tensor, weight: Weight, channel_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Real scale s_x*s_w and the constant -z_x*Σw, both per output channel."""
    assert data.quant is not None and weight.scale is not None
    centred = weight.centred()
    scale = np.float64(data.quant.scale) * weight.scale.astype(np.float64)
    bias = -data.quant.zero_point * centred.sum(axis=tuple(range(centred.ndim - 1)))
    return (
        scale.reshape(channel_shape if scale.size > 1 else (1,) * len(channel_shape)),
        bias.reshape(channel_shape),
    )


def _factors(weight: Weight) -> list[tuple[str, np.ndarray]]:
    """Role and array of everything that a kernel reads besides codes."""
    factors = [
        ("table", weight.tables),
        ("scales", weight.multiples),
        ("scales", weight.group_scales),
        ("scales", weight.group_zero_points),
    ]
    return [(role, array) for role, array in factors if array is not None]


def _with_roles(func: tirx.PrimFunc, weight: Weight) -> tirx.PrimFunc:
    if ROLES_ATTR in func.attrs:
        return func
    roles = ["data", "weights", *(role for role, _ in _factors(weight))]
    return func.with_attr(ROLES_ATTR, roles)


def _arguments(data: tvm.ir.Expr, weight: Weight) -> list[tvm.ir.Expr | np.ndarray]:
    return [data, weight.values, *(array for _, array in _factors(weight))]


def _weight_fields(weight: Weight) -> dict[str, object]:
    return {
        "weight_dtype": weight.dtype,
        "weight_zero_point": weight.zero_point,
        "group_size": weight.group_size,
        "group_zero_points": weight.group_zero_points is not None,
        "table_channels": weight.table_channels,
    }


def conv(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """conv1d / conv2d, plain or transposed, with a constant weight."""
    layout, kernel_layout = str(call.attrs.data_layout), str(call.attrs.kernel_layout)
    space = spatial_axes(call)
    transposed = "transpose" in (ir.op_name(call) or "")
    if not has_known_layout(call):
        return ctx.no(f"layout {layout}/{kernel_layout}, output {call.attrs.out_layout or layout}")
    sizes = conv_sizes(call)
    groups = sizes["groups"]
    weight = weight_of(ctx, call.args[1], kernel_layout, f"{space}IO")
    if weight is None:
        return ctx.no("weight is computed at run time")
    source = ctx.value(call.args[0])
    integer = isinstance(source, Dequantised) and weight.has_integers
    _note_float(ctx, name, call, source, integer)
    if not integer or transposed or groups > 1:
        stored = ir.shape_of(call.args[1]) or ()
        shape = tuple(stored[kernel_layout.index(letter)] for letter in f"{space}IO")
        weight = _opened(weight, shape, integer)
        if weight is None:
            return ctx.no("grouped or transposed convolution with groups of weights")
    if transposed and groups > 1:
        if weight.group_size:
            return ctx.no("grouped transposed convolution with group-wise weights")
        weight = _transposed_groups(weight, groups)
    data = (
        source.codes if integer and isinstance(source, Dequantised) else ctx.as_float(call.args[0])
    )
    perm = tuple(layout.index(letter) for letter in f"N{space}C")
    data = ctx.permuted(data, perm, f"{name}.nhwc")
    values = weight.values
    if space == "W" and weight.dtype != "int4":
        values = values[None]
    weight = replace(weight, values=values)
    out_channels = sizes["out_channels"]
    shape4 = (sizes["batch"], sizes["height"], sizes["width"], sizes["in_channels"])
    data_expr = data.expr
    if space == "W":
        data_expr = ctx.reshape(data_expr, shape4, f"{name}.rows")
    channel_shape = tuple(out_channels if letter == "C" else 1 for letter in layout)
    common: dict[str, Any] = {**sizes, **_weight_fields(weight)}
    if transposed:
        out_padding = ir.ints(call.attrs.output_padding)
        common["output_padding"] = (0, *out_padding) if space == "W" else out_padding
    family: Any = Conv2dTransposeSpec if transposed else Conv2dSpec
    if integer:
        assert data.quant is not None
        scale, bias = _scale_bias(data, weight, channel_shape)
        limit = largest_sums(largest_code(data.dtype), weight).reshape(channel_shape)
        reach = largest_sums(data.quant.span, weight).reshape(channel_shape)
        common |= dict(
            data_dtype=data.dtype,
            acc_dtype=accumulator_dtype(limit),
            pad_value=data.quant.zero_point,
        )
    spec = family(**common)
    func = _with_roles(prim_func(spec), weight)
    expr = ctx.kernel(
        func, _arguments(data_expr, weight), spec.output_shape, spec.acc_dtype, name,
        "depthwise_conv2d" if getattr(spec, "is_depthwise", False) else spec.family,
    )  # fmt: skip
    by_letter = {"N": spec.output_shape[0], "H": spec.output_shape[1], "W": spec.output_shape[2],
                 "C": spec.output_shape[3]}  # fmt: skip
    logical = tuple(by_letter[letter] for letter in layout)
    if integer:
        sums = Tensor(expr, logical, spec.acc_dtype, perm)
        ctx.integer_layers.add(name)
        return Accumulator(sums, scale, bias, layer=name, limit=limit, centre=bias, reach=reach)
    if space == "W":
        expr = ctx.reshape(expr, tuple(logical[axis] for axis in perm), f"{name}.view")
    return _float_result(ctx, name, Tensor(expr, logical, "float32", perm), weight)


def _transposed_groups(weight: Weight, groups: int) -> Weight:
    """Transposed convolution weights are [.., I, O/groups]; kernels want [.., I/groups, O]."""
    *space, channels, per_group = weight.values.shape
    split = weight.values.reshape(*space, groups, channels // groups, per_group)
    values = np.moveaxis(split, len(space), -2).reshape(
        *space, channels // groups, groups * per_group
    )
    scale = weight.scale
    if scale is not None and scale.size > 1:
        scale = np.tile(scale, groups)
    return Weight(np.ascontiguousarray(values), weight.dtype, scale, weight.zero_point)


def _float_result(ctx: Lowering, name: str, tensor: Tensor, weight: Weight) -> Tensor:
    """Float sums of codes still need the per-channel scale; plain float sums are the result."""
    if weight.scale is None or weight.group_size:
        return tensor
    # Channels are the last physical axis.
    scale = weight.scale.astype(np.float32)
    expr = ctx.emit(relax.op.multiply(tensor.expr, relax.const(scale)), f"{name}.scaled")
    return Tensor(expr, tensor.shape, "float32", tensor.perm)


def matmul(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """[.., M, K] x constant [K, N], or a batched product of any two tensors."""
    left_shape, right_shape = ir.shape_of(call.args[0]), ir.shape_of(call.args[1])
    if left_shape is None or right_shape is None or min(len(left_shape), len(right_shape)) < 2:
        return ctx.no("vector or dynamic operand")
    if isinstance(ctx.value(call.args[1]), Constant) and len(right_shape) == 2:
        return _matmul_constant(ctx, name, call, left_shape, right_shape)
    return _matmul_activations(ctx, name, call, left_shape, right_shape)


def _matmul_constant(
    ctx: Lowering,
    name: str,
    call: tvm.ir.Call,
    left_shape: tuple[int, ...],
    right_shape: tuple[int, ...],
) -> Value | None:
    weight = weight_of(ctx, call.args[1], "IO", "IO")
    assert weight is not None
    source = ctx.value(call.args[0])
    integer = isinstance(source, Dequantised) and weight.has_integers
    _note_float(ctx, name, call, source, integer)
    if not integer:
        weight = _opened(weight, right_shape, integer)
        assert weight is not None
    data = (
        source.codes if integer and isinstance(source, Dequantised) else ctx.as_float(call.args[0])
    )
    rank = len(left_shape)
    data = ctx.permuted(data, ir.renormalise_perm(rank), f"{name}.rows")
    sizes = matmul_sizes(left_shape, right_shape)
    rows, columns = sizes["rows"], sizes["out_features"]
    data_expr = ctx.reshape(data.expr, (rows, sizes["in_features"]), f"{name}.rows")
    logical = (*left_shape[:-1], columns)
    fields: dict[str, Any] = {**sizes, **_weight_fields(weight)}
    if integer:
        assert data.quant is not None
        scale, bias = _scale_bias(data, weight, (1,) * (rank - 1) + (columns,))
        limit = largest_sums(largest_code(data.dtype), weight)
        reach = largest_sums(data.quant.span, weight)
        fields |= dict(data_dtype=data.dtype, acc_dtype=accumulator_dtype(limit))
    spec = MatmulSpec(**fields)
    func = _with_roles(prim_func(spec), weight)
    arguments = _arguments(data_expr, weight)
    expr = ctx.kernel(func, arguments, (rows, columns), spec.acc_dtype, name, "matmul")
    perm = ir.renormalise_perm(rank)
    if integer:
        sums = Tensor(expr, logical, spec.acc_dtype, perm)
        ctx.integer_layers.add(name)
        return Accumulator(sums, scale, bias, layer=name, limit=limit, centre=bias, reach=reach)
    result = _float_result(ctx, name, Tensor(expr, (rows, columns), "float32", (0, 1)), weight)
    return Tensor(ctx.reshape(result.expr, logical, f"{name}.view"), logical, "float32", perm)


def _matmul_activations(
    ctx: Lowering,
    name: str,
    call: tvm.ir.Call,
    left_shape: tuple[int, ...],
    right_shape: tuple[int, ...],
) -> Value | None:
    operands = [_codes(ctx.value(argument)) for argument in call.args]
    integer = None not in operands
    batch_shape = np.broadcast_shapes(left_shape[:-2], right_shape[:-2])
    batch = int(np.prod(batch_shape))
    right_batch = int(np.prod(right_shape[:-2]))
    a, b = (
        codes if integer and codes is not None else ctx.as_float(argument)
        for codes, argument in zip(operands, call.args, strict=True)
    )
    a = ctx.permuted(a, ir.renormalise_perm(len(left_shape)), f"{name}.a")
    b = ctx.permuted(b, ir.renormalise_perm(len(right_shape)), f"{name}.b")
    if left_shape[:-2] != batch_shape:
        a = _broadcast(ctx, a, (*batch_shape, *left_shape[-2:]), f"{name}.a")
    if right_batch not in (1, batch):
        b = _broadcast(ctx, b, (*batch_shape, *right_shape[-2:]), f"{name}.b")
        right_batch = batch
    rows, depth, columns = left_shape[-2], left_shape[-1], right_shape[-1]
    fields: dict = dict(
        batch=batch, rows=rows, depth=depth, columns=columns, b_batch=right_batch,
        a_dtype=a.dtype, b_dtype=b.dtype,
    )  # fmt: skip
    scale = np.ones(())
    if integer:
        assert a.quant is not None and b.quant is not None
        spans = [a.quant.span, b.quant.span]
        fields |= dict(
            acc_dtype="int32" if depth * spans[0] * spans[1] <= INT32_LIMIT else "int64",
            a_zero_point=a.quant.zero_point, b_zero_point=b.quant.zero_point,
        )  # fmt: skip
        scale = np.array(np.float64(a.quant.scale) * np.float64(b.quant.scale))
    spec = BatchMatmulSpec(**fields)
    func = prim_func(spec).with_attr(ROLES_ATTR, ["data", "data"])
    arguments = [
        ctx.reshape(a.expr, spec.a_shape, f"{name}.a"),
        ctx.reshape(b.expr, spec.b_shape, f"{name}.b"),
    ]
    expr = ctx.kernel(func, arguments, spec.output_shape, spec.acc_dtype, name, "batch_matmul")
    logical = (*batch_shape, rows, columns)
    perm = ir.renormalise_perm(len(logical))
    if integer:
        sums = Tensor(expr, logical, spec.acc_dtype, perm)
        limit = np.array(depth * spans[0] * spans[1])
        ctx.integer_layers.add(name)
        return Accumulator(sums, scale, np.zeros((), np.int64), layer=name, limit=limit)
    return Tensor(ctx.reshape(expr, logical, f"{name}.view"), logical, "float32", perm)


def _codes(value: Value) -> Tensor | None:
    """An operand's codes, when one scale and zero point hold for all of them."""
    if isinstance(value, Dequantised):
        return value.codes
    return constant_codes(value) if isinstance(value, Constant) else None


def constant_codes(constant: Constant) -> Tensor | None:
    """A constant's 8- or 16-bit codes as a tensor, when it was stored with one scale."""
    codes, scale, zero_point = constant.codes, constant.scale, constant.zero_point
    if codes is None or scale is None or zero_point is None:
        return None
    if scale.size != 1 or zero_point.size != 1 or codes.dtype.itemsize > 2:
        return None
    params = QuantParams(float(scale.ravel()[0]), int(zero_point.ravel()[0]), str(codes.dtype))
    perm = ir.renormalise_perm(codes.ndim)
    return Tensor(ir.array_const(codes), codes.shape, str(codes.dtype), perm, params)


def _broadcast(ctx: Lowering, tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Batch dimensions repeated; the tensor is in native order."""
    expr = ctx.emit(relax.op.broadcast_to(tensor.expr, shape), name)
    return replace(tensor, expr=expr, shape=shape, perm=ir.renormalise_perm(len(shape)))


HANDLERS = {
    f"relax.nn.{name}": conv
    for name in ("conv1d", "conv2d", "conv1d_transpose", "conv2d_transpose")
} | {
    "relax.matmul": matmul,
}
