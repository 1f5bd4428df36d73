"""Store weights in the order in which the target's kernels read them.

    conv2d(x, w)              =>  conv2d_packed(x, pack(w))
    conv2d(x, codes, table)   =>  conv2d_packed(x, pack(codes), pack(table))
    conv2d(x, codes, scales)  =>  conv2d_packed(x, decode(pack(codes), pack(scales)))

Packing happens in NumPy at compile time; the kernel's description changes with it, so the module
still runs anywhere. The last form is for weight-only codes that no kernel of the target reads:
every call decodes them into a float weight. `tvm_compress.decoded` of `main` (JSON) lists these
layers. A float weight with enough zeros for a kernel that skips them becomes

    conv2d(x, w)              =>  sparse_conv2d(x, values, offsets, starts)

where `ChooseSparse` says so (`sparse_choices`), or where it is expected to pay and nobody looked;
another weight with zeros, in the same way,

    conv2d(x, w)              =>  conv2d_packed(x, decode(values, words, starts))

`tvm_compress.sparse_kernels` (JSON) says of these layers what share of the weights is stored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax

from .. import schedules
from ..schedules.prim import ROLES_ATTR
from ..schedules.stored_weight import STORED, StoredWeight, expected_share, stored_weight
from . import ir
from .costs import TOLERATED
from .ir import array_const
from .sparse_choices import read_choices

if TYPE_CHECKING:
    from ..targets import Target

DECODED_ATTR = "tvm_compress.decoded"
SPARSE_ATTR = "tvm_compress.sparse_kernels"


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
        packed = packing.builder_.get()
        packed["main"] = packed["main"].with_attrs(
            {
                DECODED_ATTR: json.dumps(packing.decoded),
                SPARSE_ATTR: json.dumps(packing.sparse),
            }
        )
        return relax.transform.DeadCodeElimination(["main"])(packed)


@relax.expr_functor.mutator
class _Packing(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        super().__init__(module)
        self.module = module
        self.target = target
        self.decoded: list[str] = []
        self.sparse: dict[str, float] = {}
        self.layer = ""
        self.choices = read_choices(module["main"], target.name)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        self.layer = binding.var.name
        super().visit_var_binding_(binding)

    def visit_call_(self, call: tvm.ir.Call) -> tvm.ir.Expr:
        if ir.op_name(call) != "relax.call_tir":
            return super().visit_call_(call)
        kernel = self.module[call.args[0]]
        spec = ir.anchor_spec(kernel)
        if not isinstance(spec, schedules.WeightedSpec):
            return super().visit_call_(call)
        others = call.args[1].fields[1:]
        arrays = [ir.constant(argument) for argument in others]
        parts = [array for array in arrays if array is not None]
        if not parts or len(parts) != len(others):
            return super().visit_call_(call)
        choice = self.choices.get(self.layer)
        chosen = None if choice is None else choice.form
        sparse = schedules.sparse_parts(spec, parts, self.target, chosen)
        if sparse is not None:
            self.sparse[self.layer] = round(sparse[1][0].size / parts[0].size, 4)
            roles = ["data", "weights", "indices", "indices"]
            return self._kernel(call, sparse[0], [relax.const(part) for part in sparse[1]], roles)
        decoded = schedules.decode_weight(spec, parts, self.target)
        if decoded is not None:
            weight = self._decoding(decoded.prim_func(), decoded.parts, decoded.spec)
            return self._kernel(call, decoded.spec, [weight], ["data", "weights"])
        packed = schedules.pack_parts(spec, parts, self.target)
        if packed is None:
            return super().visit_call_(call)
        packed_spec, stored = packed
        if len(stored) == 1:
            zeros_out = self._without_zeros(packed_spec, stored[0], chosen)
            if zeros_out is not None:
                weight = self._decoding(zeros_out[0].prim_func(), zeros_out[1], packed_spec)
                return self._kernel(call, packed_spec, [weight], ["data", "weights"])
        roles = list(kernel.attrs[ROLES_ATTR])[: 1 + len(stored)]  # tables may have been opened
        return self._kernel(call, packed_spec, [relax.const(part) for part in stored], roles)

    def _without_zeros(
        self, spec: schedules.WeightedSpec, weight: np.ndarray, chosen: str | None
    ) -> tuple[StoredWeight, list[np.ndarray]] | None:
        """The packed weight of a layer that runs dense without its zeros; None: it keeps them."""
        if chosen not in (None, STORED):
            return None
        found = stored_weight(spec, weight, self.target)
        if found is None or chosen == STORED:
            return found
        return found if expected_share(spec, self.target) <= TOLERATED - 1 else None

    def _decoding(
        self,
        decode: tvm.tirx.PrimFunc,
        parts: Sequence[np.ndarray],
        spec: schedules.WeightedSpec,
    ) -> tvm.ir.Expr:
        """The weight that `spec` reads, decoded from `parts` before every call of the layer."""
        self.decoded.append(self.layer)
        global_var = self.builder_.add_func(decode, "decode_weight")
        constants = relax.Tuple([array_const(part) for part in parts])
        weight_type = relax.TensorType(list(spec.weight_shape), spec.weight_storage_dtype)
        return self.builder_.emit(
            relax.call_tir(global_var, constants, out_ty=weight_type),
            name_hint=f"{self.layer}.decoded",
        )

    def _kernel(
        self,
        call: tvm.ir.Call,
        spec: schedules.KernelSpec,
        weights: list[tvm.ir.Expr],
        roles: list[str],
    ) -> tvm.ir.Expr:
        """The layer's call with another kernel and other weights."""
        func = schedules.prim_func(spec).with_attr(ROLES_ATTR, roles)
        global_var = self.builder_.add_func(func, call.args[0].name_hint.rstrip("0123456789"))
        data = self.visit_expr(call.args[1].fields[0])
        renewed = relax.Tuple([data, *weights])
        return relax.call_tir(global_var, renewed, out_ty=call.ty_args[0])
