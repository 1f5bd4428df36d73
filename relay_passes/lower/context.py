"""State of one lowering: where every variable stands, and the few ways to move between forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import tvm
from tvm import relax, tirx

from ...errors import ModelError
from ...schedules import requantize as requantize_kernels
from ...schedules.prim import ROLES_ATTR
from ...schedules.table import table_lookup
from .. import ir
from ..encodings import match_encoding
from ..numerics import requantize as rules
from ..numerics.qlinear_add import matching_constants, qlinear_add
from .values import (
    Accumulator,
    Concat,
    Constant,
    Dequantised,
    Lazy,
    Many,
    Other,
    QuantParams,
    Sum,
    Tensor,
    Unary,
    Value,
)

# Operators that may run on any physical order as long as all operands share it.
ELEMENTWISE_OPS = frozenset(
    f"relax.{name}"
    for name in (
        "abs add astype ceil clip cos divide equal erf exp floor greater greater_equal less "
        "less_equal log maximum minimum multiply negative power round rsqrt sigmoid sign sin sqrt "
        "square subtract tanh where nn.gelu nn.gelu_tanh nn.leakyrelu nn.relu nn.relu6 nn.silu "
        "nn.softplus"
    ).split()
)

# Values that stand for codes: a float operator that reads one interrupts the integers.
QUANTISED = (Dequantised, Unary, Accumulator, Sum, Concat, Lazy)


class Lowering:
    """Walks `main` once; handlers turn one call into a `Value` (None = no integer form)."""

    def __init__(
        self,
        module: tvm.IRModule,
        builder: relax.BlockBuilder,
        rule: rules.Rule,
        handlers: dict,
        forms: dict,
        came_quantised: bool = False,
    ) -> None:
        self.module = module
        self.bb = builder
        self.rule = rule
        self.came_quantised = came_quantised
        self.handlers: dict[str, Callable[..., Value | None]] = handlers
        self.forms: dict[type, Callable[..., Tensor | None]] = forms
        self.env: dict[tvm.ir.Expr, Value] = {}
        self.origin: dict[tvm.ir.Expr, tvm.ir.Call] = {}
        self.floats: dict[tvm.ir.Expr, Tensor] = {}
        self.left_float: list[dict[str, str]] = []
        self.integer_layers: set[str] = set()
        self.reason: str | None = None
        self.names = {var.name for var in _variables(module["main"])}
        self.reserved = _reserved(self.names)

    # Values ------------------------------------------------------------------------------------

    def value(self, expr: tvm.ir.Expr) -> Value:
        """What is known about an argument."""
        if expr in self.env:
            return self.env[expr]
        if isinstance(expr, relax.Tuple):
            return Many(tuple(self.value(field) for field in expr.fields))
        array = ir.constant(expr)
        if array is not None:
            return Constant(array, expr)
        return Other(expr)

    def bind(self, var: relax.Var, call: tvm.ir.Call) -> None:
        """Lower one binding `var = call`."""
        self.origin[var] = call
        self.reason = None
        encoding = match_encoding(call, self.module)
        if encoding is not None:
            array = encoding.decode()
            self.env[var] = Constant(array, relax.const(array), encoding=encoding)
            return
        handler = self.handlers.get(ir.op_name(call) or "")
        value = handler(self, var.name, call) if handler else None
        if value is None:
            value = self.fallback(var, call)
        self.env[var] = value

    def no(self, reason: str) -> None:
        """A handler's way out: no integer form, and why."""
        self.reason = reason

    def leave_float(self, name: str, call: tvm.ir.Expr, reason: str) -> None:
        """List an operator that computes in float behind a quantised one."""
        operator = ir.op_name(call) or "call"
        self.left_float.append({"name": name, "op": operator, "reason": reason})

    # Emission ----------------------------------------------------------------------------------

    def emit(self, expr: tvm.ir.Expr, name: str) -> relax.Var:
        """A variable called `name`; one that the graph had none of makes way for those it had."""
        return self.bb.emit(
            expr, name_hint=name if name in self.names else self._free(name, "value")
        )

    def _free(self, hint: str, suffix: str) -> str:
        """`hint` for a name of ours. The builder numbers functions and variables alike: where ours
        came first, a layer of that name would lose it."""
        return f"{hint}_{suffix}" if hint.replace(".", "_") in self.reserved else hint

    def kernel(
        self,
        func: tirx.PrimFunc,
        arguments: Sequence[tvm.ir.Expr | np.ndarray],
        shape: Sequence[int],
        dtype: str,
        name: str,
        hint: str,
    ) -> relax.Var:
        """Call a naive kernel; arrays become constants."""
        global_var = self.bb.add_func(func, self._free(hint, "kernel"))
        args = [ir.array_const(a) if isinstance(a, np.ndarray) else a for a in arguments]
        if len(args) != len(func.attrs[ROLES_ATTR]):
            raise AssertionError(f"{hint}: {len(args)} arguments")
        out_type = relax.TensorType([int(dim) for dim in shape], dtype)
        return self.emit(relax.call_tir(global_var, relax.Tuple(args), out_ty=out_type), name)

    def permuted(self, tensor: Tensor, perm: tuple[int, ...], name: str = "transposed") -> Tensor:
        """The same tensor in another physical order."""
        if tensor.perm == perm:
            return tensor
        shape = tuple(tensor.shape[axis] for axis in perm)
        if [a for a in tensor.perm if tensor.shape[a] != 1] == [
            a for a in perm if tensor.shape[a] != 1
        ]:
            expr = self.reshape(tensor.expr, shape, name)
        else:
            axes = [tensor.perm.index(axis) for axis in perm]
            expr = self.emit(relax.op.permute_dims(tensor.expr, axes), name)
        return replace(tensor, expr=expr, perm=perm)

    def expanded(self, tensor: Tensor, rank: int, name: str) -> Tensor:
        """The same tensor with axes of size 1 in front, as NumPy broadcasting adds them."""
        if len(tensor.shape) == rank:
            return tensor
        tensor = self.permuted(tensor, ir.renormalise_perm(len(tensor.shape)), name)
        shape = (1,) * (rank - len(tensor.shape)) + tensor.shape
        expr = self.reshape(tensor.expr, shape, name)
        return replace(tensor, expr=expr, shape=shape, perm=ir.renormalise_perm(rank))

    def reshape(self, expr: tvm.ir.Expr, shape: Sequence[int], name: str) -> tvm.ir.Expr:
        """Free: the VM makes a view."""
        if ir.shape_of(expr) == tuple(shape):
            return expr
        return self.emit(relax.op.reshape(expr, [int(dim) for dim in shape]), name)

    # Floats ------------------------------------------------------------------------------------

    def as_float(self, expr: tvm.ir.Expr) -> Tensor:
        """The real-valued tensor of a form-F expression, in whatever physical order is at hand."""
        if expr in self.floats:
            return self.floats[expr]
        value = self.value(expr)
        name = getattr(expr, "name", "constant")
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Constant):
            rank = value.array.ndim
            return Tensor(
                value.expr, value.array.shape, str(value.array.dtype), ir.renormalise_perm(rank)
            )
        if isinstance(value, Dequantised):
            tensor = self.dequantised(value, name)
        elif isinstance(value, Accumulator):
            tensor = self.dequantised_accumulator(value, name)
        elif expr in self.origin:
            lowered = self.fallback(expr, self.origin[expr], record=False)
            if not isinstance(lowered, Tensor):
                raise ModelError(f"{name}: expected a tensor")
            tensor = lowered
        else:
            raise ModelError(f"{name}: expected a tensor, got {value}")
        self.floats[expr] = tensor
        return tensor

    def dequantised(self, value: Dequantised, name: str) -> Tensor:
        codes = value.codes
        assert codes.quant is not None
        shape = codes.physical_shape
        func = requantize_kernels.dequantize(shape, codes.dtype, (1,))
        arguments = [
            codes.expr,
            np.array([-codes.quant.zero_point], np.int32),
            np.array([codes.quant.scale], np.float32),
        ]
        expr = self.kernel(func, arguments, shape, "float32", f"{name}.float", "dequantize")
        return replace(codes, expr=expr, dtype="float32", quant=None)

    def dequantised_accumulator(self, value: Accumulator, name: str) -> Tensor:
        sums = value.sums
        physical = ir.shape_of(sums.expr)
        assert physical is not None
        bias, real = self.constants_for(sums, value.bias, value.scale)
        wide = self._width(value)
        func = requantize_kernels.dequantize(physical, sums.dtype, real.shape, wide)
        arguments = [sums.expr, bias.astype(wide), real.astype(np.float32)]
        expr = self.kernel(func, arguments, physical, "float32", f"{name}.float", "dequantize")
        if value.is_clamped:
            expr = self.emit(relax.op.clip(expr, *value.clamp), f"{name}.clipped")
        expr = self.reshape(expr, sums.physical_shape, f"{name}.view")
        return replace(sums, expr=expr, dtype="float32", quant=None)

    def native(self, expr: tvm.ir.Expr) -> tvm.ir.Expr:
        """The expression in graph form's own order and dtype, for an operator that stays as it
        is."""
        value = self.value(expr)
        if isinstance(value, Many):
            source = self.origin.get(expr, expr)
            return relax.Tuple([self.native(field) for field in source.fields])
        if isinstance(value, Other):
            return self.rebuilt(value.expr)
        if isinstance(value, Constant):
            return value.expr
        tensor = value if isinstance(value, Tensor) else self.as_float(expr)
        identity = ir.renormalise_perm(len(tensor.shape))
        return self.permuted(tensor, identity, f"{getattr(expr, 'name', 'x')}.native").expr

    def rebuilt(self, expr: tvm.ir.Expr) -> tvm.ir.Expr:
        """Tuples of variables with each field lowered; anything else as it is."""
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.native(field) for field in expr.fields])
        return expr

    def fallback(self, var: relax.Var, call: tvm.ir.Expr, record: bool = True) -> Tensor | Other:
        """The operator as it is, on real-valued operands.

        Element-wise operators keep the operands' physical order. Recorded as left in float when an
        operand was quantised.
        """
        name = var.name
        arguments = list(call.args) if isinstance(call, tvm.ir.Call) else []
        operator = ir.op_name(call)
        quantised = [a for a in _leaves(arguments) if isinstance(self.value(a), QUANTISED)]
        if record and quantised:
            self.leave_float(name, call, self.reason or "no integer form")
        shape = ir.shape_of(var)
        perm = None
        if operator in ELEMENTWISE_OPS and shape is not None:
            perm = self._common_perm(arguments, shape)
        if perm is not None and shape is not None:
            lowered = [self._in_perm(a, perm, shape) for a in arguments]
            expr = self._renew(call, lowered, name)
            return Tensor(expr, shape, ir.dtype_of(var), perm)
        if isinstance(call, tvm.ir.Call):
            expr = self._renew(call, [self.native(a) for a in arguments], name)
        elif isinstance(call, relax.TupleGetItem):
            expr = self.emit(relax.TupleGetItem(self.native(call.tuple_value), call.index), name)
        else:
            expr = self.emit(self.rebuilt(self.native(call)), name)
        if shape is None:
            return Other(expr)
        return Tensor(expr, shape, ir.dtype_of(var), ir.renormalise_perm(len(shape)))

    def _renew(self, call: tvm.ir.Call, arguments: list[tvm.ir.Expr], name: str) -> relax.Var:
        renewed = tvm.ir.Call(call.op, arguments, call.attrs, call.ty_args)
        return self.emit(renewed, name)

    def _common_perm(
        self, arguments: Sequence[tvm.ir.Expr], shape: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """The one non-native order that all full-rank operands have, or None."""
        perms = set()
        for argument in arguments:
            value = self.value(argument)
            if isinstance(value, (Other, Constant)):
                continue
            tensor = value if isinstance(value, Tensor) else self.as_float(argument)
            if len(tensor.shape) != len(shape):
                return None
            perms.add(tensor.perm)
        if len(perms) == 1:
            return perms.pop()
        if len(perms) == 2:  # rather one transpose into the conv order than two out of it
            perms.discard(ir.renormalise_perm(len(shape)))
            return perms.pop() if len(perms) == 1 else None
        return None

    def _in_perm(
        self, argument: tvm.ir.Expr, perm: tuple[int, ...], shape: tuple[int, ...]
    ) -> tvm.ir.Expr:
        value = self.value(argument)
        if isinstance(value, Other):
            return value.expr
        if isinstance(value, Constant):
            array = value.array
            if array.ndim <= 1 and array.size == 1:
                return value.expr
            padded = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
            return relax.const(np.ascontiguousarray(padded.transpose(perm)))
        tensor = value if isinstance(value, Tensor) else self.as_float(argument)
        return self.permuted(tensor, perm).expr

    # Codes -------------------------------------------------------------------------------------

    def constant_for(self, tensor: Tensor, array: np.ndarray) -> np.ndarray:
        """A constant that broadcasts against the logical shape => one for the physical tensor.

        Per-channel constants come out as [C] when the channels are the last physical axis.
        """
        rank = len(tensor.shape)
        array = np.asarray(array)
        padded = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(tensor.perm)
        physical = ir.shape_of(tensor.expr)
        assert physical is not None
        if padded.size == 1:
            return padded.reshape(1)
        if rank and padded.size == padded.shape[-1] and physical[-1] == padded.shape[-1]:
            return np.ascontiguousarray(padded.reshape(-1))
        if physical == tensor.physical_shape:
            return np.ascontiguousarray(padded)
        return np.ascontiguousarray(
            np.broadcast_to(padded, tensor.physical_shape).reshape(physical)
        )

    def constants_for(self, tensor: Tensor, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """`constant_for` of several constants, brought to one shape."""
        shape = np.broadcast_shapes(*(np.shape(array) for array in arrays))
        return tuple(self.constant_for(tensor, np.broadcast_to(array, shape)) for array in arrays)

    def quantised(self, value: Value, params: QuantParams, name: str) -> Tensor | None:
        """Codes of `value` at `params`; None when it has no integer form."""
        form = self.forms.get(type(value))
        return form(self, value, params, name) if form else None

    def concatenated(self, parts: Sequence[Tensor], axis: int, name: str) -> Tensor:
        """Join codes of equal parameters along a logical axis, in the first part's order."""
        perm = parts[0].perm
        parts = [self.permuted(part, perm) for part in parts]
        expr = self.emit(
            relax.op.concat([part.expr for part in parts], axis=perm.index(axis)), name
        )
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return replace(parts[0], expr=expr, shape=tuple(shape))

    def joined(self, value: Concat, params: QuantParams, name: str) -> Tensor:
        """Each part at the result's parameters, then side by side."""
        parts = [
            self.quantised(Dequantised(part), params, f"{name}.part{k}")
            for k, part in enumerate(value.parts)
        ]
        return self.concatenated([part for part in parts if part is not None], value.axis, name)

    def quantised_float(self, value: Tensor, params: QuantParams, name: str) -> Tensor | None:
        """Codes of real floats."""
        if value.quant is not None:
            return None
        shape = value.physical_shape
        func = requantize_kernels.quantize(shape, (1,), params.zero_point, params.dtype, self.rule)
        scale = np.array([params.scale], np.float32)
        expr = self.kernel(func, [value.expr, scale], shape, params.dtype, name, "quantize")
        return replace(value, expr=expr, dtype=params.dtype, quant=params)

    def rescaled(self, value: Dequantised, params: QuantParams, name: str) -> Tensor | None:
        """Other parameters for the same reals: a table for 8 bits, arithmetic for 16."""
        codes = value.codes
        source = codes.quant
        assert source is not None
        if source == params:
            return codes
        if np.iinfo(codes.dtype).bits > 8:
            return self.requantised(accumulated(codes), params, name)
        values = code_values(codes.dtype, source)
        return self.tabulated(Unary(codes, values), params, name)

    def tabulated(self, value: Unary, params: QuantParams, name: str) -> Tensor:
        codes = value.codes
        table = code_table(value.values, params)
        shape = codes.physical_shape
        clip = _clip_bounds(table, codes.dtype) if codes.dtype == params.dtype else None
        result = replace(codes, dtype=params.dtype, quant=params)
        if clip is not None:
            if clip == params.bounds:
                return result
            func = requantize_kernels.clip(shape, params.dtype, clip)
            expr = self.kernel(func, [codes.expr], shape, params.dtype, name, "clip")
        else:
            func = table_lookup(shape, codes.dtype, params.dtype)
            expr = self.kernel(func, [codes.expr, table], shape, params.dtype, name, "table")
        return replace(result, expr=expr)

    def clipped(self, value: Unary, name: str) -> Tensor | None:
        """Codes at their own parameters when the function only clips them (ReLU), else None."""
        codes = value.codes
        assert codes.quant is not None
        own = code_values(codes.dtype, codes.quant)
        low, high = float(value.values.min()), float(value.values.max())
        if (
            not np.array_equal(value.values, np.clip(own, low, high))
            or not np.isin([low, high], own).all()
        ):
            return None
        return self.quantised(value, codes.quant, name)

    def _bounds(self, clamp: tuple[float, float], params: QuantParams) -> tuple[int, int]:
        """Code bounds of a real clamp, rounded as the values themselves would be."""
        low, high = params.bounds
        for k, bound in enumerate(clamp):
            if math.isinf(bound):
                continue
            code = int(np.rint(np.float32(bound) / np.float32(params.scale))) + params.zero_point
            if k == 0:
                low = min(max(low, code), high)
            else:
                high = max(min(high, code), low)
        return low, high

    def requantised(self, value: Accumulator, params: QuantParams, name: str) -> Tensor | None:
        sums = value.sums
        physical = ir.shape_of(sums.expr)
        assert physical is not None
        if params.dtype == "int32":
            return self.exact(value, params, name)
        multiplier = rules.float32_multiplier(value.scale, params.scale)
        bias, real = self.constants_for(sums, value.bias, multiplier)
        wide = self._width(value)
        func = requantize_kernels.requantize(
            physical, sums.dtype, real.shape, params.zero_point, self._bounds(value.clamp, params),
            params.dtype, "float32", wide, self._fits_int32(value, multiplier),
        )  # fmt: skip
        arguments = [sums.expr, bias.astype(wide), real]
        expr = self.kernel(func, arguments, physical, params.dtype, name, "requantize")
        expr = self.reshape(expr, sums.physical_shape, f"{name}.view")
        return replace(sums, expr=expr, dtype=params.dtype, quant=params)

    def _width(self, value: Accumulator) -> str:
        """dtype in which sum plus bias cannot overflow."""
        if value.sums.dtype == "int64":
            return "int64"
        if value.limit is None:
            return "int32"
        largest = np.asarray(value.limit, np.int64) + np.abs(np.asarray(value.bias, np.int64))
        return "int32" if int(largest.max()) < 2**31 else "int64"

    def _fits_int32(self, value: Accumulator, multiplier: np.ndarray) -> bool:
        """Whether no sum can leave int32 when it is scaled."""
        if value.limit is None:
            return False
        largest = np.asarray(value.limit, np.float64) + np.abs(np.asarray(value.bias, np.float64))
        return bool(np.max(largest * np.abs(multiplier.astype(np.float64))) < 2.0**30)

    def exact(self, value: Accumulator, params: QuantParams, name: str) -> Tensor | None:
        """int32 results (ConvInteger, MatMulInteger): the sums themselves, when the scale is
        theirs."""
        sums = value.sums
        ratio = np.asarray(value.scale, np.float64) / np.float64(np.float32(params.scale))
        if value.is_clamped or sums.dtype != "int32" or not np.all(ratio == 1.0):
            return None
        bias = self.constant_for(sums, np.asarray(value.bias) + params.zero_point).astype(np.int32)
        expr: tvm.ir.Expr = sums.expr
        if bias.any():
            expr = self.emit(relax.op.add(expr, relax.const(bias)), name)
        expr = self.reshape(expr, sums.physical_shape, f"{name}.view")
        return replace(sums, expr=expr, quant=params)

    def requantised_sum(self, value: Sum, params: QuantParams, name: str) -> Tensor | None:
        frame = self._frame(value, name)
        physical = ir.shape_of(frame.expr)
        assert physical is not None
        step = np.float64(np.float32(params.scale))
        offset = self.constant_for(frame, np.asarray(value.offset, np.float64)) / step
        limits = [_largest(term) / float(step) for _, term in value.terms]
        plan = rules.plan_sum(
            limits,
            float(np.abs(offset).max()),
            params.bounds[1] - params.bounds[0],
        )
        if plan is None:
            return None
        unit = 2.0 ** plan[0]
        arguments: list[tvm.ir.Expr | np.ndarray] = []
        terms = []
        matched = self._matching_sum(value, params, plan)
        for k, ((sign, term), limit) in enumerate(zip(value.terms, plan[1], strict=True)):
            source = codes_of(term)
            scale, bias = affine(term)
            if source.shape == frame.shape:
                expr = self._shaped_like(source, frame, physical, name)
                view = replace(frame, expr=expr, dtype=source.dtype)
            else:
                view = self._broadcast_term(source, frame, name)
            exact = sign * scale / step * unit
            factor = exact if matched is None else np.array(matched[0][k])
            shift, real = self.constants_for(view, bias, factor)
            wide = self._width(term) if isinstance(term, Accumulator) else "int32"
            arguments += [view.expr, shift.astype(wide), real.astype(np.float32)]
            clamp = term.clamp if isinstance(term, Accumulator) else (-math.inf, math.inf)
            low, high = sorted(
                round(max(-limit, min(limit, sign * bound / float(step))) * unit) for bound in clamp
            )
            # A term that cannot reach its bounds needs none.
            bounded = limit < limits[k] or clamp != (-math.inf, math.inf)
            shape = ir.shape_of(view.expr)
            assert shape is not None
            terms.append(
                requantize_kernels.SumTerm(
                    source.dtype, shape, real.shape, (low, high) if bounded else None, wide
                )
            )
        fixed = np.rint(offset * unit) if matched is None else np.full_like(offset, matched[1])
        if fixed.any():
            arguments.append(fixed.astype(np.int32))
        func = requantize_kernels.requantize_sum(
            physical, terms, params.zero_point, self._bounds(value.clamp, params), params.dtype,
            plan[0], offset.shape if fixed.any() else None,
        )  # fmt: skip
        expr = self.kernel(func, arguments, physical, params.dtype, name, "requantize_sum")
        expr = self.reshape(expr, frame.physical_shape, f"{name}.view")
        return replace(frame, expr=expr, dtype=params.dtype, quant=params)

    def _matching_sum(
        self, value: Sum, params: QuantParams, plan: tuple[int, tuple[float, ...]]
    ) -> tuple[tuple[np.float32, np.float32], int] | None:
        """(multipliers, offset) that make a plain residual addition QLinearAdd; None: another
        sum, or no such constants."""
        operands = [term.codes for sign, term in value.terms if isinstance(term, Dequantised)]
        plain = len(operands) == len(value.terms) == 2 and not np.any(value.offset)
        if not plain or any(sign != 1.0 for sign, _ in value.terms) or self.rule != "float32":
            return None
        if not self.came_quantised:
            # Its floats depend on where codes are counted from, which targets may choose.
            return None
        sources = [codes.quant for codes in operands if codes.quant is not None]
        narrow = all(np.iinfo(quant.dtype).bits == 8 for quant in (*sources, params))
        if not narrow or operands[0].shape != operands[1].shape:
            return None
        bounds = self._bounds(value.clamp, params)
        ranges = [np.arange(quant.bounds[0], quant.bounds[1] + 1) for quant in sources]
        wanted = qlinear_add(
            ranges[0][:, None], ranges[1],
            [quant.scale for quant in (*sources, params)],
            [quant.zero_point for quant in (*sources, params)], bounds,
        )  # fmt: skip
        unit, step = 2.0 ** plan[0], np.float64(np.float32(params.scale))
        low, high = (bound - params.zero_point for bound in bounds)
        return matching_constants(
            wanted - params.zero_point,
            [codes - quant.zero_point for codes, quant in zip(ranges, sources, strict=True)],
            [np.float32(quant.scale / step * unit) for quant in sources],
            [(round(-limit * unit), round(limit * unit)) for limit in plan[1]],
            (low, high), plan[0],
        )  # fmt: skip

    def _frame(self, value: Sum, name: str) -> Tensor:
        """A term of the sum's full shape, by whose physical order the others go; accumulators
        first.

        When some terms broadcast, its physical shape is the plain one.
        """
        sources = [codes_of(term) for _, term in value.terms]
        shape = np.broadcast_shapes(*(source.shape for source in sources))
        anchors = [codes_of(t) for _, t in value.terms if isinstance(t, Accumulator)]
        full = [source for source in [*anchors, *sources] if source.shape == shape]
        if not full:
            rank = len(shape)
            longest = max(sources, key=lambda source: (len(source.shape), math.prod(source.shape)))
            perm = longest.perm if len(longest.shape) == rank else ir.renormalise_perm(rank)
            dummy = relax.Var("frame", relax.TensorType([shape[axis] for axis in perm], "int32"))
            return Tensor(dummy, shape, "int32", perm)
        frame = full[0]
        if any(source.shape != shape for source in sources):
            expr = self.reshape(frame.expr, frame.physical_shape, f"{name}.full")
            return replace(frame, expr=expr)
        return frame

    def _broadcast_term(self, source: Tensor, frame: Tensor, name: str) -> Tensor:
        """A smaller operand in the frame's rank and order, with axes of size 1 left to
        broadcast."""
        rank = len(frame.shape)
        expr = self.reshape(source.expr, source.physical_shape, f"{name}.full")
        source = self.expanded(replace(source, expr=expr), rank, f"{name}.term")
        return self.permuted(source, frame.perm, f"{name}.term")

    def _shaped_like(
        self, source: Tensor, frame: Tensor, physical: tuple[int, ...], name: str
    ) -> tvm.ir.Expr:
        if ir.shape_of(source.expr) == physical and source.perm == frame.perm:
            return source.expr
        full = replace(
            source, expr=self.reshape(source.expr, source.physical_shape, f"{name}.full")
        )
        return self.reshape(self.permuted(full, frame.perm).expr, physical, f"{name}.term")


def _variables(main: relax.Function) -> list[relax.Var]:
    return [*main.params, *(binding.var for binding in ir.bindings(main))]


def _reserved(names: Iterable[str]) -> frozenset[str]:
    """What nothing of ours may be called: the names of variables, also less digits at their ends,
    which a builder appends to a name it has given before."""
    plain = {name.replace(".", "_") for name in names}  # as a builder spells them
    return frozenset(
        name[:end] for name in plain for end in range(len(name.rstrip("0123456789")), len(name) + 1)
    )


def _leaves(arguments: Sequence[tvm.ir.Expr]) -> list[tvm.ir.Expr]:
    leaves: list[tvm.ir.Expr] = []
    for argument in arguments:
        leaves += _leaves(argument.fields) if isinstance(argument, relax.Tuple) else [argument]
    return leaves


def codes_of(term: Accumulator | Dequantised) -> Tensor:
    """The tensor of integers that a term of a sum holds."""
    return term.sums if isinstance(term, Accumulator) else term.codes


def affine(term: Accumulator | Dequantised) -> tuple[np.ndarray, np.ndarray]:
    """(scale, bias) with real = (integer + bias) * scale."""
    if isinstance(term, Accumulator):
        return np.asarray(term.scale, np.float64), np.asarray(term.bias, np.int64)
    quant = term.codes.quant
    assert quant is not None
    return np.array(np.float64(quant.scale)), np.array(-quant.zero_point, np.int64)


def accumulated(codes: Tensor) -> Accumulator:
    """Codes as the sums of one term each."""
    quant = codes.quant
    assert quant is not None
    centre = np.array(-quant.zero_point, np.int64)
    scale = np.array(np.float64(quant.scale))
    return Accumulator(codes, scale, centre, centre=centre, reach=np.array(quant.span))


def _largest(term: Accumulator | Dequantised) -> float:
    """A bound of the term's magnitude."""
    scale, bias = affine(term)
    if isinstance(term, Dequantised):
        assert term.codes.quant is not None
        return float(scale) * term.codes.quant.span
    known = np.iinfo(term.sums.dtype).max if term.limit is None else term.limit
    if term.reach is not None and term.centre is not None:
        known, bias = term.reach, bias - term.centre
    limit = np.asarray(known, np.float64)
    largest = float(((limit + np.abs(bias)) * np.abs(scale)).max())
    return min(largest, max(abs(bound) for bound in term.clamp))


def code_values(dtype: str, params: QuantParams) -> np.ndarray:
    """The real value of every code, smallest code first, in float32."""
    info = np.iinfo(dtype)
    codes = np.arange(info.min, info.max + 1, dtype=np.int64)
    return (codes - params.zero_point).astype(np.float32) * np.float32(params.scale)


def code_table(values: np.ndarray, params: QuantParams) -> np.ndarray:
    """Codes of reals, rounded as R.quantize does."""
    scaled = np.asarray(values, np.float32) / np.float32(params.scale)
    return np.clip(np.rint(scaled) + params.zero_point, *params.bounds).astype(params.dtype)


def _clip_bounds(table: np.ndarray, dtype: str) -> tuple[int, int] | None:
    """(low, high) when the table is min(max(code, low), high), else None."""
    info = np.iinfo(dtype)
    codes = np.arange(info.min, info.max + 1, dtype=np.int64)
    low, high = int(table.min()), int(table.max())
    return (low, high) if np.array_equal(table, np.clip(codes, low, high)) else None


def _lazy(ctx: Lowering, value: Lazy, params: QuantParams, name: str) -> Tensor | None:
    return value.emit(params, name)


# How each kind of value becomes codes at given parameters, under the rule float32.
FORMS: dict[type, Callable[..., Tensor | None]] = {
    Tensor: Lowering.quantised_float,
    Dequantised: Lowering.rescaled,
    Unary: Lowering.tabulated,
    Accumulator: Lowering.requantised,
    Sum: Lowering.requantised_sum,
    Concat: Lowering.joined,
    Lazy: _lazy,
}
