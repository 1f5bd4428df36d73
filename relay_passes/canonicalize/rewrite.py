"""Rewrite a Relax function binding by binding, keeping the names of its variables.

TVM's expression mutators rename what they emit; layer names must survive every pass here. So a pass
subclasses `Rewriter`, whose `rewrite` sees each binding in order with its arguments already
rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import tvm
from tvm import relax
from tvm.ir import Expr
from tvm_ffi import structural_equal

from ..ir import op_name

Var: TypeAlias = tvm.ir.Var

# A function with one of these is a kernel, a fused group or a decoding, not a graph of layers.
_OPAQUE_ATTRS = ("Primitive", "Composite", "Codegen", "tvm_compress.encoding")


class Rewriter:
    """One function's bindings. Subclasses override `rewrite`."""

    def __init__(self, function: relax.Function) -> None:
        self._function = function
        self._builder = relax.BlockBuilder()
        self._values: dict[Var, Expr] = {}
        self._uses: dict[Var, int] = {}
        self._replaced: dict[Var, Expr] = {}  # variable => what stands for it from now on
        self._sequence: list[
            tuple[Var, Expr | None]
        ] = []  # (variable, MatchCast marker) emitted so far
        self._in_dataflow = False

    # ---- what a rule may use -------------------------------------------------------------------

    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        """The new value of `var`; `None` leaves it, a variable or constant replaces all uses."""
        raise NotImplementedError

    def params(self) -> list[Var]:
        """The parameters of the new function."""
        return list(self._function.params)

    def value(self, expr: Expr) -> Expr:
        """What a variable is bound to (itself for a parameter, and for anything else)."""
        if isinstance(expr, tvm.ir.Var):
            return self._values.get(expr, expr)
        return expr

    def uses(self, expr: Expr) -> int:
        """How many places read a variable."""
        return self._uses.get(expr, 0) if isinstance(expr, tvm.ir.Var) else 0

    def emit(self, expr: Expr, name: str) -> Var:
        """Bind `expr` before the binding being rewritten."""
        expr = self._normalise(expr, name)
        kind = relax.DataflowVar if self._in_dataflow else relax.Var
        var = kind(name, expr.ty)
        self._bind(var, expr)
        return var

    def replace(self, var: Var, expr: Expr) -> None:
        """Change the value of an earlier binding; the type must stay."""
        expr = self._normalise(expr, var.name)
        self._count(self._values[var], -1)
        self._count(expr, 1)
        self._values[var] = expr

    # ---- the machinery -------------------------------------------------------------------------

    def run(self) -> relax.Function:
        """The rewritten function."""
        self._count(self._function.body, 1)
        body = self._rewrite_seq(self._function.body)
        body = _plain_outputs(body)
        function = self._function
        builder = relax.BlockBuilder()
        attributes = {
            name: value
            for name, value in (function.attrs.items() if function.attrs else ())
            if name != "global_symbol"
        }
        with builder.function("main", self.params(), attrs=attributes, pure=bool(function.is_pure)):
            emit_seq(builder, body)
        return builder.get()["main"]

    def _rewrite_seq(self, seq: relax.SeqExpr) -> relax.SeqExpr:
        outer, outer_dataflow = self._sequence, self._in_dataflow
        pending: list[tuple[bool, list[tuple[Var, Expr | None]]]] = []
        for block in seq.blocks:
            self._sequence = []
            self._in_dataflow = isinstance(block, relax.DataflowBlock)
            for binding in block.bindings:
                self._rewrite_binding(binding)
            pending.append((self._in_dataflow, self._sequence))
        body = self._substitute(seq.body)
        # Values are read only now: a later rule may have changed an earlier binding.
        live = self._live(pending, body)
        blocks = []
        for dataflow, entries in pending:
            bindings = [
                relax.VarBinding(v, self._values[v]) if cast is None else cast
                for v, cast in entries
                if v in live
            ]
            if bindings:
                blocks.append((relax.DataflowBlock if dataflow else relax.BindingBlock)(bindings))
        self._sequence, self._in_dataflow = outer, outer_dataflow
        return relax.SeqExpr(blocks, body)

    def _rewrite_binding(self, binding: relax.Binding) -> None:
        var = binding.var
        if isinstance(binding, relax.MatchCast):
            cast = relax.MatchCast(var, self._substitute(binding.value), binding.ty)
            self._values[var] = var
            self._sequence.append((var, cast))
            return
        value = self._substitute(binding.value)
        new = self.rewrite(var, value)
        if new is not None:
            new = self._normalise(new, var.name)
            self._count(new, 1)
            self._count(value, -1)
            value = new
        if isinstance(value, tvm.ir.Var | tvm.ir.Constant | relax.ShapeExpr):
            self._replaced[var] = value
            if isinstance(value, tvm.ir.Var):
                self._uses[value] = self._uses.get(value, 0) - 1 + self._uses.get(var, 0)
            return
        if not structural_equal(value.ty, var.ty):
            renewed = type(var)(var.name, value.ty)
            self._replaced[var] = renewed
            self._uses[renewed] = self._uses.get(var, 0)
            var = renewed
        self._values[var] = value
        self._sequence.append((var, None))

    def _bind(self, var: Var, expr: Expr) -> None:
        self._values[var] = expr
        self._uses.setdefault(var, 0)
        self._count(expr, 1)
        self._sequence.append((var, None))

    def _normalise(self, expr: Expr, name: str) -> Expr:
        """Typed, with nested calls bound to variables of their own."""
        if isinstance(expr, tvm.ir.Call):
            arguments = [self._atom(argument, name) for argument in expr.args]
            if any(new is not old for new, old in zip(arguments, expr.args, strict=True)):
                expr = relax.Call(expr.op, arguments, expr.attrs, expr.ty_args)
        elif isinstance(expr, relax.Tuple):
            expr = relax.Tuple([self._atom(field, name) for field in expr.fields])
        elif isinstance(expr, relax.TupleGetItem):
            expr = relax.TupleGetItem(self._atom(expr.tuple_value, name), expr.index)
        return self._builder.normalize(expr)

    def _atom(self, expr: Expr, name: str) -> Expr:
        if isinstance(expr, tvm.ir.Call):
            return self.emit(expr, f"{name}_{(op_name(expr) or 'value').split('.')[-1]}")
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._atom(field, name) for field in expr.fields])
        return expr

    def _substitute(self, expr: Expr) -> Expr:
        if isinstance(expr, tvm.ir.Var):
            while expr in self._replaced:
                expr = self._replaced[expr]
            return expr
        if isinstance(expr, tvm.ir.Call):
            arguments = [self._substitute(argument) for argument in expr.args]
            if all(new is old for new, old in zip(arguments, expr.args, strict=True)):
                return expr
            return self._builder.normalize(relax.Call(expr.op, arguments, expr.attrs, expr.ty_args))
        if isinstance(expr, relax.Tuple):
            return self._builder.normalize(
                relax.Tuple([self._substitute(field) for field in expr.fields])
            )
        if isinstance(expr, relax.TupleGetItem):
            return self._builder.normalize(
                relax.TupleGetItem(self._substitute(expr.tuple_value), expr.index)
            )
        if isinstance(expr, relax.If):
            condition = self._substitute(expr.cond)
            return self._typed_if(
                condition,
                self._rewrite_seq(expr.true_branch),
                self._rewrite_seq(expr.false_branch),
                expr,
            )
        return expr

    def _typed_if(
        self, condition: Expr, true: relax.SeqExpr, false: relax.SeqExpr, old: relax.If
    ) -> Expr:
        branches = [_own_result(_plain_outputs(branch)) for branch in (true, false)]
        return self._builder.normalize(relax.If(condition, *branches))

    def _count(self, expr: Expr, step: int) -> None:
        for var in _variables(expr):
            self._uses[var] = self._uses.get(var, 0) + step

    def _live(
        self, pending: list[tuple[bool, list[tuple[Var, Expr | None]]]], body: Expr
    ) -> set[Var]:
        """Variables that the result needs, and those of impure calls."""
        live = set(_variables(body))
        for _, entries in reversed(pending):
            for var, cast in reversed(entries):
                if cast is not None:
                    live.add(var)
                    live.update(_variables(cast.value))
                    continue
                value = self._values[var]
                if var in live or not _removable(value):
                    live.add(var)
                    live.update(_variables(value))
        return live


