"""Element-wise operators on quantised tensors.

A function of one tensor of codes is evaluated once for every code: sigmoid, hard-swish, GELU or any
graph of such operators becomes one table. On accumulators, ReLU and clip narrow the result's
bounds, additions of constants go into the bias and multiplications into the scale, so nothing is
left to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import tvm

from ...schedules.product import product
from ...schedules.table import channel_table_lookup, table_lookup
from .. import ir
from .context import Lowering, accumulated, code_table, code_values, codes_of
from .quantise import clip_codes
from .values import (
    Accumulator,
    Constant,
    Dequantised,
    Lazy,
    QuantParams,
    Sum,
    Tensor,
    Unary,
    Value,
)

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "abs": np.abs, "ceil": np.ceil, "cos": np.cos, "erf": _erf, "exp": np.exp, "floor": np.floor,
    "log": np.log, "negative": np.negative, "round": np.rint, "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": _sigmoid, "sign": np.sign, "sin": np.sin, "sqrt": np.sqrt, "square": np.square,
    "tan": np.tan, "tanh": np.tanh, "nn.relu": lambda x: np.maximum(x, 0),
    "nn.relu6": lambda x: np.clip(x, 0, 6),
    "nn.gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), "nn.gelu_tanh": _gelu_tanh,
    "nn.silu": lambda x: x * _sigmoid(x),
}  # fmt: skip
BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide,
    "maximum": np.maximum, "minimum": np.minimum, "power": np.power,
}  # fmt: skip


def number(expr: tvm.ir.Expr) -> float:
    """A scalar constant or immediate."""
    array = ir.constant(expr)
    return float(array.reshape(())) if array is not None else float(expr.value)


def _evaluate(call: tvm.ir.Call, operands: Sequence[np.ndarray]) -> np.ndarray | None:
    """The operator on float64 arrays."""
    name = (ir.op_name(call) or "").removeprefix("relax.")
    if name in UNARY:
        return UNARY[name](operands[0])
    if name in BINARY:
        return BINARY[name](*operands)
    if name == "clip":
        return np.clip(operands[0], number(call.args[1]), number(call.args[2]))
    if name == "nn.leakyrelu":
        return np.where(operands[0] > 0, operands[0], operands[0] * float(call.attrs.alpha))
    if name == "nn.softplus":
        return _softplus(operands[0] * float(call.attrs.beta)) / float(call.attrs.beta)
    return None


def _same_codes(values: Sequence[Value]) -> Tensor | None:
    """The one tensor of codes that all non-constant values are functions of, else None."""
    codes = [value.codes for value in values if isinstance(value, (Dequantised, Unary))]
    constants = [value for value in values if isinstance(value, Constant) and value.array.size == 1]
    if not codes or len(codes) + len(constants) != len(values):
        return None
    first = codes[0]
    same = all(c.expr is first.expr or c.expr.same_as(first.expr) for c in codes[1:])
    return first if same and all(c.shape == first.shape for c in codes) else None


def _tabulate(ctx: Lowering, call: tvm.ir.Call, values: Sequence[Value]) -> Unary | None:
    codes = _same_codes(values)
    if codes is None or codes.quant is None or np.iinfo(codes.dtype).bits > 16:
        return None
    operands = []
    for value in values:
        if isinstance(value, Constant):
            operands.append(value.array.astype(np.float64).reshape(()))
        elif isinstance(value, Unary):
            operands.append(value.values.astype(np.float64))
        else:
            operands.append(code_values(codes.dtype, codes.quant).astype(np.float64))
    with np.errstate(all="ignore"):
        result = _evaluate(call, operands)
    if result is None or not np.isfinite(result).all():
        return None
    entries = 1 << np.iinfo(codes.dtype).bits
    single = None if any(isinstance(value, Unary) for value in values) else call
    return Unary(codes, np.broadcast_to(result, (entries,)).astype(np.float32), single)


def _clamped(value: Accumulator | Sum, low: float, high: float) -> Accumulator | Sum:
    old_low, old_high = value.clamp
    return replace(value, clamp=(min(max(old_low, low), high), max(min(old_high, high), low)))


def _bound_of(values: Sequence[Value]) -> tuple[Value, float] | None:
    """(tensor, scalar) of a maximum/minimum with a constant."""
    for tensor, other in (values, values[::-1]):
        if isinstance(other, Constant) and other.array.size == 1:
            return tensor, float(other.array.reshape(()))
    return None


def unary(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """f(dq(q)) => table; relu/clip of an accumulator => bounds."""
    operator = ir.op_name(call)
    value = ctx.value(call.args[0])
    if isinstance(value, (Accumulator, Sum)):
        if operator == "relax.nn.relu":
            return _clamped(value, 0.0, math.inf)
        if operator == "relax.nn.relu6":
            return _clamped(value, 0.0, 6.0)
        if operator == "relax.clip":
            return _clamped(value, number(call.args[1]), number(call.args[2]))
        return None
    if operator == "relax.clip" and isinstance(value, Tensor) and value.quant is not None:
        return clip_codes(ctx, name, value, number(call.args[1]), number(call.args[2]))
    return _tabulate(ctx, call, [value])


def bound(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """maximum/minimum with a constant: as clip."""
    values = [ctx.value(argument) for argument in call.args]
    found = _bound_of(values)
    if found and isinstance(found[0], (Accumulator, Sum)):
        if ir.op_name(call) == "relax.maximum":
            return _clamped(found[0], found[1], math.inf)
        return _clamped(found[0], -math.inf, found[1])
    return _tabulate(ctx, call, values)


def _bias_codes(constant: Constant, scale: np.ndarray, rank: int) -> np.ndarray | None:
    """A float (or int32-coded) bias in units of `scale`; None when it would not fit int32."""
    if (
        constant.codes is not None
        and constant.codes.dtype == np.int32
        and constant.scale is not None
    ):
        own = np.asarray(constant.scale, np.float64)
        flat = np.ravel(np.broadcast_to(scale, np.broadcast_shapes(scale.shape, (1,))))
        sizes_fit = own.size in (1, flat.size) or flat.size == 1
        if (
            sizes_fit
            and not np.any(constant.zero_point)
            and np.allclose(own, flat, rtol=1e-4, atol=0)
        ):
            return constant.codes.astype(np.int64)
    array = constant.array.astype(np.float64)
    codes = np.rint(array / scale)
    return codes.astype(np.int64) if np.abs(codes).max(initial=0) < 2**31 else None


def _aligned(array: np.ndarray, rank: int) -> np.ndarray:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def add(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """acc + const => bias; dq + dq, acc + dq => one rescaled sum."""
    sign = -1.0 if ir.op_name(call) == "relax.subtract" else 1.0
    left, right = (ctx.value(argument) for argument in call.args)
    table = _tabulate(ctx, call, [left, right])
    if table is not None:
        return table
    if isinstance(left, Constant) and sign > 0:
        left, right = right, left
    if isinstance(right, Constant):
        return _add_constant(ctx, name, left, right, sign)
    terms: list[tuple[float, Accumulator | Dequantised]] = []
    offset = np.zeros(())
    for factor, value in ((1.0, left), (sign, right)):
        if isinstance(value, Sum) and not value.is_clamped:
            terms += [(factor * s, term) for s, term in value.terms]
            offset = offset + factor * value.offset
            continue
        term = _term(ctx, name, value)
        if term is None:
            return None
        terms.append((factor, term))
    return Sum(tuple(terms), offset)


def _term(ctx: Lowering, name: str, value: Value) -> Accumulator | Dequantised | None:
    """What a sum can take: a function of codes becomes their clip, or a table of 24-bit
    integers."""
    if isinstance(value, (Accumulator, Dequantised)):
        return value
    if not isinstance(value, Unary):
        return None
    codes = value.codes
    assert codes.quant is not None
    own = ctx.clipped(value, f"{name}.clip")
    if own is not None:
        return Dequantised(own)
    step = float(np.abs(value.values).max()) / 2**23 or 1.0
    table = np.rint(value.values.astype(np.float64) / step).astype(np.int32)
    shape = codes.physical_shape
    func = table_lookup(shape, codes.dtype, "int32")
    expr = ctx.kernel(func, [codes.expr, table], shape, "int32", f"{name}.table", "table")
    sums = replace(codes, expr=expr, dtype="int32", quant=None)
    return Accumulator(sums, np.array(step), np.zeros((), np.int64), limit=np.array(2**23))


def _shape(term: Accumulator | Dequantised) -> tuple[int, ...]:
    return codes_of(term).shape


def _fits(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether a constant broadcasts against `shape` without enlarging it."""
    try:
        return array.ndim <= len(shape) and np.broadcast_shapes(shape, array.shape) == shape
    except ValueError:
        return False


