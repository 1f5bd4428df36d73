"""A fused PrimFunc seen as data: its stages, the anchor among them, and values by substitution.

After FuseTIR a function is a sequence of loop nests, each around one block that stores one buffer.
A stage that only computes elements (no reduction) is an equation `buffer[i...] = value(i...)`;
reading such a buffer somewhere can be replaced by its value there. Schedules that write their own
loops use this to carry producers into the copy of the input and consumers into the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, s_tir, tirx

from .spec import KERNEL_ATTR, KernelSpec, SpecError, spec_from_json

Index = tuple[Any, ...]


@dataclass(frozen=True)
class Stage:
    """One block: `buffer[indices] = value` over `variables` (extents `extents`)."""

    name: str
    buffer: tirx.Buffer
    variables: tuple[tirx.Var, ...]
    extents: tuple[int, ...]
    indices: Index
    value: ir.Expr
    reduction: frozenset[int]
    """Which of the variables are reduced over."""
    init: ir.Expr | None
    spec: KernelSpec | None
    reads: tuple[tirx.Buffer, ...]

    @property
    def reduces(self) -> bool:
        """Whether an element is a sum, maximum... over further variables."""
        return bool(self.reduction)

    @property
    def is_map(self) -> bool:
        """Whether every element is stored once, at the position its variables name."""
        return (
            not self.reduces
            and len(self.indices) == len(self.variables)
            and all(i.same_as(v) for i, v in zip(self.indices, self.variables, strict=True))
        )


@dataclass(frozen=True)
class FusedFunction:
    """The stages of a PrimFunc in order; at most one is an anchor kernel."""

    func: tirx.PrimFunc
    stages: tuple[Stage, ...]
    producers: dict[tirx.Buffer, Stage] = field(compare=False)

    @property
    def anchor(self) -> Stage | None:
        """The stage that carries a kernel spec, or None."""
        return next((stage for stage in self.stages if stage.spec is not None), None)

    @property
    def outputs(self) -> list[tirx.Buffer]:
        """Parameters that are written."""
        return [p for p in self.func.params if p in self.producers]

    def depends_on(self, buffer: tirx.Buffer, other: tirx.Buffer) -> bool:
        """Whether `buffer` is computed from `other`, directly or not. A stage may read what it
        writes."""
        seen: set[tirx.Buffer] = set()
        waiting = [buffer]
        while waiting:
            found = waiting.pop()
            if found.same_as(other):
                return True
            stage = self.producers.get(found)
            if found not in seen and stage is not None:
                seen.add(found)
                waiting += stage.reads
        return False

    def inline(
        self,
        buffer: tirx.Buffer,
        indices: Sequence[Any],
        leaf: Callable[[tirx.Buffer, Index], ir.Expr | None],
    ) -> ir.Expr:
        """The value of `buffer[indices]` with every stage but what `leaf` answers substituted.

        `leaf` is asked first, for every load; None means: substitute the producer, or load if there
        is none.
        """
        found = leaf(buffer, tuple(indices))
        if found is not None:
            return found
        stage = self.producers.get(buffer)
        if stage is None:
            return buffer[tuple(indices)]
        if not stage.is_map:
            raise NotImplementedError(f"stage {stage.name} is not elementwise")
        binding = dict(zip(stage.variables, indices, strict=True))
        return rewrite(stage.value, binding, lambda b, i: self.inline(b, i, leaf))


def operands_of(expr: ir.Expr) -> list[ir.Expr]:
    """The expressions that one is made of."""
    if isinstance(expr, ir.Call):
        return [a for a in expr.args if isinstance(a, ir.Expr)]
    names = ("a", "b", "value", "condition", "true_value", "false_value")
    children = (getattr(expr, name, None) for name in names)
    return [child for child in children if isinstance(child, ir.Expr)]


def analyse(func: tirx.PrimFunc) -> FusedFunction | None:
    """The stages of `func`, or None when it is not a plain sequence of loop nests with constant
    extents."""
    root = func.body
    if not isinstance(root, s_tir.SBlockRealize) or root.block.iter_vars:
        return None
    body = root.block.body
    nests = list(body) if isinstance(body, tirx.SeqStmt) else [body]
    stages: list[Stage] = []
    for nest in nests:
        stage = _stage(nest)
        if stage is None:
            return None
        stages.append(stage)
    producers: dict[tirx.Buffer, Stage] = {}
    for stage in stages:
        if stage.buffer in producers:
            return None
        producers[stage.buffer] = stage
    if sum(stage.spec is not None for stage in stages) > 1:
        return None
    return FusedFunction(func, tuple(stages), producers)


def _stage(nest: tirx.Stmt) -> Stage | None:
    while isinstance(nest, tirx.For):
        nest = nest.body
    if not isinstance(nest, s_tir.SBlockRealize):
        return None
    block = nest.block
    extents = []
    for iter_var in block.iter_vars:
        if not isinstance(iter_var.dom.extent, tirx.IntImm) or int(iter_var.dom.min) != 0:
            return None
        extents.append(int(iter_var.dom.extent))
    if not isinstance(block.body, tirx.BufferStore) or block.alloc_buffers or block.match_buffers:
        return None
    store = block.body
    reduction = frozenset(
        axis
        for axis, iter_var in enumerate(block.iter_vars)
        if iter_var.iter_type != tirx.IterVar.DataPar
    )
    if bool(reduction) != (block.init is not None):
        return None
    if block.init is not None and not isinstance(block.init, tirx.BufferStore):
        return None
    return Stage(
        name=block.name_hint,
        buffer=store.buffer,
        variables=tuple(iter_var.var for iter_var in block.iter_vars),
        extents=tuple(extents),
        indices=tuple(store.indices),
        value=store.value,
        reduction=reduction,
        init=None if block.init is None else block.init.value,
        spec=_anchor_spec(block),
        reads=tuple(loads(store.value)),
    )


def _anchor_spec(block: s_tir.SBlock) -> KernelSpec | None:
    text = block.annotations.get(KERNEL_ATTR)
    if text is None:
        return None
    try:
        return spec_from_json(str(text))
    except SpecError:
        return None


_BINARY = (
    "Add", "Sub", "Mul", "Div", "Mod", "FloorDiv", "FloorMod", "Min", "Max", "EQ", "NE", "LT", "LE",
    "GT", "GE", "And", "Or", "LShift", "RShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
)  # fmt: skip


# TVM's vectoriser takes `round` but not `nearbyint`, and its LLVM back end makes the same of both:
# llvm.nearbyint, half to even.
_NEARBYINT = ir.Op.get("tirx.nearbyint")


def rewrite(
    expr: ir.Expr,
    binding: dict[tirx.Var, ir.Expr],
    load: Callable[[tirx.Buffer, Index], ir.Expr],
) -> ir.Expr:
    """`expr` with variables replaced and every buffer load built by `load` from its new indices."""

    def visit(e: ir.Expr) -> ir.Expr:
        if isinstance(e, tirx.Var):
            return binding.get(e, e)
        if isinstance(e, ir.TensorLoad):
            return load(e.source, tuple(visit(i) for i in e.indices))
        if isinstance(e, tirx.Cast):
            inner = _unrounded(e.value) if str(e.ty.dtype) == "int32" else None
            if inner is not None:
                return tirx.call_llvm_pure_intrin("int32", "llvm.lrint", visit(inner))
            return tirx.Cast(e.ty, visit(e.value))
        if isinstance(e, tirx.Select):
            return tirx.Select(visit(e.condition), visit(e.true_value), visit(e.false_value))
        if isinstance(e, tirx.Not):
            return tirx.Not(visit(e.a))
        if isinstance(e, ir.Call):
            if e.op == _NEARBYINT:
                return tirx.round(visit(e.args[0]))
            return ir.Call(
                e.op, [visit(a) for a in e.args], e.attrs, ty_args=e.ty_args, ret_ty=e.ty
            )
        if hasattr(e, "a") and hasattr(e, "b"):
            return type(e)(visit(e.a), visit(e.b))
        if isinstance(e, (tirx.IntImm, tirx.FloatImm, ir.StringImm)):
            return e
        raise NotImplementedError(f"expression {type(e).__name__}")

    return visit(expr)


def _unrounded(expr: ir.Expr) -> ir.Expr | None:
    """What is rounded half to even in `expr`, clamps by whole numbers around it kept; else None.

    int32(clamp(nearbyint(x))) = lrint(clamp(x)): one instruction on most machines.
    """
    if isinstance(expr, ir.Call) and expr.op == _NEARBYINT:
        return expr.args[0] if str(expr.ty.dtype) == "float32" else None
    if not isinstance(expr, (tirx.Min, tirx.Max)):
        return None
    if not isinstance(expr.b, tirx.FloatImm) or not float(expr.b.value).is_integer():
        return None
    inner = _unrounded(expr.a)
    return None if inner is None else type(expr)(inner, expr.b)


def loads(expr: ir.Expr) -> list[tirx.Buffer]:
    """The buffers an expression loads from, once per load."""
    found: list[tirx.Buffer] = []

    def load(buffer: tirx.Buffer, indices: Index) -> ir.Expr:
        found.append(buffer)
        return buffer[indices]

    rewrite(expr, {}, load)
    return found


def is_lookup(stage: Stage) -> bool:
    """Whether a buffer is indexed by what another one holds."""
    nested = False

    def load(buffer: tirx.Buffer, indices: Index) -> ir.Expr:
        nonlocal nested
        nested |= any(loads(index) for index in indices)
        return buffer[indices]

    rewrite(stage.value, {}, load)
    return nested


def count_nodes(expr: ir.Expr) -> int:
    """How many operations, loads and constants an expression has."""
    children: list[ir.Expr] = list(getattr(expr, "args", ()))
    for name in ("a", "b", "value", "condition", "true_value", "false_value"):
        child = getattr(expr, name, None)
        if isinstance(child, ir.Expr):
            children.append(child)
    return 1 + sum(count_nodes(child) for child in children)
