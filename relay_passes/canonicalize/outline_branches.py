"""if c: a(x) else: b(x) => if c: f(x) else: g(x), each branch a private function.

TVM 0.27 plans the memory of a function with branches as if both ran: an else branch may then use
storage that only the then branch allocated, and crash. Functions are planned one by one.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import Expr

from .rewrite import Rewriter, Var, emit_seq, renamed_seq, rewrite_module


@tvm.transform.module_pass(opt_level=0, name="OutlineBranches")
class OutlineBranches:
    """Each branch of an `If` that computes anything becomes a private Relax function.

    `branches.OnEachFunction` brings a pass that looks at `main` to these functions.
    """

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        added: dict[tvm.ir.GlobalVar, relax.Function] = {}
        taken = {global_var.name_hint for global_var in module.get_global_vars()}

        class Outline(_OutlineBranches):
            def add(self, name: str, function: relax.Function) -> tvm.ir.GlobalVar:
                while name in taken:
                    name += "_"
                taken.add(name)
                global_var = tvm.ir.GlobalVar(name)
                relax.expr._update_type(global_var, function.ty)
                added[global_var] = function
                return global_var

        result = rewrite_module(module, Outline)
        for global_var, function in added.items():
            result.update_func(global_var, function)
        return result


class _OutlineBranches(Rewriter):
    def add(self, name: str, function: relax.Function) -> tvm.ir.GlobalVar:
        raise NotImplementedError

    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        if not isinstance(value, relax.If):
            return None
        branches = [
            self._outlined(branch, f"{var.name}_{label}")
            for branch, label in ((value.true_branch, "then"), (value.false_branch, "else"))
        ]
        return relax.If(value.cond, *branches)

    def _outlined(self, branch: relax.SeqExpr, name: str) -> relax.SeqExpr:
        values = [binding.value for block in branch.blocks for binding in block.bindings]
        if all(not isinstance(value, tvm.ir.Call | relax.If) for value in values):
            return branch  # passes on what exists already
        if len(values) == 1 and isinstance(values[0].op, tvm.ir.GlobalVar):
            return branch  # outlined before
        captured = list(relax.analysis.free_vars(branch))
        # Statistics and reports go by name, so a name stands for one tensor in all functions.
        params = [relax.Var(f"{name}_{var.name}", var.ty) for var in captured]
        body = renamed_seq(branch, dict(zip(captured, params, strict=True)))
        builder = relax.BlockBuilder()
        with builder.function("branch", params, private=True):
            emit_seq(builder, body)
        (function,) = builder.get().functions.values()
        call = self._builder.normalize(relax.Call(self.add(name, function), captured))
        result = relax.Var(name, call.ty)
        return relax.SeqExpr([relax.BindingBlock([relax.VarBinding(result, call)])], result)
