"""Fuse element-wise tails behind the kernel that feeds them.

    y = requantize(conv2d(x, w), b, m)  =>  y = fused(x, w, b, m)     one private Primitive function

TVM's FuseOps renames every variable and does not fuse a residual addition whose other operand is
used elsewhere; this pass keeps the names (they are the layers' names in reports) and fuses whenever
the intermediate has exactly one user. FuseTIR then makes one PrimFunc of each group. The order of
kernel calls with the layers they hold is left on `main` as `tvm_compress.calls` (JSON).

Runs on legalised modules (call_tir only), after AnnotateTIROpPattern.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import tvm
from tvm import relax

from ..schedules.prim import ANCHOR, BROADCAST, INJECTIVE, REDUCE
from . import ir

CALLS_ATTR = "tvm_compress.calls"


@dataclass
class _Group:
    """Consecutive call_tir bindings that become one kernel; the last one is the result."""

    members: list[relax.VarBinding]
    has_anchor: bool = False


def _is_call_tir(expr: tvm.ir.Expr) -> bool:
    return ir.op_name(expr) == "relax.call_tir"


def _arguments(call: tvm.ir.Call) -> list[tvm.ir.Expr]:
    return list(call.args[1].fields)


@tvm.transform.module_pass(opt_level=0, name="FuseEpilogues")
class FuseEpilogues:
    """The pass."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        return _Fusion(module).run()


