"""identity(x) => x; chains of reshapes, permutations, bounds and slices in their shortest form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr
from tvm_ffi import structural_equal

from ..ir import (
    array_const,
    constant,
    constant_slices,
    dtype_of,
    immediate,
    ints,
    op_name,
    shape_of,
)
from .rewrite import Rewriter, Var, rewrite_module

# These only give the same elements, in the same order, another shape.
_RESHAPES = frozenset(
    "relax." + name for name in ("reshape", "flatten", "squeeze", "expand_dims", "nn.batch_flatten")
)


@tvm.transform.module_pass(opt_level=0, name="RemoveIdentities")
class RemoveIdentities:
    """identity(x) => x.

    Same-shape reshape, same-dtype cast, identity permutation, dropout, zero pad, concat of one,
    clip without bounds, `x + 0`, `x * 1`, `x * 0`, concat of a split. Squeeze, expand_dims and
    flatten become `reshape`; consecutive reshapes and permutations become one; `min(max(x, a), b)`
    becomes `clip`.
    """

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        return rewrite_module(module, _RemoveIdentities)


class _RemoveIdentities(Rewriter):
    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        if isinstance(value, relax.TupleGetItem):
            return self._item(value)
        name = op_name(value)
        if name is None:
            return None
        if name in _RESHAPES:
            return self._reshape(value, name)
        rule = _RULES.get(name)
        return None if rule is None else rule(self, value)

    def _item(self, value: relax.TupleGetItem) -> Expr | None:
        source = self.value(value.tuple_value)
        if isinstance(source, relax.Tuple):
            return source.fields[value.index]
        if op_name(source) == "relax.nn.dropout" and value.index == 0:
            return source.args[0]
        if op_name(source) == "relax.split" and len(source.ty.fields) == 1:
            return source.args[0]
        return None

    def _reshape(self, value: Expr, name: str) -> Expr | None:
        shape = shape_of(value)
        if shape is None:
            return None
        x = value.args[0]
        if shape_of(x) == shape:
            return x
        inner = self.value(x)
        if op_name(inner) in _RESHAPES:
            if shape_of(inner.args[0]) == shape:
                return inner.args[0]
            return relax.op.reshape(inner.args[0], shape)
        return None if name == "relax.reshape" else relax.op.reshape(x, shape)

    def permute(self, value: Expr) -> Expr | None:
        x = value.args[0]
        shape = shape_of(x)
        if shape is None:
            return None
        axes = _permutation(value, len(shape))
        if axes == list(range(len(shape))):
            return x
        moved = [axis for axis in axes if shape[axis] != 1]
        if moved == sorted(moved):  # only axes of size one change place
            return relax.op.reshape(x, [shape[axis] for axis in axes])
        inner = self.value(x)
        if op_name(inner) == "relax.permute_dims":
            first = _permutation(inner, len(shape))
            combined = [first[axis] for axis in axes]
            if combined == list(range(len(shape))):
                return inner.args[0]
            return relax.op.permute_dims(inner.args[0], combined)
        return None

    def same_type(self, value: Expr) -> Expr | None:
        x = value.args[0]
        return x if structural_equal(x.ty, value.ty) else None

    def same_shape(self, value: Expr) -> Expr | None:
        x = value.args[0]
        return x if shape_of(x) is not None and shape_of(x) == shape_of(value) else None

    def strided_slice(self, value: Expr) -> Expr | None:
        """Bounds inside the axis; slices of different axes in one."""
        x = value.args[0]
        shape = shape_of(x)
        slices = None if shape is None else constant_slices(value, shape)
        if shape is None or slices is None:
            return None
        if all(part == (0, shape[axis], 1) for axis, part in slices.items()):
            return x
        inner = self.value(x)
        if op_name(inner) == "relax.strided_slice" and self.uses(x) == 1:
            inner_shape = shape_of(inner.args[0])
            earlier = None if inner_shape is None else constant_slices(inner, inner_shape)
            if earlier is not None and not set(earlier) & set(slices):
                return _slice(inner.args[0], {**earlier, **slices})
        given = [immediate(bound) for bound in value.args[3].fields]
        if given != [float(end) for _, end, _ in slices.values()]:
            return _slice(x, slices)
        return None

    def pad(self, value: Expr) -> Expr | None:
        return None if any(ints(value.attrs.pad_width)) else value.args[0]

    def concat(self, value: Expr) -> Expr | None:
        fields = list(value.args[0].fields) if isinstance(value.args[0], relax.Tuple) else []
        if len(fields) == 1:
            return fields[0]
        items = [self.value(field) for field in fields]
        if not items or not all(isinstance(item, relax.TupleGetItem) for item in items):
            return None
        whole = {item.tuple_value for item in items}
        source = self.value(items[0].tuple_value)
        if (
            len(whole) == 1
            and [item.index for item in items] == list(range(len(source.ty.fields)))
            and op_name(source) == "relax.split"
            and _axis(source) == _axis(value)
        ):
            return source.args[0]
        return None

    def clip(self, value: Expr) -> Expr | None:
        low, high = (immediate(argument) for argument in value.args[1:3])
        dtype = dtype_of(value)
        least, most = -math.inf, math.inf
        if dtype.startswith(("int", "uint")):
            least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        bounded = low is None or high is None or low > least or high < most
        return None if bounded else value.args[0]

    def add(self, value: Expr) -> Expr | None:
        return self._neutral(value, 0, (0, 1))

    def subtract(self, value: Expr) -> Expr | None:
        return self._neutral(value, 0, (1,))

    def multiply(self, value: Expr) -> Expr | None:
        """The zeros of an initial state take all that is multiplied by them along."""
        shape = shape_of(value)
        for argument in value.args:
            array = constant(argument)
            if array is not None and array.size and not array.any() and shape is not None:
                return array_const(np.zeros(shape, array.dtype))
        return self._neutral(value, 1, (0, 1))

    def divide(self, value: Expr) -> Expr | None:
        return self._neutral(value, 1, (1,))

    def _neutral(self, value: Expr, neutral: int, positions: tuple[int, ...]) -> Expr | None:
        for position in positions:
            array = constant(value.args[position])
            other = value.args[1 - position]
            if array is None or not array.size or not (array == neutral).all():
                continue
            if structural_equal(other.ty, value.ty):
                return other
        return None

    def maximum(self, value: Expr) -> Expr | None:
        x, bound = _bounded(value)
        if bound is None or not dtype_of(value).startswith("float"):
            return None
        if bound == -math.inf:
            return x
        inner = self.value(x)
        if op_name(inner) == "relax.minimum" and self.uses(x) == 1:
            y, high = _bounded(inner)
            if high is not None and bound <= high < math.inf:
                return relax.op.clip(y, bound, high)
        return relax.op.nn.relu(x) if bound == 0 else None

    def minimum(self, value: Expr) -> Expr | None:
        x, bound = _bounded(value)
        if bound is None or not dtype_of(value).startswith("float"):
            return None
        if bound == math.inf:
            return x
        inner = self.value(x)
        if self.uses(x) != 1:
            return None
        if op_name(inner) == "relax.maximum":
            y, low = _bounded(inner)
            if low is not None and -math.inf < low <= bound:
                return relax.op.clip(y, low, bound)
        if op_name(inner) == "relax.nn.relu" and bound >= 0:
            return relax.op.clip(inner.args[0], 0, bound)
        return None

    def relu6(self, value: Expr) -> Expr:
        return relax.op.clip(value.args[0], 0, 6)


_RULES: dict[str, Callable[[_RemoveIdentities, Expr], Expr | None]] = {
    "relax.permute_dims": _RemoveIdentities.permute,
    "relax.astype": _RemoveIdentities.same_type,
    "relax.broadcast_to": _RemoveIdentities.same_shape,
    "relax.tile": _RemoveIdentities.same_shape,
    "relax.strided_slice": _RemoveIdentities.strided_slice,
    "relax.nn.pad": _RemoveIdentities.pad,
    "relax.concat": _RemoveIdentities.concat,
    "relax.clip": _RemoveIdentities.clip,
    "relax.add": _RemoveIdentities.add,
    "relax.subtract": _RemoveIdentities.subtract,
    "relax.multiply": _RemoveIdentities.multiply,
    "relax.divide": _RemoveIdentities.divide,
    "relax.maximum": _RemoveIdentities.maximum,
    "relax.minimum": _RemoveIdentities.minimum,
    "relax.nn.relu6": _RemoveIdentities.relu6,
}


def _slice(x: Expr, slices: dict[int, tuple[int, int, int]]) -> Expr:
    axes = sorted(slices)
    begin, end, step = ([slices[axis][i] for axis in axes] for i in range(3))
    return relax.op.strided_slice(x, axes, begin, end, step)


def _permutation(call: Expr, rank: int) -> list[int]:
    axes = call.attrs.axes
    return list(reversed(range(rank))) if axes is None else [int(a) % rank for a in axes]


def _axis(call: Expr) -> int:
    rank = len(shape_of(call.args[0]) or ()) if op_name(call) == "relax.split" else 0
    rank = rank or len(shape_of(call) or ())
    return int(call.attrs.axis) % max(rank, 1)


def _bounded(call: Expr) -> tuple[Expr, float | None]:
    """`(x, bound)` of `maximum(x, bound)` with one constant bound for all elements."""
    for position in (1, 0):
        array = constant(call.args[position])
        x = call.args[1 - position]
        if array is None or not array.size or (array != array.reshape(-1)[0]).any():
            continue
        if shape_of(x) == shape_of(call):
            return x, float(np.asarray(array).reshape(-1)[0])
    return call, None
