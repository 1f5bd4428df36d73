"""Sparse convolutions with RISC-V's vectors: an entry's weights along a group of registers, its
data from scalar registers (`../sparse.py`), floats and bytes alike."""

from __future__ import annotations

from ...targets import Target
from ..choice import Choice
from ..dot import Dot
from ..fused import FusedFunction
from ..sparse import SparseKernel, sparse_kernel_as
from ..spec import SparseConv2dSpec, ceil_div
from .dot import MOST_REGISTERS, dot_for, registers_of_group

LANES = (32, 16, 8, 4)


def sparse_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> SparseKernel | None:
    """None: no form for it."""
    return sparse_kernel_as(VectorSparseKernel, _select_dot, fused, target, choice)


def _select_dot(spec: SparseConv2dSpec, target: Target) -> Dot | None:
    widest = MOST_REGISTERS * target.vector_bits // 32
    lanes = next((n for n in LANES if n <= widest and spec.block % n == 0), None)
    if lanes is None or spec.group > 1:
        return None
    return dot_for(spec.data_dtype, spec.weight_dtype, spec.acc_dtype, lanes)


class VectorSparseKernel(SparseKernel):
    """Tiles of groups of registers."""

    unrolling = 2

    @property
    def finishes_singly(self) -> bool:
        return self.spec.is_integer  # floats have less to do

    def _registers(self, positions: int, vectors: int) -> int:
        group = registers_of_group(self.lanes, self.target)
        # Weights as they are stored and widened; the first register is the masks'.
        return positions * vectors * group + vectors * ceil_div(3 * group, 4) + 1
