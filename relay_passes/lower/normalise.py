"""softmax and layer_norm in integers; see the kernels for their numerics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import tvm

from ...schedules import layer_norm as layer_norm_kernel
from ...schedules import softmax as softmax_kernel
from .. import ir
from .context import Lowering
from .values import Constant, Dequantised, Lazy, QuantParams, Tensor, Value


def exponential_table(scale: float, dtype: str, bits: int) -> np.ndarray:
    """round(2^bits exp(-d * scale)) for d = 0..max."""
    distance = np.arange(1 << np.iinfo(dtype).bits, dtype=np.float64)
    return np.rint(np.exp(-distance * np.float64(scale)) * 2.0**bits).astype(np.int32)


def softmax(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """softmax(dq(q)) => table of exponentials, sum, integer division."""
    value = ctx.value(call.args[0])
    if not isinstance(value, Dequantised) or value.codes.quant is None:
        return ctx.no("the operand is not quantised")
    if np.iinfo(value.codes.dtype).bits > 16:
        return ctx.no(f"no softmax over {value.codes.dtype} codes")
    codes = value.codes
    axis = int(call.attrs.axis) % len(codes.shape)

    def emit(params: QuantParams, out_name: str) -> Tensor | None:
        assert codes.quant is not None
        shape = codes.physical_shape
        reciprocal = int(np.rint(2.0**softmax_kernel.RECIPROCAL_BITS / np.float64(params.scale)))
        bits = softmax_kernel.table_bits(codes.shape[axis], reciprocal)
        table = exponential_table(codes.quant.scale, codes.dtype, bits)
        func = softmax_kernel.softmax(
            shape, codes.perm.index(axis), codes.dtype, reciprocal, params.zero_point,
            params.bounds, params.dtype,
        )  # fmt: skip
        expr = ctx.kernel(func, [codes.expr, table], shape, params.dtype, out_name, "softmax")
        return replace(codes, expr=expr, dtype=params.dtype, quant=params)

    return Lazy(emit)


def layer_norm(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """layer_norm(dq(q)) over the last axis => integer moments and one rescale."""
    value = ctx.value(call.args[0])
    gamma, beta = ctx.value(call.args[1]), ctx.value(call.args[2])
    if not isinstance(value, Dequantised) or value.codes.quant is None:
        return ctx.no("the operand is not quantised")
    if not isinstance(gamma, Constant) or not isinstance(beta, Constant):
        return ctx.no("gamma or beta is computed at run time")
    codes, rank = value.codes, len(value.codes.shape)
    if [int(a) % rank for a in call.attrs.axes] != [rank - 1]:
        return ctx.no("normalisation over other axes than the last")
    channels = codes.shape[-1]

    def emit(params: QuantParams, out_name: str) -> Tensor | None:
        assert codes.quant is not None
        data = ctx.permuted(codes, ir.renormalise_perm(rank), f"{out_name}.native")
        unit = 2.0**layer_norm_kernel.FRACTION_BITS / np.float64(params.scale)
        scale = np.broadcast_to(gamma.array.astype(np.float64) * unit, (channels,))
        shift = np.broadcast_to(beta.array.astype(np.float64) * unit, (channels,))
        epsilon = channels**2 * float(call.attrs.epsilon) / np.float64(data.quant.scale) ** 2  # type: ignore[union-attr]
        func = layer_norm_kernel.layer_norm(
            data.shape, data.dtype, float(epsilon), params.zero_point, params.bounds, params.dtype
        )
        limit = float(layer_norm_kernel.LIMIT)
        arguments = [
            data.expr,
            np.ascontiguousarray(scale, np.float32),
            np.clip(np.rint(shift), -limit, limit).astype(np.int32),
        ]
        expr = ctx.kernel(func, arguments, data.shape, params.dtype, out_name, "layer_norm")
        return replace(data, expr=expr, dtype=params.dtype, quant=params)

    return Lazy(emit)


HANDLERS = {"relax.nn.softmax": softmax, "relax.nn.layer_norm": layer_norm}