def _add_constant(
    ctx: Lowering, name: str, left: Value, right: Constant, sign: float
) -> Value | None:
    if isinstance(left, Sum):
        shape = np.broadcast_shapes(*(_shape(term) for _, term in left.terms))
        if left.is_clamped or not _fits(right.array, shape):
            return None
        offset = left.offset + sign * right.array.astype(np.float64)
        return replace(left, offset=offset)
    term = _term(ctx, name, left)
    if term is None or not _fits(right.array, _shape(term)):
        return None
    rank = len(_shape(term))
    # Only sums of products are fine enough for a constant in their units; other integers get an
    # offset.
    if isinstance(term, Accumulator) and not term.is_clamped and term.layer is not None:
        bias = _bias_codes(right, np.asarray(term.scale), rank)
        if bias is not None:
            return replace(term, bias=term.bias + int(sign) * _aligned(bias, rank))
    return Sum(((1.0, term),), sign * _aligned(right.array.astype(np.float64), rank))


def multiply(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """acc * const => scale; dq * dq => exact integer product, rescaled behind it."""
    left, right = (ctx.value(argument) for argument in call.args)
    table = _tabulate(ctx, call, [left, right])
    if table is not None:
        return table
    if isinstance(left, Constant) and ir.op_name(call) == "relax.multiply":
        left, right = right, left
    if isinstance(right, Constant) and isinstance(left, (Accumulator, Dequantised)):
        shape = _shape(left)
        factor = right.array.astype(np.float64)
        if not _fits(factor, shape):
            return ctx.no("its constant operand is larger than the tensor")
        factor = _aligned(factor, len(shape))
        if ir.op_name(call) == "relax.divide":
            if not factor.all():
                return None
            factor = 1.0 / factor
        if isinstance(left, Dequantised):
            assert left.codes.quant is not None
            left = accumulated(left.codes)
        return None if left.is_clamped else replace(left, scale=left.scale * factor)
    if (
        ir.op_name(call) == "relax.multiply"
        and isinstance(left, Dequantised)
        and isinstance(right, Dequantised)
    ):
        return product_of(ctx, name, left.codes, right.codes)
    return None


def astype(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """int32(sums) of scale 1 (ConvInteger) => the sums; float32(such sums) => integers of scale
    1."""
    value, dtype = ctx.value(call.args[0]), str(call.attrs.dtype)
    if isinstance(value, Accumulator) and dtype == "int32":
        return ctx.quantised(value, QuantParams(1.0, 0, "int32"), name)
    if isinstance(value, Tensor) and value.dtype == "int32" and dtype == "float32" and value.quant:
        scale, bias = np.array(value.quant.scale), np.array(-value.quant.zero_point, np.int64)
        return Accumulator(replace(value, quant=None), scale, bias)
    return None


def prelu(ctx: Lowering, name: str, call: tvm.ir.Call) -> Value | None:
    """A slope per channel => a table per channel; one slope => one table."""
    value, slope = ctx.value(call.args[0]), ctx.value(call.args[1])
    if not isinstance(value, Dequantised) or not isinstance(slope, Constant):
        return ctx.no("the operand is not quantised, or the slopes are computed at run time")
    codes = value.codes
    if codes.quant is None or np.iinfo(codes.dtype).bits > 16:
        return ctx.no(f"no table for {codes.dtype} codes")
    reals = code_values(codes.dtype, codes.quant).astype(np.float64)
    slopes = slope.array.astype(np.float64).ravel()
    if slopes.size == 1:
        return Unary(codes, np.where(reals > 0, reals, reals * slopes[0]).astype(np.float32))
    axis = int(call.attrs.axis) % len(codes.shape)

    def emit(params: QuantParams, out_name: str) -> Tensor | None:
        rows = np.where(reals > 0, reals, reals * slopes[:, None]).astype(np.float32)  # [C, codes]
        table = code_table(rows, params)
        shape = codes.physical_shape
        func = channel_table_lookup(shape, codes.perm.index(axis), codes.dtype, params.dtype)
        expr = ctx.kernel(func, [codes.expr, table], shape, params.dtype, out_name, "channel_table")
        return replace(codes, expr=expr, dtype=params.dtype, quant=params)

    return Lazy(emit)


def product_of(ctx: Lowering, name: str, a: Tensor, b: Tensor) -> Accumulator | None:
    """(a - z_a) * (b - z_b), exact."""
    assert a.quant is not None and b.quant is not None
    if max(np.iinfo(t.dtype).bits for t in (a, b)) > 16:
        return ctx.no("integer product needs operands of at most 16 bits")
    shape = np.broadcast_shapes(a.shape, b.shape)
    rank = len(shape)
    lead, other = (a, b) if a.shape == shape else (b, a)
    lead, other = (ctx.expanded(t, rank, f"{name}.operand") for t in (lead, other))
    other = ctx.permuted(other, lead.perm, f"{name}.operand")
    assert lead.quant is not None and other.quant is not None
    limit = math.prod(quant.span for quant in (a.quant, b.quant))
    dtype = "int32" if limit < 2**31 else "int64"
    physical = tuple(shape[axis] for axis in lead.perm)
    func = product(
        (lead.physical_shape, other.physical_shape),
        (lead.dtype, other.dtype),
        (lead.quant.zero_point, other.quant.zero_point),
        physical,
        dtype,
    )
    expr = ctx.kernel(func, [lead.expr, other.expr], physical, dtype, f"{name}.product", "product")
    scale = np.array(np.float64(a.quant.scale) * np.float64(b.quant.scale))
    sums = Tensor(expr, shape, dtype, lead.perm)
    return Accumulator(sums, scale, np.zeros((), np.int64), limit=np.array(limit))


HANDLERS = {f"relax.{name}": unary for name in [*UNARY, "clip", "nn.leakyrelu", "nn.softplus"]} | {
    "relax.add": add,
    "relax.subtract": add,
    "relax.multiply": multiply,
    "relax.divide": multiply,
    "relax.maximum": bound,
    "relax.minimum": bound,
    "relax.astype": astype,
    "relax.nn.prelu": prelu,
    "relax.power": lambda ctx, name, call: _tabulate(ctx, call, [ctx.value(a) for a in call.args]),
}
