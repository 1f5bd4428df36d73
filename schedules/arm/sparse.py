"""Sparse layers of bytes on the DSP extension."""

from __future__ import annotations

from ...targets import Target
from ..choice import Choice
from ..emit import Emitter
from ..fused import FusedFunction
from ..layer_kernel import read_layer
from ..sparse import sparse_operands
from ..spec import SparseConv2dSpec
from .epilogue import DspEpilogue
from .rounding import finisher, llvm_helpers
from .sparse_loops import SmladLoops
from .sparse_staged import StagedKernel

NAME = "arm.sparse"


def sparse_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> StagedKernel[DspEpilogue] | None:
    """The sparse layer with what follows it; None: no form for it."""
    layer = read_layer(
        fused, target, choice, (SparseConv2dSpec,), SmladLoops.takes, sparse_operands, DspEpilogue
    )
    return None if layer is None else _SparseKernel(layer, SmladLoops, NAME)


class _SparseKernel(StagedKernel[DspEpilogue]):
    """One function being written."""

    def _emitter(self) -> Emitter:
        return Emitter(finisher(self.target))

    def _code(self) -> str:
        return super()._code() + llvm_helpers()
