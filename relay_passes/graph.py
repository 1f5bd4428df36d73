"""The bindings of a Relax function as a graph: who produces a value and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import tvm
from tvm import relax

from .ir import bindings, constant, op_name, shape_of
from .pass_errors import register_errors

register_errors()

# Who reads a value: the variable that the reading binding defines, None for the function's result.
Reader: TypeAlias = "relax.Var | None"


class Graph:
    """Producers and readers of every value at the top level of `function`.

    An `If` counts as one binding that reads every variable its branches capture.
    """

    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.values: dict[relax.Var, tvm.ir.Expr] = {}
        self.readers: dict[relax.Var, list[Reader]] = {p: [] for p in function.params}
        for binding in bindings(function):
            for operand in relax.analysis.free_vars(binding.value):
                self.readers[operand].append(binding.var)
            self.values[binding.var] = binding.value
            self.readers[binding.var] = []
        for operand in relax.analysis.free_vars(function.body.body):
            self.readers[operand].append(None)

    def op(self, variable: relax.Var) -> str | None:
        """Operator whose result `variable` is; `None` for parameters and anything but a call."""
        value = self.values.get(variable)
        return None if value is None else op_name(value)

    def operands(self, variable: relax.Var) -> list[tvm.ir.Expr]:
        """The arguments of the call that defines `variable`, tuples opened."""
        value = self.values[variable]
        if isinstance(value, relax.TupleGetItem):
            return [value.tuple_value]
        if not isinstance(value, tvm.ir.Call):
            return list(relax.analysis.free_vars(value))
        flat: list[tvm.ir.Expr] = []
        for argument in value.args:
            flat.extend(argument.fields if isinstance(argument, relax.Tuple) else [argument])
        return flat

    def tensor_operands(self, variable: relax.Var) -> list[relax.Var]:
        """The operands that are computed: variables, without constants."""
        return [
            item
            for item in self.operands(variable)
            if isinstance(item, relax.Var) and self.constant(item) is None
        ]

    def constant(self, expr: tvm.ir.Expr) -> np.ndarray | None:
        """The array of a constant, also behind a variable, reshape or permutation; else `None`."""
        array = constant(expr)
        if array is not None:
            return array
        value = self.values.get(expr) if isinstance(expr, relax.Var) else expr
        if value is None or (isinstance(value, relax.Var) and value.same_as(expr)):
            return None
        if not isinstance(value, tvm.ir.Call):
            return (
                self.constant(value)
                if isinstance(value, (relax.Var, tvm.ir.GenericConst))
                else None
            )
        name = op_name(value)
        if name not in (
            "relax.reshape",
            "relax.permute_dims",
            "relax.expand_dims",
            "relax.squeeze",
        ):
            return None
        inner = self.constant(value.args[0])
        if inner is None:
            return None
        if name == "relax.permute_dims":
            axes = value.attrs.axes
            return np.transpose(inner, None if axes is None else [int(axis) for axis in axes])
        shape = shape_of(value)
        return None if shape is None else inner.reshape(shape)


Substitute = Callable[[Reader, relax.Var], relax.Var]


def rebuild(
    function: relax.Function,
    *,
    read: Substitute | None = None,
    replace: Mapping[relax.Var, tvm.ir.Expr] | None = None,
    before: Mapping[relax.Var, Iterable[relax.VarBinding]] | None = None,
    after: Mapping[relax.Var, Iterable[relax.VarBinding]] | None = None,
    result: Sequence[relax.Var] | None = None,
) -> relax.Function:
    """A copy of `function` with the same variables and some bindings changed.

    `read(reader, variable)` names the variable that `reader` reads instead; `replace` gives other
    values to variables; `before` and `after` list bindings around the definition of a variable (or
    at the function's entry, after a parameter); `result` lists the variables returned instead, as a
    tuple.
    """
    replace, before, after = replace or {}, before or {}, after or {}
    blocks = []
    pending = [item for parameter in function.params for item in after.get(parameter, ())]
    for block in function.body.blocks:
        new = list(pending)
        pending = []
        for binding in block.bindings:
            new.extend(before.get(binding.var, ()))
            if isinstance(binding, relax.VarBinding):
                value = replace.get(binding.var, binding.value)
                if read is not None:
                    value = _substitute(value, binding.var, read)
                new.append(relax.VarBinding(binding.var, value))
            else:
                new.append(binding)
            new.extend(after.get(binding.var, ()))
        is_dataflow = isinstance(block, relax.DataflowBlock)
        blocks.append(relax.DataflowBlock(new) if is_dataflow else relax.BindingBlock(new))
    if pending:
        blocks.append(relax.BindingBlock(pending))
    if result is None:
        body, ret_ty = function.body.body, function.ret_ty
    else:
        body, ret_ty = relax.Tuple(list(result)), relax.TupleType([item.ty for item in result])
    if read is not None:
        body = _substitute(body, None, read)
    return relax.Function(
        function.params, relax.SeqExpr(blocks, body), ret_ty, function.is_pure, function.attrs
    )


def _substitute(expr: tvm.ir.Expr, reader: Reader, read: Substitute) -> tvm.ir.Expr:
    if isinstance(expr, relax.Var):
        return read(reader, expr)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_substitute(item, reader, read) for item in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(_substitute(expr.tuple_value, reader, read), expr.index)
    if isinstance(expr, tvm.ir.Call):
        arguments = [_substitute(item, reader, read) for item in expr.args]
        return relax.Call(expr.op, arguments, expr.attrs, expr.ty_args)
    captured = relax.analysis.free_vars(expr)
    changed = {item: read(reader, item) for item in captured}
    if all(old.same_as(new) for old, new in changed.items()):
        return expr
    return _Renamer(changed).visit_expr(expr)


@relax.expr_functor.mutator
class _Renamer(relax.PyExprMutator):
    """Renames captured variables inside the branches of an `If`."""

    def __init__(self, names: Mapping[relax.Var, relax.Var]) -> None:
        super().__init__()
        self._names = names

    def visit_var_(self, op: relax.Var) -> relax.Var:
        return self._names.get(op, op)

    def visit_dataflow_var_(self, op: relax.Var) -> relax.Var:
        return self._names.get(op, op)
