"""quantize(x, s, z) int8 => quantize(x, s, z + 128) uint8: the same grid, counted from zero.

x86 multiplies unsigned bytes of data by signed bytes of weights (vpdpbusd, vpmaddubsw). Activations
that are stored unsigned are read where they lie; signed ones would have to be copied and flipped in
front of every layer. Every real value stays what it was.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr

from .canonicalize.rewrite import Rewriter, Var, rewrite_module
from .graph import Graph
from .ir import constant, op_name
from .lower import KERNEL_FORM_ATTR, REQUANTIZE_ATTR

_SHIFT = 128


@tvm.transform.module_pass(opt_level=0, name="UnsignedActivations")
class UnsignedActivations:
    """Applies to the codes that only dequantisers read, in models quantised here: those that came
    as integers keep their own."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        attributes = module["main"].attrs
        if attributes is not None and (
            REQUANTIZE_ATTR in attributes or KERNEL_FORM_ATTR in attributes
        ):
            return module
        return rewrite_module(module, _Unsigned)


class _Unsigned(Rewriter):
    def __init__(self, function: relax.Function) -> None:
        super().__init__(function)
        graph = Graph(function)
        self._chosen = {
            variable
            for variable, value in graph.values.items()
            if op_name(value) == "relax.quantize"
            and str(value.attrs.out_dtype) == "int8"
            and _is_scalar(value.args[2])
            and graph.constant(value.args[0]) is None
            and all(
                reader is not None and graph.op(reader) == "relax.dequantize"
                for reader in graph.readers[variable]
            )
        }
        self._changed: set[Expr] = set()

    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        if var in self._chosen:
            x, scale, zero_point = value.args
            codes = relax.op.quantize(x, scale, _shifted(zero_point), out_dtype="uint8")
            changed = self.emit(codes, var.name)
            self._changed.add(changed)
            return changed
        if op_name(value) == "relax.dequantize" and value.args[0] in self._changed:
            codes, scale, zero_point = value.args
            return relax.op.dequantize(codes, scale, _shifted(zero_point))
        return None


def _is_scalar(zero_point: Expr) -> bool:
    array = constant(zero_point)
    return array is not None and array.size == 1


def _shifted(zero_point: Expr) -> Expr:
    array = constant(zero_point)
    assert array is not None
    return relax.const((array.astype(np.int32) + _SHIFT).astype(np.uint8))
