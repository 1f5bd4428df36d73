"""Sparse layers of bytes on cores without vectors."""

from __future__ import annotations

from ...targets import Target
from ..arm.sparse_staged import StagedKernel, StagedLoops
from ..choice import Choice
from ..fused import FusedFunction
from ..layer_kernel import read_layer
from ..sparse import sparse_operands
from ..spec import SparseConv2dSpec
from .epilogue import ScalarEpilogue
from .riscv_sparse import Rv32SparseLoops, Rv64SparseLoops
from .thumb_sparse import MlaLoops, MulsLoops

NAME = "scalar.sparse"


def loops_of(target: Target) -> type[StagedLoops]:
    """The form of the loops for a target."""
    if target.has("thumb"):
        return MlaLoops if target.has("thumb2") else MulsLoops
    return Rv64SparseLoops if target.has("rv64") else Rv32SparseLoops


def sparse_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> StagedKernel[ScalarEpilogue] | None:
    """The sparse layer with what follows it; None: no form for it."""
    form = loops_of(target)
    layer = read_layer(
        fused, target, choice, (SparseConv2dSpec,), form.takes, sparse_operands, ScalarEpilogue
    )
    return None if layer is None else _SparseKernel(layer, form, NAME)


class _SparseKernel(StagedKernel[ScalarEpilogue]):
    """One function being written."""

    def _code(self) -> str:
        return super()._code() + self.epilogue.helpers()
