"""Store weights in the order in which the target's kernels read them.

    conv2d(x, w)  =>  conv2d_packed(x, pack(w))

Packing happens in NumPy at compile time; the kernel's description changes with it, so the module
still runs anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm
from tvm import relax

from .. import schedules
from ..schedules.prim import ROLES_ATTR
from . import ir

if TYPE_CHECKING:
    from ..targets import Target


@tvm.transform.module_pass(opt_level=0, name="PackWeights")
class PackWeights:
    """The pass, for one target."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        packing = _Packing(module, self.target)
        for global_var, function in module.functions.items():
            if isinstance(function, relax.Function):
                packing.builder_.update_func(global_var, packing.visit_expr(function))
        return relax.transform.DeadCodeElimination(["main"])(packing.builder_.get())


@relax.expr_functor.mutator
class _Packing(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        super().__init__(module)
        self.module = module
        self.target = target

    def visit_call_(self, call: tvm.ir.Call) -> tvm.ir.Expr:
        if ir.op_name(call) != "relax.call_tir":
            return super().visit_call_(call)
        kernel = self.module[call.args[0]]
        spec = ir.anchor_spec(kernel)
        arguments = list(call.args[1].fields)
        weight = ir.constant(arguments[1]) if len(arguments) > 1 else None
        if spec is None or weight is None:
            return super().visit_call_(call)
        packed = schedules.pack_weight(spec, weight, self.target)
        if packed is None:
            return super().visit_call_(call)
        packed_spec, array = packed
        func = schedules.prim_func(packed_spec).with_attr(ROLES_ATTR, kernel.attrs[ROLES_ATTR])
        global_var = self.builder_.add_func(func, call.args[0].name_hint.rstrip("0123456789"))
        data = self.visit_expr(arguments[0])
        renewed = relax.Tuple([data, relax.const(array), *arguments[2:]])
        return relax.call_tir(global_var, renewed, out_ty=call.ty_args[0])
