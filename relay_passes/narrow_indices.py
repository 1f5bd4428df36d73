"""Give TVM's own legalised kernels the 32-bit index types of ours, so that both fuse.

FuseTIR insists on identical buffer types; LegalizeOps makes 64-bit shapes, TE 32-bit ones. 32 bits
also vectorise better. Kernels that hold 64-bit data keep their types.
"""

from __future__ import annotations

import tvm
from tvm import tirx

from ..schedules.spec import KERNEL_ATTR


def _narrowable(function: tirx.PrimFunc) -> bool:
    if KERNEL_ATTR in (function.attrs or {}):
        return False
    # Buffers inside are visible in the text only: TVM 0.27 has no visitor for TIR in Python.
    text = function.script()
    # TVM 0.27 narrows the extent of a scalar's only axis but not its variable.
    return ', "int64")' not in text and "T.axis.spatial(T.int64(1), T.int64(0))" not in text


@tvm.transform.module_pass(opt_level=0, name="NarrowIndices")
class NarrowIndices:
    """The pass."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        wide = {
            global_var: function
            for global_var, function in module.functions.items()
            if isinstance(function, tirx.PrimFunc) and _narrowable(function)
        }
        if not wide:
            return module
        narrow = tirx.transform.ForceNarrowIndexToInt32()(tvm.IRModule(wide))
        functions = dict(module.functions.items())
        functions |= {global_var: narrow[global_var.name_hint] for global_var in wide}
        return tvm.IRModule(functions, attrs=module.attrs)
