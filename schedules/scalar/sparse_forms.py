"""Sparse forms of cores without vectors, and what dense kernels take: instructions under QEMU
(README.md)."""

from __future__ import annotations

from ...targets import Target
from ..arm.sparse_staged import StagedLoops, staged_form
from ..sparse_cost import DenseCost
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec
from ..window import window_of
from .riscv_sparse import Rv32SparseLoops, Rv64SparseLoops
from .sparse import loops_of
from .thumb_sparse import MlaLoops, MulsLoops

_BLOCKS = (16, 8, 4, 2)
# Of one position, and of several.
_DENSE: dict[type[StagedLoops], tuple[DenseCost, DenseCost]] = {
    MulsLoops: (DenseCost(3.6, 300), DenseCost(3.65, 60)),
    MlaLoops: (DenseCost(2.25, 65), DenseCost(1.85, 22)),
    Rv32SparseLoops: (DenseCost(3.3, 70), DenseCost(2.65, 23)),
    Rv64SparseLoops: (DenseCost(3.3, 16), DenseCost(1.57, 15)),
}


def sparse_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of layers of bytes."""
    loops = loops_of(target)
    if not loops.takes_dtypes(spec):
        return []
    dense = _DENSE[loops][window_of(spec).positions > 1]
    return [staged_form(loops, spec, block, dense) for block in _BLOCKS]
