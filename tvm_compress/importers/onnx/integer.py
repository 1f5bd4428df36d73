"""ONNX quantised operators => `R.dequantize -> float operator -> R.quantize`, integers untouched.

The operators of the QOperator format mean exactly that composition (onnx operator specification,
onnxruntime's contrib operators), so one form serves both formats and later passes see only one.
ConvInteger and MatMulInteger have an int32 result: with constant zero points they become the same
composition with every scale 1, cast to int32 (exact while the sums stay below 2^24 in float32; the
integer kernels that replace it later are exact always); with run-time zero points they stay integer
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Expr
from tvm.relax.frontend.onnx.onnx_frontend import (
    AveragePool,
    Conv,
    onnx_input,
)

from ...relay_passes.ir import array_const, constant, dtype_of, shape_of


def _like(zero_point: Expr | None, default: str) -> str:
    return default if zero_point is None else dtype_of(zero_point)


def _parameters(
    scale: Expr, zero_point: Expr | None, dtype: str, axis: int, rank: int
) -> tuple[Expr, Expr, int]:
    """Scale, zero point and axis as the Relax operators want them: scalars, or both per channel."""
    if zero_point is None:
        zero_point = array_const(np.zeros((), dtype))
    array, zeros = constant(scale), constant(zero_point)
    if array is None or zeros is None:
        return scale, zero_point, axis
    if array.size == 1 and zeros.size == 1:
        return array_const(array.reshape(())), array_const(zeros.reshape(())), -1
    size = max(array.size, zeros.size)
    array = np.broadcast_to(array.reshape(-1), (size,))
    zeros = np.broadcast_to(zeros.reshape(-1), (size,))
    return array_const(array.copy()), array_const(zeros.copy()), axis % rank if rank else axis


def _dequantize(x: Expr, scale: Expr, zero_point: Expr | None, axis: int = -1) -> Expr:
    scale, zero_point, axis = _parameters(scale, zero_point, dtype_of(x), axis, _rank(x))
    return relax.op.dequantize(x, scale, zero_point, axis, dtype_of(scale))


def _quantize(x: Expr, scale: Expr, zero_point: Expr | None, dtype: str = "uint8") -> Expr:
    dtype = _like(zero_point, dtype)
    scale, zero_point, axis = _parameters(scale, zero_point, dtype, -1, 0)
    return relax.op.quantize(x, scale, zero_point, axis, dtype)


def _rank(x: Expr) -> int:
    return len(shape_of(x) or ())


def dequantize_linear(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
    """DequantizeLinear => `R.dequantize`; blocked weights repeat their scales along the axis."""
    x, scale, zero_point = inputs[0], inputs[1], inputs[2]
    axis = attributes.get("axis", 1)
    rank = _rank(x)
    axis = axis % rank if rank > 1 else 0
    if attributes.get("block_size", 0):
        return _blocked(x, scale, zero_point, axis, attributes["block_size"])
    return _dequantize(x, scale, zero_point, axis)


def _blocked(x: Expr, scale: Expr, zero_point: Expr | None, axis: int, block: int) -> Expr:
    """`(x - z) * s` with one scale for every `block` elements along `axis`, in plain operators."""
    size = (shape_of(x) or ())[axis]

    def expand(parameter: Expr) -> Expr:
        array = constant(parameter)
        if array is None:
            raise ValueError("blocked quantisation needs constant scales and zero points")
        repeated = np.repeat(array, block, axis)
        return array_const(np.take(repeated, np.arange(size), axis))

    value = relax.op.astype(x, dtype_of(scale))
    if zero_point is not None:
        value = relax.op.subtract(value, relax.op.astype(expand(zero_point), dtype_of(scale)))
    return relax.op.multiply(value, expand(scale))


def quantize_linear(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
    """QuantizeLinear => `R.quantize`."""
    if attributes.get("block_size", 0):
        raise ValueError("blocked quantisation of an activation is not supported")
    x, scale, zero_point = inputs[0], inputs[1], inputs[2]
    rank = _rank(x)
    axis = attributes.get("axis", 1) % rank if rank > 1 else 0
    dtype = _like(zero_point, "uint8")
    if zero_point is None and attributes.get("output_dtype", 0):
        from tvm.relax.frontend.onnx.onnx_frontend import get_type

        dtype = get_type(attributes["output_dtype"])
    scale, zero_point, axis = _parameters(scale, zero_point, dtype, axis, rank)
    return relax.op.quantize(x, scale, zero_point, axis, dtype)


def qlinear_conv(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
    """QLinearConv(x, s, z, w, s, z, s, z, bias int32)."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = (inputs[i] for i in range(9))
    data = bb.emit(_dequantize(x, x_scale, x_zero))
    weight = bb.emit(_dequantize(w, w_scale, w_zero, axis=0))
    if bias is not None:
        bias = bb.emit(_bias(bias, x_scale, w_scale))
    result = Conv.get_converter(opset)(bb, onnx_input([data, weight, bias]), attributes, None)
    return _quantize(result, y_scale, y_zero)


