"""The functions that hold the branches of an `If`, and how a pass for `main` reaches them.

`canonicalize.OutlineBranches` has made each branch a private function. A pass that is written for
`main` runs on all of them in `OnEachFunction`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import tvm
from tvm import relax

from .ir import bindings

# A function with one of these is a fused group or a decoding, not a graph of layers.
_OPAQUE_ATTRS = ("Primitive", "Composite", "tvm_compress.encoding")


def branch_callees(module: tvm.IRModule, value: relax.If) -> list[tvm.ir.GlobalVar]:
    """The functions that the branches of an `If` call: then, else."""
    found = []
    for branch in (value.true_branch, value.false_branch):
        call = branch_call(module, branch)
        if call is not None:
            found.append(call.op)
    return found


def branch_call(module: tvm.IRModule, branch: tvm.ir.Expr) -> tvm.ir.Call | None:
    """The call of an outlined branch; `None` for any other."""
    if not isinstance(branch, relax.SeqExpr):
        return None
    for block in branch.blocks:
        for binding in block.bindings:
            value = binding.value
            if not isinstance(value, tvm.ir.Call) or not isinstance(value.op, tvm.ir.GlobalVar):
                continue
            callee = module[value.op]
            attrs = callee.attrs or {}
            if isinstance(callee, relax.Function) and all(k not in attrs for k in _OPAQUE_ATTRS):
                return value
    return None


def functions_in_order(module: tvm.IRModule) -> list[tvm.ir.GlobalVar]:
    """`main` and the functions of branches, each at its first call."""
    order = [module.get_global_var("main")]
    for global_var in order:  # grows
        for binding in bindings(module[global_var]):
            if isinstance(binding.value, relax.If):
                callees = branch_callees(module, binding.value)
                order += [callee for callee in callees if callee not in order]
    return order


def walk(
    module: tvm.IRModule, global_var: tvm.ir.GlobalVar | None = None
) -> Iterator[tuple[tvm.ir.GlobalVar, relax.VarBinding]]:
    """(function, binding) of `main` in execution order, both branches of an `If` in its place."""
    global_var = global_var or module.get_global_var("main")
    for binding in bindings(module[global_var]):
        if isinstance(binding.value, relax.If):
            for callee in branch_callees(module, binding.value):
                yield from walk(module, callee)
        yield global_var, binding


def as_main(module: tvm.IRModule, global_var: tvm.ir.GlobalVar) -> tvm.IRModule:
    """The module with another of its functions in the place of `main`."""
    main = module.get_global_var("main")
    if global_var.same_as(main):
        return module
    functions = {
        other: function
        for other, function in module.functions.items()
        if not other.same_as(main) and not other.same_as(global_var)
    }
    functions[tvm.ir.GlobalVar("main")] = module[global_var].with_attr("global_symbol", "main")
    return tvm.IRModule(functions, attrs=module.attrs)


@tvm.transform.module_pass(opt_level=0, name="OnEachFunction")
class OnEachFunction:
    """Run a pass that rewrites `main` on `main` and on the function of every branch."""

    def __init__(self, rewrite: tvm.transform.Pass) -> None:
        self.rewrite = rewrite

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        for branch in functions_in_order(module)[1:]:
            module = on_function(module, branch, self.rewrite)
        return self.rewrite(module)


def on_function(
    module: tvm.IRModule,
    global_var: tvm.ir.GlobalVar,
    rewrite: Callable[[tvm.IRModule], tvm.IRModule],
) -> tvm.IRModule:
    """Run a rewriting of `main` on another function; what it adds to the module is added."""
    changed = rewrite(as_main(module, global_var))
    functions = dict(module.functions.items())
    for other, function in changed.functions.items():
        if other.name_hint != "main":
            functions[other] = function
    functions[global_var] = changed["main"].without_attr("global_symbol")
    return tvm.IRModule(functions, attrs=module.attrs)
