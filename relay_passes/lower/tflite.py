"""What differs under the TFLite rule: the integers of TensorFlow Lite's reference kernels.

Graph form of an imported `.tflite` has one quantise behind every operator, so each region is one
TFLite operator, whose own way of forming multipliers and of rounding applies, bit for bit:

    conv       Q31 multiplier from float64 scales, double rounding; 16 bits: Q15, one rounding
    matmul     float64 multiplication, half away from zero, as one high product of integers where
               that is proven to be the same; BATCH_MATMUL: Q31 multiplier from the float32 product
               of the scales
    add, sub   both terms with 20 (16 bits: 15) more fraction bits, three Q31 multiplications
    mul        Q31 multiplier from float32 scales
    avg_pool   raw codes, integer division, half away from zero
    mean, sum  Q31 multiplier, divided by the count
    softmax    fixed-point exponentials and reciprocal
    f(x)       a table, computed as the operator computes (numerics/tflite_tables.py)

`HANDLERS` and `FORMS` replace entries of the common tables; what is not named there is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import tvm

from ...schedules import requantize as kernels
from ...schedules.divide import divide_half_away
from ...schedules.table import channel_table_lookup, table_lookup
from ...schedules.tflite_add import tflite_add
from ...schedules.tflite_softmax import tflite_softmax_8, tflite_softmax_16
from .. import ir
from ..numerics import requantize as rules
from ..numerics import tflite as numerics
from ..numerics import tflite_softmax as softmax_numerics
from ..numerics import tflite_tables as tables
from . import anchors, elementwise, normalise, pooling
from .context import Lowering
from .values import (
    Accumulator,
    Concat,
    Constant,
    Dequantised,
    Lazy,
    QuantParams,
    Sum,
    Tensor,
    Unary,
    Value,
)

# Average pooling takes its output's scale as its input's when they are this close.
POOL_SCALE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Convolution(Accumulator):
    """Sums of a convolution."""


@dataclass(frozen=True)
class Product(Accumulator):
    """(a - z_a) * (b - z_b) of two tensors of codes."""


@dataclass(frozen=True)
class FullyConnected(Accumulator):
    """Sums of a product with a constant matrix."""


@dataclass(frozen=True)
class BatchProduct(Accumulator):
    """Sums of BATCH_MATMUL; either operand may be constant."""


@dataclass(frozen=True)
class Mean(Accumulator):
    """Sums of codes of scale `unit`, to be divided by `count`."""

    count: int = 1
    unit: float = 1.0


@dataclass(frozen=True)
class CodeSum(Sum):
    """a + b or a - b of two tensors of codes."""


def _parameters(params: QuantParams) -> tables.Codes:
    return tables.Codes(params.scale, params.zero_point, params.dtype)


# Handlers: one call => a value ------------------------------------------------------------------


def _typed(value: Value | None, family: type[Accumulator], **fields: object) -> Value | None:
    """The same accumulator as one of `family`; anything else as it is."""
    if type(value) is not Accumulator:
        return value
    return family(**{**vars(value), **fields})


def conv(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """As everywhere; the sums know that they are a convolution's."""
    return _typed(anchors.conv(ctx, name, call), Convolution)


