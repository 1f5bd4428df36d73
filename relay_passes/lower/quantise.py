"""quantize / dequantize: the borders of the integer regions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import tvm
from tvm import relax

from .. import ir
from .context import Lowering
from .values import Constant, Dequantised, QuantParams, Tensor, Value

CODE_DTYPES = ("int8", "uint8", "int16", "uint16", "int32")


def dequantize(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """dequantize(codes, s, z) stays a note on the codes; of a constant it is an encoded
    constant."""
    source = ctx.value(call.args[0])
    scale, zero_point = ir.constant(call.args[1]), ir.constant(call.args[2])
    if scale is None or zero_point is None:
        return ctx.no("scale or zero point is computed at run time")
    if isinstance(source, Constant):
        axis = int(call.attrs.axis) % max(source.array.ndim, 1)
        return encoded_constant(source.array, scale, zero_point, axis)
    if not isinstance(source, Tensor) or source.dtype not in CODE_DTYPES:
        return None
    if scale.size != 1 or zero_point.size != 1:
        return ctx.no("activations with a scale per channel have no integer form")
    params = QuantParams(float(scale.reshape(())), int(zero_point.reshape(())), source.dtype)
    return Dequantised(replace(source, quant=params))


def encoded_constant(
    codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int
) -> Constant:
    """A quantised constant: its float value for the float operators, its codes for the integer
    ones."""
    scale, zero_point = np.atleast_1d(scale).ravel(), np.atleast_1d(zero_point).ravel()
    shape = [1] * codes.ndim
    if scale.size > 1 or zero_point.size > 1:
        shape[axis] = -1
    elif codes.ndim == 0:
        shape = []
    wide = codes.astype(np.int64) - zero_point.astype(np.int64).reshape(
        shape if zero_point.size > 1 else [1] * codes.ndim
    )
    array = wide.astype(np.float32) * scale.astype(np.float32).reshape(
        shape if scale.size > 1 else [1] * codes.ndim
    )
    return Constant(array, relax.const(array), codes, scale.astype(np.float32), zero_point, axis)


def quantize(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """quantize(x, s, z): ask the value for its codes at these parameters."""
    scale, zero_point = ir.constant(call.args[1]), ir.constant(call.args[2])
    dtype = str(call.attrs.out_dtype)
    if scale is None or zero_point is None:
        return ctx.no("scale or zero point is computed at run time")
    if scale.size != 1 or zero_point.size != 1 or dtype not in CODE_DTYPES:
        return None
    params = QuantParams(float(scale.reshape(())), int(zero_point.reshape(())), dtype)
    value = ctx.value(call.args[0])
    codes = ctx.quantised(value, params, name)
    if codes is None:
        codes = ctx.quantised(ctx.as_float(call.args[0]), params, name)
    return codes


def clip_codes(ctx: Lowering, name: str, codes: Tensor, low: float, high: float) -> Tensor:
    """clip on the integers themselves (a fused TFLite activation)."""
    from ...schedules import requantize as kernels

    info = np.iinfo(codes.dtype)
    bounds = (max(int(np.ceil(low)), int(info.min)), min(int(np.floor(high)), int(info.max)))
    if bounds == (int(info.min), int(info.max)):
        return codes
    shape = codes.physical_shape
    func = kernels.clip(shape, codes.dtype, bounds)
    return replace(codes, expr=ctx.kernel(func, [codes.expr], shape, codes.dtype, name, "clip"))


HANDLERS = {"relax.quantize": quantize, "relax.dequantize": dequantize}