def _bias(bias: Expr, x_scale: Expr, w_scale: Expr) -> Expr:
    """int32 bias at scale `s_x * s_w`."""
    x, w = constant(x_scale), constant(w_scale)
    if x is None or w is None:
        raise ValueError("scales must be constants")
    scale = (x.reshape(-1) * w.reshape(-1)).astype("float32")
    return _dequantize(bias, array_const(scale), None, axis=0)


def qlinear_matmul(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
    """QLinearMatMul(a, s, z, b, s, z, s, z); b per column when its scale is a vector."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (inputs[i] for i in range(8))
    left = bb.emit(_dequantize(a, a_scale, a_zero, axis=_rank(a) - 2))
    right = bb.emit(_dequantize(b, b_scale, b_zero, axis=_rank(b) - 1))
    return _quantize(relax.op.matmul(left, right), y_scale, y_zero)


def qgemm(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
    """com.microsoft.QGemm(a, s, z, b, s, z, c int32, s, z); float without an output scale."""
    a, a_scale, a_zero, b, b_scale, b_zero, c, y_scale, y_zero = (inputs[i] for i in range(9))
    left = bb.emit(_dequantize(a, a_scale, a_zero))
    right = bb.emit(_dequantize(b, b_scale, b_zero, axis=0 if attributes.get("transB", 0) else 1))
    if attributes.get("transA", 0):
        left = relax.op.permute_dims(left, [1, 0])
    if attributes.get("transB", 0):
        right = relax.op.permute_dims(right, [1, 0])
    alpha = float(attributes.get("alpha", 1.0))
    if alpha != 1.0:
        left = relax.op.multiply(left, relax.const(alpha, "float32"))
    result = relax.op.matmul(left, right)
    if c is not None:
        scale = array_const(np.float32(alpha) * np.asarray(constant(a_scale), "float32"))
        result = relax.op.add(result, bb.emit(_bias(c, scale, b_scale)))
    return result if y_scale is None else _quantize(result, y_scale, y_zero)


def _binary(operator: Callable[[Expr, Expr], Expr]) -> Callable[..., Expr]:
    def convert(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
        a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (inputs[i] for i in range(8))
        left = bb.emit(_dequantize(a, a_scale, a_zero))
        right = bb.emit(_dequantize(b, b_scale, b_zero))
        return _quantize(operator(left, right), y_scale, y_zero, dtype_of(a))

    return convert


qlinear_add = _binary(relax.op.add)
qlinear_mul = _binary(relax.op.multiply)


def qlinear_concat(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
    """com.microsoft.QLinearConcat(s, z, x0, s0, z0, x1, s1, z1, ...)."""
    pieces = [
        bb.emit(_dequantize(inputs[i], inputs[i + 1], inputs[i + 2]))
        for i in range(2, len(inputs), 3)
    ]
    return _quantize(relax.op.concat(pieces, attributes["axis"]), inputs[0], inputs[1])


def _unary(operator: Callable[[Any, Expr, dict[str, Any], int], Expr]) -> Callable[..., Expr]:
    def convert(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
        x, x_scale, x_zero, y_scale, y_zero = (inputs[i] for i in range(5))
        result = operator(bb, bb.emit(_dequantize(x, x_scale, x_zero)), attributes, opset)
        return _quantize(result, y_scale, y_zero, dtype_of(x))

    return convert


def _spatial_mean(bb: Any, x: Expr, attributes: dict[str, Any], opset: int) -> Expr:
    axes = list(range(1, _rank(x) - 1)) if attributes.get("channels_last") else None
    return relax.op.mean(x, axes or list(range(2, _rank(x))), keepdims=True)


def _average_pool(bb: Any, x: Expr, attributes: dict[str, Any], opset: int) -> Expr:
    if attributes.pop("channels_last", 0):
        raise ValueError("channels_last is not supported")
    return AveragePool.get_converter(opset)(bb, [x], attributes, None)


def _softmax(bb: Any, x: Expr, attributes: dict[str, Any], opset: int) -> Expr:
    axis = attributes.get("axis", -1)
    if attributes.get("opset", opset) < 13 and axis % _rank(x) != _rank(x) - 1:
        raise ValueError("softmax over several axes at once (opset below 13) is not supported")
    return relax.op.nn.softmax(x, axis)


qlinear_global_average_pool = _unary(_spatial_mean)
qlinear_average_pool = _unary(_average_pool)
qlinear_sigmoid = _unary(lambda bb, x, attributes, opset: relax.op.sigmoid(x))
qlinear_leaky_relu = _unary(
    lambda bb, x, attributes, opset: relax.op.nn.leakyrelu(x, float(attributes.get("alpha", 0.01)))
)
qlinear_softmax = _unary(_softmax)


def conv_integer(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
    """ConvInteger(x, w, z_x, z_w) => int32."""

    def convolve(x: Expr, w: Expr) -> Expr:
        return Conv.get_converter(opset)(bb, onnx_input([x, w, None]), attributes, None)

    return _integer(bb, inputs, convolve, weight_axis=0)


def matmul_integer(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Expr:
    """MatMulInteger(a, b, z_a, z_b) => int32."""

    def multiply(a: Expr, b: Expr) -> Expr:
        return relax.op.matmul(a, b, "int32" if dtype_of(a) == "int32" else "void")

    return _integer(bb, inputs, multiply, weight_axis=_rank(inputs[1]) - 1)


def _integer(
    bb: Any, inputs: list[Any], operator: Callable[[Expr, Expr], Expr], weight_axis: int
) -> Expr:
    a, b, a_zero, b_zero = (inputs[i] for i in range(4))
    zeros = [None if zero is None else constant(zero) for zero in (a_zero, b_zero)]
    known = all(
        zero is None or (array is not None and array.ndim <= 1)
        for zero, array in zip((a_zero, b_zero), zeros, strict=True)
    )
    if known:
        one = array_const(np.float32(1.0))
        left = bb.emit(_dequantize(a, one, a_zero, axis=max(_rank(a) - 2, 0)))
        right = bb.emit(_dequantize(b, one, b_zero, axis=weight_axis))
        return relax.op.astype(operator(left, right), "int32")
    return operator(
        bb.emit(_centred(bb, a, a_zero, max(_rank(a) - 2, 0))),
        bb.emit(_centred(bb, b, b_zero, weight_axis)),
    )


def _centred(bb: Any, x: Expr, zero_point: Expr | None, axis: int) -> Expr:
    """`int32(x) - int32(z)`, a vector of zero points along `axis`."""
    wide = relax.op.astype(x, "int32")
    if zero_point is None:
        return wide
    zero_point = bb.emit(relax.op.astype(zero_point, "int32"))
    shape = shape_of(zero_point) or ()
    if len(shape) == 1 and shape[0] > 1:
        aligned = [1] * _rank(x)
        aligned[axis] = shape[0]
        zero_point = relax.op.reshape(zero_point, aligned)
    return relax.op.subtract(wide, zero_point)
