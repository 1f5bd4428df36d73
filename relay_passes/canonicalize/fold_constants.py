"""op(constants) => constant, in NumPy; a quantised weight keeps its integers.

TVM's own FoldConstant compiles each fold with LLVM (seconds for a network's layout changes) and
would turn `dequantize(integers)` into float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr
from tvm_ffi import structural_equal

from ..ir import array_const, constant, dtype_of, op_name, shape_of
from .rewrite import Rewriter, Var, rewrite_module

# Results larger than their inputs are folded up to this many elements.
MAX_GROWN_ELEMENTS = 1 << 20

Array = np.ndarray


@tvm.transform.module_pass(opt_level=0, name="FoldConstants")
class FoldConstants:
    """op(constants) => constant, and `reshape|permute_dims(dequantize(w)) => dequantize(w')`.

    Never evaluates `quantize`, `dequantize` or a call of a function (an encoding).
    """

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        return rewrite_module(module, _FoldConstants)


class _FoldConstants(Rewriter):
    def __init__(self, function: relax.Function) -> None:
        super().__init__(function)
        # An unrolled loop repeats the same fold: the results must stay one shared constant.
        # By operator and constants, of which a deep network has many and no two are compared.
        self._memo: dict[tuple[str, tuple[Expr, ...]], list[tuple[Expr, Expr]]] = {}

    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        name = op_name(value)
        if name is None:
            return None
        if name == "relax.shape_of" and shape_of(value.args[0]) is not None:
            return relax.ShapeExpr(list(shape_of(value.args[0]) or ()))
        fold = FOLDS.get(name)
        if fold is not None:
            arguments = [_argument(argument) for argument in value.args]
            if all(argument is not None for argument in arguments):
                return self._once(value, lambda: self._fold(value, fold, arguments))
        if name in ("relax.permute_dims", "relax.reshape"):
            source = self.value(value.args[0])
            if op_name(source) == "relax.dequantize" and constant(source.args[0]) is not None:
                return self._move_into_dequantize(value, source, name)
        return None

    def _once(self, call: Expr, compute: Callable[[], Expr | None]) -> Expr | None:
        constants = tuple(a for a in call.args if isinstance(a, tvm.ir.Constant))
        earlier = self._memo.setdefault((str(op_name(call)), constants), [])
        for known, result in earlier:
            if structural_equal(known.attrs, call.attrs) and _same_arguments(known.args, call.args):
                return result
        result = compute()
        if result is not None:
            earlier.append((call, result))
        return result

    def _fold(self, value: Expr, fold: Callable[..., Any], arguments: Sequence[Any]) -> Expr | None:
        if isinstance(value.ty, relax.TupleType):
            pieces = fold(value.attrs, *arguments)
            return relax.Tuple([array_const(np.asarray(piece)) for piece in pieces])
        shape = shape_of(value)
        if shape is None:
            return None
        largest = max((a.size for a in _arrays(arguments)), default=0)
        if math.prod(shape) > max(largest, MAX_GROWN_ELEMENTS):
            return None
        with np.errstate(all="ignore"):
            result = fold(value.attrs, *arguments)
        if result is None or tuple(np.shape(result)) != shape:
            return None
        return array_const(np.asarray(result).astype(dtype_of(value)))

    def _move_into_dequantize(self, value: Expr, source: Expr, name: str) -> Expr | None:
        """`permute_dims(dequantize(w, s, z, axis)) => dequantize(permute_dims(w), s, z, axis')`."""
        data, scale, zero_point = source.args
        array = constant(data)
        shape, new_shape = shape_of(data), shape_of(value)
        if array is None or shape is None or new_shape is None:
            return None
        axis = int(source.attrs.axis) % max(len(shape), 1)
        per_tensor = not shape_of(scale) and not shape_of(zero_point)
        new_axis: int | None
        if name == "relax.permute_dims":
            axes = value.attrs.axes
            order = list(range(len(shape)))[::-1] if axes is None else [int(a) for a in axes]
            order = [a % len(shape) for a in order]
            new_axis = order.index(axis)
            key = relax.op.permute_dims(data, order)
            moved = self._once(key, lambda: array_const(array.transpose(order)))
        else:
            new_axis = 0 if per_tensor else _moved_axis(shape, axis, new_shape)
            key = relax.op.reshape(data, new_shape)
            moved = self._once(key, lambda: array_const(array.reshape(new_shape)))
        if new_axis is None or moved is None:
            return None
        return relax.op.dequantize(
            moved, scale, zero_point, -1 if per_tensor else new_axis, str(source.attrs.out_dtype)
        )


def _moved_axis(shape: tuple[int, ...], axis: int, new_shape: tuple[int, ...]) -> int | None:
    """Where a whole axis is after a reshape, `None` when it was cut or merged."""
    before = math.prod(shape[:axis])
    for candidate, size in enumerate(new_shape):
        if size == shape[axis] and math.prod(new_shape[:candidate]) == before:
            return candidate
    return None


def _argument(expr: Expr) -> Any:
    """NumPy array, shape, tuple or number of a constant argument, `None` for anything else."""
    array = constant(expr)
    if array is not None:
        return array
    if isinstance(expr, relax.ShapeExpr):
        sizes = [getattr(v, "value", None) for v in expr.values]
        return None if any(size is None for size in sizes) else tuple(sizes)
    if isinstance(expr, relax.Tuple):
        fields = [_argument(field) for field in expr.fields]
        return None if any(field is None for field in fields) else fields
    number = getattr(expr, "value", None)
    return number if isinstance(number, int | float) else None


def _arrays(arguments: Sequence[Any]) -> list[Array]:
    found: list[Array] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            found.append(argument)
        elif isinstance(argument, list):
            found.extend(_arrays(argument))
    return found


def _same_arguments(a: Sequence[Expr], b: Sequence[Expr]) -> bool:
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if x.same_as(y):
            continue
        if isinstance(x, relax.Tuple) and isinstance(y, relax.Tuple):
            if _same_arguments(list(x.fields), list(y.fields)):
                continue
        elif constant(x) is None and structural_equal(x, y):
            continue
        return False
    return True


# ---- what is folded: operator => NumPy -----------------------------------------------------------


def _axes(attrs: Any, name: str = "axis") -> tuple[int, ...] | None:
    axes = getattr(attrs, name)
    if axes is None:
        return None
    return (int(axes),) if isinstance(axes, int) else tuple(int(a) for a in axes)


def _reduce(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda attrs, x: function(x, axis=_axes(attrs), keepdims=bool(attrs.keepdims))


def _binary(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda attrs, x, y: function(x, y)


def _unary(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda attrs, x: function(x)


def _divide(attrs: Any, x: Array, y: Array) -> Array | None:
    return x / y if x.dtype.kind == "f" else None


def _permute(attrs: Any, x: Array) -> Array:
    return x.transpose(_axes(attrs, "axes"))


def _expand_dims(attrs: Any, x: Array) -> Array:
    axes = _axes(attrs) or ()
    return np.expand_dims(x, axes)


def _strided_slice(
    attrs: Any,
    x: Array,
    axes: Sequence[int],
    begin: Sequence[int],
    end: Sequence[int],
    strides: Sequence[int] | None = None,
) -> Array:
    index = [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        step = strides[i] if strides else 1
        stop: int | None = end[i]
        if step < 0 and end[i] < -x.shape[axis]:
            stop = None
        index[axis] = slice(begin[i], stop, step)
    return x[tuple(index)]


def _take(attrs: Any, x: Array, indices: Array) -> Array:
    axis = None if attrs.axis is None else int(attrs.axis)
    return np.take(x, indices, axis=axis)


def _split(attrs: Any, x: Array) -> list[Array]:
    sections = attrs.indices_or_sections
    parts = (
        [int(s) for s in sections]
        if hasattr(sections, "__iter__")
        else int(getattr(sections, "value", sections))
    )
    return np.array_split(x, parts, int(attrs.axis))


_NUMPY: dict[str, Callable[..., Any]] = {
    # shape and layout
    "reshape": lambda attrs, x, shape: x.reshape(shape),
    "shape_to_tensor": lambda attrs, shape: np.array(shape, "int64"),
    "permute_dims": _permute,
    "squeeze": lambda attrs, x: np.squeeze(x, _axes(attrs)),
    "expand_dims": _expand_dims,
    "flatten": lambda attrs, x: x.reshape(-1),
    "broadcast_to": lambda attrs, x, shape: np.broadcast_to(x, shape),
    "concat": lambda attrs, xs: np.concatenate(xs, axis=int(attrs.axis)),
    "strided_slice": _strided_slice,
    "split": _split,
    "take": _take,
    "tile": lambda attrs, x: np.tile(x, [int(r) for r in attrs.repeats]),
    # made from nothing
    "full": lambda attrs, shape, value: np.full(shape, value),
    "arange": lambda attrs, start, end, step: np.arange(start, end, step),
    # elements
    "astype": lambda attrs, x: x,
    "add": _binary(np.add),
    "subtract": _binary(np.subtract),
    "multiply": _binary(np.multiply),
    "divide": _divide,
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "power": _binary(np.power),
    "equal": _binary(np.equal),
    "not_equal": _binary(np.not_equal),
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "logical_and": _binary(np.logical_and),
    "logical_or": _binary(np.logical_or),
    "logical_not": _unary(np.logical_not),
    "where": lambda attrs, condition, x, y: np.where(condition, x, y),
    "clip": lambda attrs, x, low, high: np.clip(x, low, high),
    "negative": _unary(np.negative),
    "abs": _unary(np.abs),
    "sqrt": _unary(np.sqrt),
    "rsqrt": _unary(lambda x: 1 / np.sqrt(x)),
    "exp": _unary(np.exp),
    "square": _unary(np.square),
    "tanh": _unary(np.tanh),
    "floor": _unary(np.floor),
    "ceil": _unary(np.ceil),
    "round": _unary(np.round),
    # reductions
    "sum": _reduce(np.sum),
    "mean": _reduce(np.mean),
    "max": _reduce(np.max),
    "min": _reduce(np.min),
}
FOLDS = {f"relax.{name}": fold for name, fold in _NUMPY.items()}
