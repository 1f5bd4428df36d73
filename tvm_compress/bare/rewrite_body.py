"""Statements and expressions of lowered TIR, visited and written anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, tirx
from tvm.tirx import stmt as s

ExprRewrite = Callable[[ir.Expr], ir.Expr]
AllocRewrite = Callable[[s.AllocBuffer], s.Stmt]


def rewrite_statement(stmt: s.Stmt, expr: ExprRewrite, alloc: AllocRewrite) -> s.Stmt:
    """`stmt` with `expr` applied to every expression, inner ones first, and `alloc` to every
    allocation. Raises `NotImplementedError` for a statement that lowered kernels do not have."""

    def visit(node: Any) -> Any:
        return rewrite_statement(node, expr, alloc)

    def value(node: Any) -> Any:
        return rewrite_expression(node, expr)

    if isinstance(stmt, s.SeqStmt):
        return s.SeqStmt([visit(part) for part in stmt.seq])
    if isinstance(stmt, s.For):
        return s.For(
            stmt.loop_var, value(stmt.min), value(stmt.extent), stmt.kind, visit(stmt.body),
            stmt.thread_binding, stmt.annotations, stmt.step,
        )  # fmt: skip
    if isinstance(stmt, s.While):
        return s.While(value(stmt.condition), visit(stmt.body))
    if isinstance(stmt, s.IfThenElse):
        other = None if stmt.else_case is None else visit(stmt.else_case)
        return s.IfThenElse(value(stmt.condition), visit(stmt.then_case), other)
    if isinstance(stmt, s.Bind):
        return s.Bind(stmt.var, value(stmt.value))
    if isinstance(stmt, s.BufferStore):
        return s.BufferStore(stmt.buffer, value(stmt.value), [value(i) for i in stmt.indices])
    if isinstance(stmt, s.Evaluate):
        return s.Evaluate(value(stmt.value))
    if isinstance(stmt, s.AttrStmt):
        return s.AttrStmt(stmt.node, stmt.attr_key, value(stmt.value), visit(stmt.body))
    if isinstance(stmt, s.AllocBuffer):
        return alloc(stmt)
    if isinstance(stmt, s.DeclBuffer):
        return stmt
    raise NotImplementedError(f"statement {type(stmt).__name__}")


def rewrite_expression(expr: ir.Expr, function: ExprRewrite) -> ir.Expr:
    """`function` applied to every node of an expression, inner ones first."""

    def visit(e: Any) -> Any:
        if isinstance(e, ir.TensorLoad):
            return function(e.source[tuple(visit(i) for i in e.indices)] if e.indices else e)
        if isinstance(e, tirx.Cast):
            return function(tirx.Cast(e.ty, visit(e.value)))
        if isinstance(e, tirx.Select):
            parts = (e.condition, e.true_value, e.false_value)
            return function(tirx.Select(*map(visit, parts)))
        if isinstance(e, tirx.Not):
            return function(tirx.Not(visit(e.a)))
        if isinstance(e, tirx.Let):
            return function(tirx.Let(e.var, visit(e.value), visit(e.body)))
        if isinstance(e, tirx.Ramp):
            return function(tirx.Ramp(visit(e.base), visit(e.stride), e.lanes))
        if isinstance(e, tirx.Broadcast):
            return function(tirx.Broadcast(visit(e.value), e.lanes))
        if isinstance(e, tirx.Shuffle):
            return function(tirx.Shuffle([visit(v) for v in e.vectors], e.indices))
        if isinstance(e, ir.Call):
            arguments = [visit(a) if isinstance(a, ir.Expr) else a for a in e.args]
            return function(ir.Call(e.op, arguments, e.attrs, ty_args=e.ty_args, ret_ty=e.ty))
        if hasattr(e, "a") and hasattr(e, "b"):
            return function(type(e)(visit(e.a), visit(e.b)))
        return function(e) if isinstance(e, ir.Expr) else e

    return visit(expr)
