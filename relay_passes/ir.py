"""Small helpers over Relax IR (TVM 0.27), shared by the passes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import tvm
from tvm import relax

from ..schedules.spec import KERNEL_ATTR, KernelSpec, SpecError, spec_from_json

# Attribute of `main`: names (JSON) of the inputs to be quantised with 16 bits.
WIDE_INPUTS_ATTR = "tvm_compress.wide_inputs"


def op_name(expr: tvm.ir.Expr) -> str | None:
    """`"relax.nn.conv2d"` for a call of that operator, `None` for anything else."""
    if isinstance(expr, tvm.ir.Call) and isinstance(expr.op, tvm.ir.Op):
        return str(expr.op.name)
    return None


def constant(expr: tvm.ir.Expr) -> np.ndarray | None:
    """The array of a Relax constant, `None` for anything else."""
    if isinstance(expr, tvm.ir.GenericConst):
        return expr.value.numpy()
    return None


def array_const(array: np.ndarray | np.generic) -> tvm.ir.GenericConst:
    """A Relax constant of the array's own dtype (`relax.const` alone narrows int64 and float64)."""
    return relax.const(np.array(array, order="C"), str(array.dtype))


def shape_of(expr: tvm.ir.Expr) -> tuple[int, ...] | None:
    """Static shape of a tensor expression, `None` when unknown or not a tensor."""
    shape = getattr(expr.ty, "shape", None)
    values = getattr(shape, "values", None)
    if values is None:
        return None
    dims = [getattr(value, "value", None) for value in values]
    if any(not isinstance(dim, int) for dim in dims):
        return None
    return tuple(int(dim) for dim in dims)  # type: ignore[arg-type]


def dtype_of(expr: tvm.ir.Expr) -> str:
    """Element type of a tensor expression."""
    return str(expr.ty.dtype)


def ints(values: Sequence[object]) -> tuple[int, ...]:
    """Attribute list (IntImm, int) => plain ints."""
    return tuple(int(value) for value in values)  # type: ignore[call-overload]


def immediate(expr: tvm.ir.Expr) -> float | None:
    """The value of an immediate number; `None` for anything computed."""
    value = getattr(expr, "value", None)
    return float(value) if isinstance(value, int | float) else None


def constant_slices(
    call: tvm.ir.Expr, shape: Sequence[int]
) -> dict[int, tuple[int, int, int]] | None:
    """Axis => (begin, end, step) of a constant forward `strided_slice` of a tensor of `shape`, with
    the bounds inside the axis; `None` for any other."""
    fields: list[list[int]] = []
    for argument in call.args[1:]:
        numbers = [immediate(value) for value in getattr(argument, "fields", [None])]
        if None in numbers:
            return None
        fields.append([int(number) for number in numbers if number is not None])
    axes, begins, ends = fields[:3]
    steps = fields[3] if len(fields) > 3 else [1] * len(axes)
    slices = {}
    for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True):
        if step < 1:
            return None
        axis %= len(shape)
        begin, end, _ = slice(begin, end, step).indices(shape[axis])
        slices[axis] = (begin, max(end, begin), step)
    return slices


def bindings(function: relax.Function) -> Iterator[relax.VarBinding]:
    """Variable bindings of all blocks at the function's top level, in order."""
    for block in function.body.blocks:
        yield from block.bindings


def variable_beside(variable: tvm.ir.Var, name: str, ty: tvm.ir.Type) -> tvm.ir.Var:
    """A new one for the block that binds `variable`: of dataflow where that is."""
    kind = relax.DataflowVar if isinstance(variable, relax.DataflowVar) else relax.Var
    return kind(name, ty)


def renormalise_perm(rank: int) -> tuple[int, ...]:
    """The identity permutation of `rank` axes."""
    return tuple(range(rank))


def anchor_spec(function: tvm.ir.BaseFunc) -> KernelSpec | None:
    """The spec of a kernel with multiply-accumulates (conv, matmul ...), `None` for other
    functions."""
    text = (function.attrs or {}).get(KERNEL_ATTR)
    if text is None:
        return None
    try:
        return spec_from_json(str(text))
    except SpecError:
        return None


def wide_inputs(function: relax.Function) -> frozenset[str]:
    """The inputs that are to be quantised with 16 bits."""
    attributes = function.attrs or {}
    text = str(attributes[WIDE_INPUTS_ATTR]) if WIDE_INPUTS_ATTR in attributes else "[]"
    return frozenset(json.loads(text))


def noted_words(module: tvm.IRModule, attribute: str) -> dict[str, str]:
    """Layer => words that a pass noted in an attribute of `main` (JSON); empty without it."""
    text = (module["main"].attrs or {}).get(attribute, "{}")
    return {str(name): str(words) for name, words in json.loads(str(text)).items()}