class _Fusion:
    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module
        self.main = module["main"]
        self.builder = relax.BlockBuilder(
            tvm.IRModule({gv: f for gv, f in module.functions.items() if gv.name_hint != "main"})
        )
        self.uses: Counter = Counter()
        self.calls: list[dict] = []

    def pattern(self, call: tvm.ir.Call) -> int:
        """tvm::relax::OpPatternKind of the called kernel (8 = opaque)."""
        func = self.module[call.args[0]]
        return int((func.attrs or {}).get("op_pattern", 8))

    def is_anchor(self, call: tvm.ir.Call) -> bool:
        return ir.anchor_spec(self.module[call.args[0]]) is not None

    def run(self) -> tvm.IRModule:
        self._count_uses()
        groups = {
            index: self._groups(list(block.bindings))
            for index, block in enumerate(self.main.body.blocks)
        }
        mapping: dict[tvm.ir.Expr, tvm.ir.Expr] = {}
        renamer = _Substitute(mapping)
        with self.builder.function("main", list(self.main.params)):
            for index, block in enumerate(self.main.body.blocks):
                if isinstance(block, relax.DataflowBlock):
                    with self.builder.dataflow():
                        self._emit(groups[index], mapping, renamer, in_dataflow=True)
                else:
                    self._emit(groups[index], mapping, renamer, in_dataflow=False)
            self.builder.emit_func_output(renamer.visit_expr(self.main.body.body))
        fused = self.builder.finalize()
        attrs = {k: v for k, v in dict(self.main.attrs or {}).items() if k != "global_symbol"}
        fused["main"] = fused["main"].with_attrs(attrs | {CALLS_ATTR: json.dumps(self.calls)})
        return fused

    def _count_uses(self) -> None:
        def visit(expr: tvm.ir.Expr) -> None:
            if isinstance(expr, relax.Var):
                self.uses[expr] += 1

        for binding in ir.bindings(self.main):
            relax.analysis.post_order_visit(binding.value, visit)
        relax.analysis.post_order_visit(self.main.body.body, visit)

    def _groups(self, bindings: list[relax.VarBinding]) -> list[_Group]:
        owner: dict[tvm.ir.Expr, _Group] = {}
        order: list[_Group] = []
        for binding in bindings:
            group = _Group([binding])
            order.append(group)
            owner[binding.var] = group
            if not _is_call_tir(binding.value):
                continue
            call = binding.value
            group.has_anchor = self.is_anchor(call) or self.pattern(call) == REDUCE
            for producer in self._joinable(call, binding.var, owner):
                if producer.has_anchor and group.has_anchor:
                    continue
                group.members = producer.members + group.members
                group.has_anchor |= producer.has_anchor
                order.remove(producer)
                for member in producer.members:
                    owner[member.var] = group
        position = {id(binding): k for k, binding in enumerate(bindings)}
        for group in order:
            group.members.sort(key=lambda member: position[id(member)])
        return order

    def _joinable(
        self, call: tvm.ir.Call, var: relax.Var, owner: dict[tvm.ir.Expr, _Group]
    ) -> list[_Group]:
        """Groups whose only user is this element-wise call, those with an anchor and the latest
        first."""
        pattern = self.pattern(call)
        if pattern > INJECTIVE:
            return []
        variables = [a for a in _arguments(call) if isinstance(a, relax.Var)]
        if pattern == INJECTIVE and len(variables) != 1:
            return []
        found: list[_Group] = []
        for argument in variables:
            group = owner.get(argument)
            if group is None or self.uses[argument] != 1:
                continue
            if not group.members[-1].var.same_as(argument):
                continue
            last = group.members[-1].value
            if not _is_call_tir(last):
                continue
            if pattern == INJECTIVE:
                if group.has_anchor or self.pattern(last) > BROADCAST:
                    continue
            elif ir.shape_of(argument) != ir.shape_of(var) or self.pattern(last) > ANCHOR:
                continue
            if all(group is not other for other in found):
                found.append(group)
        latest_first = found[::-1]
        return sorted(latest_first, key=lambda group: not group.has_anchor)

    def _emit(
        self, groups: list[_Group], mapping: dict, renamer: _Substitute, in_dataflow: bool
    ) -> None:
        for group in groups:
            result = group.members[-1].var
            calls = [m for m in group.members if _is_call_tir(m.value)]
            if len(group.members) == 1:
                value = renamer.visit_expr(group.members[0].value)
            else:
                value = self._fused_call(group, mapping)
            is_output = in_dataflow and not isinstance(result, relax.DataflowVar)
            emit = self.builder.emit_output if is_output else self.builder.emit
            mapping[result] = emit(value, name_hint=result.name)
            if calls:
                layers = [m.var.name for m in calls if self.is_anchor(m.value)]
                self.calls.append({"layers": layers, "output": result.name})

    def _fused_call(self, group: _Group, mapping: dict) -> tvm.ir.Call:
        """A private Primitive function of the group's calls, and the call of it."""
        inside: dict[tvm.ir.Expr, relax.Var] = {}
        params: list[relax.Var] = []
        outer: list[tvm.ir.Expr] = []
        kernels: list[relax.VarBinding] = []
        names: list[str] = []
        for member in group.members:
            arguments = []
            for argument in _arguments(member.value):
                if argument in inside:
                    arguments.append(inside[argument])
                    continue
                param = relax.Var(f"p{len(params)}", argument.ty)
                params.append(param)
                outer.append(mapping.get(argument, argument))
                arguments.append(param)
                if isinstance(argument, relax.Var):
                    inside[argument] = param
            call = tvm.ir.Call(
                member.value.op,
                [member.value.args[0], relax.Tuple(arguments), *member.value.args[2:]],
                member.value.attrs, member.value.ty_args,
            )  # fmt: skip
            call = self.builder.normalize(call)
            is_last = member is group.members[-1]
            local = (relax.Var if is_last else relax.DataflowVar)(f"v{len(kernels)}", member.var.ty)
            inside[member.var] = local
            kernels.append(relax.VarBinding(local, call))
            names.append(member.value.args[0].name_hint)
        result = kernels[-1].var
        body = relax.SeqExpr([relax.DataflowBlock(kernels)], result)
        func = relax.Function(params, body, result.ty, is_pure=True).with_attr("Primitive", True)
        hint = "_".join(dict.fromkeys(name.rstrip("0123456789") for name in names))[:60]
        global_var = self.builder.add_func(func, f"fused_{hint}")
        return tvm.ir.Call(global_var, outer)


@relax.expr_functor.mutator
class _Substitute(relax.PyExprMutator):
    """Old variables => new ones, also inside the branches of an `If`."""

    def __init__(self, mapping: dict[tvm.ir.Expr, tvm.ir.Expr]) -> None:
        super().__init__()
        self.mapping = mapping

    def visit_var_(self, var: relax.Var) -> tvm.ir.Expr:
        return self.mapping.get(var, var)

    def visit_dataflow_var_(self, var: relax.Var) -> tvm.ir.Expr:
        return self.mapping.get(var, var)
