"""Build one naive kernel: TE inputs and output => a PrimFunc tagged as ours.

The naive form is the specification of a kernel. `roles` says what each argument is (for the byte
accounting and for the passes that replace constants): data, weights, bias, scales, table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tvm import te, tirx

from .spec import KERNEL_ATTR

ROLES_ATTR = "tvm_compress.roles"

# tvm::relax::OpPatternKind
ELEMENTWISE, BROADCAST, INJECTIVE, REDUCE, ANCHOR, OPAQUE = 0, 1, 2, 3, 4, 8


def make_prim_func(
    kind: str,
    inputs: Sequence[te.Tensor],
    output: te.Tensor,
    roles: Sequence[str],
    pattern: int,
    parameters: Mapping[str, Any] | None = None,
) -> tirx.PrimFunc:
    """`roles` has one entry per input. `pattern` tells fusion what may follow or precede."""
    if len(roles) != len(inputs):
        raise ValueError(f"{kind}: {len(inputs)} inputs but {len(roles)} roles")
    spec = json.dumps({"family": kind, **(parameters or {})}, sort_keys=True)
    func = te.create_prim_func([*inputs, output])
    func = func.without_attr("global_symbol") if "global_symbol" in (func.attrs or {}) else func
    return func.with_attrs({KERNEL_ATTR: spec, ROLES_ATTR: list(roles), "op_pattern": pattern})