def emit_seq(builder: relax.BlockBuilder, seq: relax.SeqExpr) -> None:
    """The bindings as they are, and the result, as the body of the function being built."""
    for block in seq.blocks:
        if isinstance(block, relax.DataflowBlock):
            with builder.dataflow():
                for binding in block.bindings:
                    builder.emit_normalized(binding)
        else:
            for binding in block.bindings:
                builder.emit_normalized(binding)
    builder.emit_func_output(seq.body)


def rewrite_module(module: tvm.IRModule, rewriter: type[Rewriter]) -> tvm.IRModule:
    """Run a rewriter over every function that is a graph of layers."""
    result = module.clone()
    for global_var, function in module.functions_items():
        if not isinstance(function, relax.Function):
            continue
        if any(function.attrs and name in function.attrs for name in _OPAQUE_ATTRS):
            continue
        new = rewriter(function).run()
        symbol = (function.attrs or {}).get("global_symbol")
        if global_var.name_hint == "main":  # always callable from outside
            symbol = "main"
        new = (
            new.with_attr("global_symbol", symbol) if symbol else new.without_attr("global_symbol")
        )
        result.update_func(global_var, new)
    return result


def _variables(expr: Expr) -> Iterator[Var]:
    """Variables that an expression reads, one for each place."""
    if isinstance(expr, tvm.ir.Var):
        yield expr
    elif isinstance(expr, tvm.ir.Call):
        for argument in expr.args:
            yield from _variables(argument)
    elif isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from _variables(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from _variables(expr.tuple_value)
    elif isinstance(expr, relax.If):
        yield from _variables(expr.cond)
        yield from _variables(expr.true_branch)
        yield from _variables(expr.false_branch)
    elif isinstance(expr, relax.SeqExpr):
        for block in expr.blocks:
            for binding in block.bindings:
                yield from _variables(binding.value)
        yield from _variables(expr.body)


def _removable(value: Expr) -> bool:
    if not isinstance(value, tvm.ir.Call):
        return not isinstance(value, relax.If)
    if isinstance(value.op, tvm.ir.Op):
        return bool(value.op.get_attr("FPurity"))
    return isinstance(value.op, tvm.ir.GlobalVar)


def _own_result(seq: relax.SeqExpr) -> relax.SeqExpr:
    """A branch must end in a variable bound in it; one that passes a value on gets a binding."""
    own = {binding.var for block in seq.blocks for binding in block.bindings}
    if isinstance(seq.body, tvm.ir.Var) and seq.body in own:
        return seq
    var = relax.Var("branch", seq.body.ty)
    block = relax.BindingBlock([relax.VarBinding(var, seq.body)])
    return relax.SeqExpr([*seq.blocks, block], var)


def _plain_outputs(seq: relax.SeqExpr) -> relax.SeqExpr:
    """Make a dataflow variable that is read outside its block an ordinary variable."""
    renamed: dict[Var, Expr] = {}
    for index, block in enumerate(seq.blocks):
        if not isinstance(block, relax.DataflowBlock):
            continue
        outside = set(_variables(seq.body))
        for later in seq.blocks[index + 1 :]:
            for binding in later.bindings:
                outside.update(_variables(binding.value))
        for binding in block.bindings:
            if isinstance(binding.var, relax.DataflowVar) and binding.var in outside:
                renamed[binding.var] = relax.Var(binding.var.name, binding.var.ty)
    if not renamed:
        return seq
    blocks = []
    for block in seq.blocks:
        bindings = [_renamed_binding(binding, renamed) for binding in block.bindings]
        blocks.append(type(block)(bindings))
    return relax.SeqExpr(blocks, _renamed(seq.body, renamed))


def _renamed_binding(binding: relax.Binding, renamed: dict[Var, Expr]) -> relax.Binding:
    var = renamed.get(binding.var, binding.var)
    if isinstance(binding, relax.MatchCast):
        return relax.MatchCast(var, _renamed(binding.value, renamed), binding.ty)
    return relax.VarBinding(var, _renamed(binding.value, renamed))


def _renamed(expr: Expr, renamed: dict[Var, Expr]) -> Expr:
    if isinstance(expr, tvm.ir.Var):
        return renamed.get(expr, expr)
    if not any(var in renamed for var in _variables(expr)):
        return expr
    builder = relax.BlockBuilder()
    if isinstance(expr, tvm.ir.Call):
        arguments = [_renamed(argument, renamed) for argument in expr.args]
        return builder.normalize(relax.Call(expr.op, arguments, expr.attrs, expr.ty_args))
    if isinstance(expr, relax.Tuple):
        return builder.normalize(relax.Tuple([_renamed(field, renamed) for field in expr.fields]))
    if isinstance(expr, relax.TupleGetItem):
        return builder.normalize(
            relax.TupleGetItem(_renamed(expr.tuple_value, renamed), expr.index)
        )
    if isinstance(expr, relax.If):
        return builder.normalize(
            relax.If(
                _renamed(expr.cond, renamed),
                renamed_seq(expr.true_branch, renamed),
                renamed_seq(expr.false_branch, renamed),
            )
        )
    return expr


def renamed_seq(seq: relax.SeqExpr, renamed: dict[Var, Expr]) -> relax.SeqExpr:
    """The same bindings reading other variables."""
    blocks = [
        type(block)([_renamed_binding(binding, renamed) for binding in block.bindings])
        for block in seq.blocks
    ]
    return relax.SeqExpr(blocks, _renamed(seq.body, renamed))