def matmul(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """FULLY_CONNECTED, or BATCH_MATMUL: the importer gives only the latter a result dtype."""
    batched = str(call.attrs.out_dtype) == "float32"
    return _typed(anchors.matmul(ctx, name, call), BatchProduct if batched else FullyConnected)


def mean(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """MEAN keeps the count, by which the multiplier is divided."""
    source, shape = ctx.value(call.args[0]), ir.shape_of(call.args[0])
    value = pooling.mean(ctx, name, call)
    if not isinstance(source, Dequantised) or not isinstance(value, Accumulator) or shape is None:
        return value
    assert source.codes.quant is not None
    count = math.prod(shape) // math.prod(value.sums.shape)
    return _typed(value, Mean, count=count, unit=source.codes.quant.scale)


def total(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """SUM."""
    value = pooling.total(ctx, name, call)
    if not isinstance(value, Accumulator):
        return value
    return _typed(value, Mean, count=1, unit=float(value.scale))


def avg_pool2d(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """avg_pool(codes) = round(Σ codes / count): zero points and scales play no part."""
    source = ctx.value(call.args[0])
    if not isinstance(source, Dequantised) or bool(call.attrs.count_include_pad):
        return pooling.avg_pool2d(ctx, name, call)
    sums, counts = pooling.window_sums(ctx, name, call, source.codes, pad_value=0)
    own = source.codes.quant
    assert own is not None

    def emit(params: QuantParams, out_name: str) -> Tensor | None:
        near = abs(params.scale - own.scale) <= POOL_SCALE_TOLERANCE
        if params.dtype != own.dtype or params.zero_point != own.zero_point or not near:
            return None
        divisor = ctx.constant_for(sums, counts).astype(np.int32)
        shape = sums.physical_shape
        func = divide_half_away(shape, divisor.shape, params.bounds, params.dtype)
        expr = ctx.kernel(
            func, [sums.expr, divisor], shape, params.dtype, out_name, "divide_half_away"
        )
        return replace(sums, expr=expr, dtype=params.dtype, quant=params)

    return Lazy(emit)


def softmax(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """SOFTMAX; its output parameters are fixed by the operator."""
    source = ctx.value(call.args[0])
    if not isinstance(source, Dequantised) or np.iinfo(source.codes.dtype).bits > 16:
        return normalise.softmax(ctx, name, call)
    codes = source.codes
    own = codes.quant
    assert own is not None
    axis = codes.perm.index(int(call.attrs.axis) % len(codes.shape))
    shape = codes.physical_shape

    def emit(params: QuantParams, out_name: str) -> Tensor | None:
        bits, low = np.iinfo(params.dtype).bits, params.bounds[0]
        if codes.dtype == "int16":
            if params.dtype != "int16" or params.zero_point != 0:
                return None
            reciprocals = softmax_numerics.interpolate(
                np.arange(-32768, 32768), softmax_numerics.reciprocal_table()
            )
            exponentials = softmax_numerics.exponentials_16(own.scale).astype(np.int16)
            func = tflite_softmax_16(shape, axis)
            arguments = [codes.expr, exponentials, reciprocals.astype(np.int16)]
        else:
            if params.zero_point != low or bits > 16:
                return None
            func = tflite_softmax_8(shape, axis, codes.dtype, params.dtype)
            arguments = [codes.expr, softmax_numerics.exponentials(own.scale)]
        expr = ctx.kernel(func, arguments, shape, params.dtype, out_name, "softmax")
        return replace(codes, expr=expr, dtype=params.dtype, quant=params)

    return Lazy(emit)


def _operands(ctx: Lowering, name: str, call: tvm.ir.Call) -> tuple[Tensor, Tensor] | None:
    """Both operands as codes of one rank and order, when both are codes of equal dtype."""
    found = []
    for argument in call.args:
        value = ctx.value(argument)
        if isinstance(value, Constant) and value.codes is not None:
            codes = anchors.constant_codes(value)
            if codes is None:
                return None
            found.append(codes)
        elif isinstance(value, Dequantised):
            found.append(value.codes)
        else:
            return None
    a, b = found
    if a.dtype != b.dtype or np.iinfo(a.dtype).bits > 16:
        return None
    rank = max(len(a.shape), len(b.shape))
    a, b = (ctx.expanded(tensor, rank, f"{name}.operand") for tensor in (a, b))
    lead = a if math.prod(a.shape) >= math.prod(b.shape) else b
    return ctx.permuted(a, lead.perm, f"{name}.a"), ctx.permuted(b, lead.perm, f"{name}.b")


def add(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """ADD and SUB of codes; a bias joins its convolution."""
    operands = _operands(ctx, name, call)
    if operands is not None:
        sign = -1.0 if ir.op_name(call) == "relax.subtract" else 1.0
        terms = ((1.0, Dequantised(operands[0])), (sign, Dequantised(operands[1])))
        return CodeSum(terms, np.zeros(()))
    return elementwise.add(ctx, name, call)


def multiply(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """MUL of codes."""
    operands = _operands(ctx, name, call)
    if operands is None:
        return elementwise.multiply(ctx, name, call)
    return _typed(elementwise.product_of(ctx, name, *operands), Product)


def extremum(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """MAXIMUM and MINIMUM of codes with equal parameters."""
    operands = _operands(ctx, name, call)
    if operands is None or operands[0].quant != operands[1].quant:
        return elementwise.bound(ctx, name, call)
    a, b = operands
    shape = np.broadcast_shapes(a.shape, b.shape)
    expr = ctx.emit(tvm.ir.Call(call.op, [a.expr, b.expr], call.attrs, call.ty_args), name)
    return Dequantised(replace(a, expr=expr, shape=shape))


def prelu(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """PRELU with constant slopes by channel: a table for each."""
    value, slope = (ctx.value(argument) for argument in call.args)
    slopes = anchors.constant_codes(slope) if isinstance(slope, Constant) else None
    if not isinstance(value, Dequantised) or slopes is None or slopes.quant is None:
        return ctx.no("the operand is not quantised, or the slopes are computed at run time")
    assert isinstance(slope, Constant) and slope.codes is not None
    codes, scale = value.codes, slopes.quant.scale
    centred = slope.codes.astype(np.int32) - slopes.quant.zero_point
    axis = int(call.attrs.axis) % len(codes.shape)

    def emit(params: QuantParams, out_name: str) -> Tensor | None:
        assert codes.quant is not None
        rows = tables.prelu(_parameters(codes.quant), _parameters(params), centred, scale)
        shape = codes.physical_shape
        func = channel_table_lookup(shape, codes.perm.index(axis), codes.dtype, params.dtype)
        expr = ctx.kernel(func, [codes.expr, rows], shape, params.dtype, out_name, "channel_table")
        return replace(codes, expr=expr, dtype=params.dtype, quant=params)

    return Lazy(emit)


# Forms: a value and its output's parameters => codes --------------------------------------------


def _rescaled_sums(
    ctx: Lowering,
    value: Accumulator,
    params: QuantParams,
    name: str,
    rule: str,
    constants: list[np.ndarray],
) -> Tensor:
    """clamp(scale(sums + bias) + zero_point) with the constants of `rule`, all of one shape that
    broadcasts."""
    sums = value.sums
    physical = ir.shape_of(sums.expr)
    assert physical is not None
    wide = "int64" if sums.dtype == "int64" or rule == "tflite_wide" else "int32"
    typed = [
        constant.astype(dtype)
        for constant, (_, dtype) in zip(constants, kernels.factors_of(rule), strict=True)
    ]
    bias, *scales = (ctx.constant_for(sums, each) for each in (value.bias, *typed))
    func = kernels.requantize(
        physical, sums.dtype, bias.shape, params.zero_point, _bounds(value.clamp, params),
        params.dtype, rule, wide, factor_shape=scales[0].shape,
    )  # fmt: skip
    arguments = [sums.expr, bias.astype(wide), *scales]
    expr = ctx.kernel(func, arguments, physical, params.dtype, name, "requantize")
    expr = ctx.reshape(expr, sums.physical_shape, f"{name}.view")
    return replace(sums, expr=expr, dtype=params.dtype, quant=params)


def _bounds(clamp: tuple[float, float], params: QuantParams) -> tuple[int, int]:
    """Codes of an activation's bounds, half away from zero."""
    codes = _parameters(params)
    low, high = codes.bound(clamp[0]), codes.bound(clamp[1])
    lowest, highest = params.bounds
    low = lowest if low is None else min(max(low, lowest), highest)
    high = highest if high is None else max(min(high, highest), lowest)
    return low, high


def _fixed_point(
    ctx: Lowering, value: Accumulator, params: QuantParams, name: str, real: np.ndarray
) -> Tensor | None:
    if params.dtype == "int32":
        return ctx.exact(value, params, name)
    mantissa, exponent = rules.quantize_multipliers(np.asarray(real))
    if not _is_small(value, exponent):
        return _rescaled_sums(ctx, value, params, name, "tflite", [mantissa, exponent])
    if _bounds(value.clamp, params)[0] >= params.zero_point:
        constants = numerics.rounded_once(mantissa, exponent, params.zero_point)
        if constants is not None:
            return _rescaled_sums(ctx, value, params, name, "rounded_once", constants)
    return _rescaled_sums(ctx, value, params, name, "tflite_small", [mantissa, exponent])


def _is_small(value: Accumulator, exponent: np.ndarray) -> bool:
    """Whether sums and multipliers stay where the short form of the multiplication is the same."""
    if value.limit is None or value.sums.dtype == "int64" or int(np.max(exponent)) >= 0:
        return False
    bias = np.abs(np.asarray(value.bias, np.int64))
    return int((np.asarray(value.limit, np.int64) + bias).max()) < 2**30


def convolution(ctx: Lowering, value: Accumulator, params: QuantParams, name: str) -> Tensor | None:
    """CONV_2D, DEPTHWISE_CONV_2D, TRANSPOSE_CONV."""
    multiplier = (
        numerics.rounded_product_multiplier
        if params.dtype == "uint8"
        else numerics.convolution_multiplier
    )
    real = multiplier(value.scale, params.scale)
    if params.dtype == "int16":
        return _wide(ctx, value, params, name, real)
    return _fixed_point(ctx, value, params, name, real)


def _wide(
    ctx: Lowering, value: Accumulator, params: QuantParams, name: str, real: np.ndarray
) -> Tensor:
    """16-bit activations: sums of 64 bits."""
    mantissa, exponent = rules.quantize_multipliers(real)
    constants = [numerics.reduce_mantissa(mantissa), exponent]
    return _rescaled_sums(ctx, value, params, name, "tflite_wide", constants)


def fully_connected(
    ctx: Lowering, value: Accumulator, params: QuantParams, name: str
) -> Tensor | None:
    """FULLY_CONNECTED: what float64 arithmetic gives, in integers where they give the same."""
    if params.dtype == "int32":
        return ctx.exact(value, params, name)
    real = numerics.convolution_multiplier(value.scale, params.scale)
    constants = _high_multipliers(value, params, real)
    if constants is not None:
        return _rescaled_sums(ctx, value, params, name, "high", constants)
    return _rescaled_sums(ctx, value, params, name, "float64", [real])


def _high_multipliers(
    value: Accumulator, params: QuantParams, real: np.ndarray
) -> list[np.ndarray] | None:
    """Mantissas and shifts, one for each multiplier, for sums that stay in 32 bits."""
    if value.limit is None or value.sums.dtype != "int32" or np.iinfo(params.dtype).bits != 8:
        return None
    bias = np.abs(np.asarray(value.bias, np.int64))
    limit = int((np.asarray(value.limit, np.int64) + bias).max())
    low, high = (bound - params.zero_point for bound in _bounds(value.clamp, params))
    pairs = [numerics.high_multiplier(float(m), limit, (low, high)) for m in np.ravel(real)]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        return None
    return [np.array(part, np.int32).reshape(np.shape(real)) for part in zip(*found, strict=True)]


def batch_product(
    ctx: Lowering, value: Accumulator, params: QuantParams, name: str
) -> Tensor | None:
    """BATCH_MATMUL."""
    real = numerics.rounded_product_multiplier(value.scale, params.scale)
    if params.dtype == "int16":
        return _wide(ctx, value, params, name, real)
    return _fixed_point(ctx, value, params, name, real)


def product(ctx: Lowering, value: Accumulator, params: QuantParams, name: str) -> Tensor | None:
    """MUL."""
    real = numerics.product_multiplier(value.scale, params.scale)
    return _fixed_point(ctx, value, params, name, real)


def mean_of_codes(ctx: Lowering, value: Mean, params: QuantParams, name: str) -> Tensor | None:
    """MEAN."""
    pair = numerics.mean_multiplier(value.unit, params.scale, value.count)
    constants = [np.array(part, np.int32) for part in pair]
    return _rescaled_sums(ctx, value, params, name, "tflite", constants)


def sum_of_codes(ctx: Lowering, value: CodeSum, params: QuantParams, name: str) -> Tensor | None:
    """ADD, SUB."""
    (_, left), (sign, right) = value.terms
    if not isinstance(left, Dequantised) or not isinstance(right, Dequantised):
        return ctx.forms[Sum](ctx, value, params, name)
    a, b = left.codes, right.codes
    if value.offset.any() or a.dtype != params.dtype:
        return ctx.forms[Sum](ctx, value, params, name)
    assert a.quant is not None and b.quant is not None
    shape = np.broadcast_shapes(a.shape, b.shape)
    physical = tuple(shape[axis] for axis in a.perm)
    scales = (a.quant.scale, b.quant.scale)
    bits = np.iinfo(params.dtype).bits
    func = tflite_add(
        (a.physical_shape, b.physical_shape), a.dtype,
        (a.quant.zero_point, b.quant.zero_point, params.zero_point),
        numerics.sum_multipliers(scales, params.scale, bits), numerics.SUM_LEFT_SHIFT[bits],
        int(sign), _bounds(value.clamp, params), physical, params.dtype,
    )  # fmt: skip
    expr = ctx.kernel(func, [a.expr, b.expr], physical, params.dtype, name, "tflite_add")
    return Tensor(expr, shape, params.dtype, a.perm, params)


def rescaled(ctx: Lowering, value: Dequantised, params: QuantParams, name: str) -> Tensor | None:
    """QUANTIZE of codes: a table, or arithmetic for wide ones."""
    codes = value.codes
    own = codes.quant
    assert own is not None
    if own == params:
        return codes
    if np.iinfo(codes.dtype).bits == 8:
        table = tables.rescale(_parameters(own), _parameters(params))
        return _looked_up(ctx, codes, table, params, name)
    real = np.array(numerics.ratio_float64(own.scale, params.scale))
    centred = Accumulator(codes, np.array(own.scale), np.array(-own.zero_point, np.int64))
    return _fixed_point(ctx, centred, params, name, real)


def _looked_up(
    ctx: Lowering, codes: Tensor, table: np.ndarray, params: QuantParams, name: str
) -> Tensor:
    shape = codes.physical_shape
    func = table_lookup(shape, codes.dtype, params.dtype)
    expr = ctx.kernel(func, [codes.expr, table], shape, params.dtype, name, "table")
    return replace(codes, expr=expr, dtype=params.dtype, quant=params)


_Table = Callable[[tables.Codes, tables.Codes, tvm.ir.Call], np.ndarray]


def _clip_table(source: tables.Codes, target: tables.Codes, call: tvm.ir.Call) -> np.ndarray:
    low, high = (elementwise.number(bound) for bound in call.args[1:3])
    return tables.clipped(source, target, low, high)


def _logistic_table(source: tables.Codes, target: tables.Codes, _call: tvm.ir.Call) -> np.ndarray:
    if source.dtype == "int16":
        return tables.logistic_16(source, target)
    return tables.evaluated(source, target, tables.sigmoid_float32)


def _tanh_table(source: tables.Codes, target: tables.Codes, _call: tvm.ir.Call) -> np.ndarray:
    if source.dtype == "int16":
        return tables.tanh_16(source, target)
    return tables.evaluated(source, target, tables.tanh_float32)


TABLES: dict[str, _Table] = {
    "relax.nn.relu": lambda x, y, _call: tables.clipped(x, y, 0.0, math.inf),
    "relax.nn.relu6": lambda x, y, _call: tables.clipped(x, y, 0.0, 6.0),
    "relax.clip": _clip_table,
    "relax.nn.leakyrelu": lambda x, y, call: tables.leaky_relu(x, y, float(call.attrs.alpha)),
    "relax.nn.gelu": lambda x, y, _call: tables.evaluated(x, y, tables.gelu_float32),
    "relax.nn.gelu_tanh": lambda x, y, _call: tables.evaluated(x, y, tables.gelu_tanh_float32),
    "relax.sigmoid": _logistic_table,
    "relax.tanh": _tanh_table,
}


def tabulated(ctx: Lowering, value: Unary, params: QuantParams, name: str) -> Tensor | None:
    """A function of codes, one operator or hard-swish in parts."""
    own = value.codes.quant
    assert own is not None
    source, target = _parameters(own), _parameters(params)
    entry = TABLES.get(ir.op_name(value.call) or "") if value.call is not None else None
    if entry is not None:
        table = entry(source, target, value.call)
    elif _is_hard_swish(source, value.values) and np.iinfo(own.dtype).bits == 8:
        table = tables.hard_swish(source, target)
    else:
        table = tables.evaluated(source, target, lambda _x: value.values)
    return _looked_up(ctx, value.codes, table, params, name)


def _is_hard_swish(source: tables.Codes, values: np.ndarray) -> bool:
    """Known by its values: front ends spell it in several ways."""
    x = source.values.astype(np.float64)
    expected = x * np.clip(x + 3, 0, 6) / 6
    return bool(np.allclose(values, expected, rtol=1e-5, atol=1e-6 * source.scale))


def joined(ctx: Lowering, value: Concat, params: QuantParams, name: str) -> Tensor | None:
    """CONCATENATION with other parameters, which only uint8 has."""
    parts = []
    for k, part in enumerate(value.parts):
        if part.quant is None or np.iinfo(part.dtype).bits != 8:
            return None
        if part.quant != params:
            table = tables.joined(_parameters(part.quant), _parameters(params))
            part = _looked_up(ctx, part, table, params, f"{name}.part{k}")
        parts.append(part)
    return ctx.concatenated(parts, value.axis, name)


HANDLERS = {
    "relax.nn.conv1d": conv,
    "relax.nn.conv2d": conv,
    "relax.nn.conv1d_transpose": conv,
    "relax.nn.conv2d_transpose": conv,
    "relax.matmul": matmul,
    "relax.mean": mean,
    "relax.sum": total,
    "relax.nn.avg_pool2d": avg_pool2d,
    "relax.nn.softmax": softmax,
    "relax.add": add,
    "relax.subtract": add,
    "relax.multiply": multiply,
    "relax.maximum": extremum,
    "relax.minimum": extremum,
    "relax.nn.prelu": prelu,
}  # fmt: skip

FORMS = {
    Accumulator: convolution,
    Convolution: convolution,
    FullyConnected: fully_connected,
    BatchProduct: batch_product,
    Product: product,
    Mean: mean_of_codes,
    CodeSum: sum_of_codes,
    Dequantised: rescaled,
    Unary: tabulated,
    Concat: joined,
}
