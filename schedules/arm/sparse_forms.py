"""Sparse forms of Cortex-M, and what dense kernels take: instructions under QEMU (README.md)."""

from __future__ import annotations

from ...targets import Target
from ..sparse_cost import DenseCost
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec
from ..window import window_of
from .mve_sparse_loops import VmlavaLoops
from .sparse_loops import SmladLoops
from .sparse_staged import StagedLoops, staged_form

_BLOCKS: dict[type[StagedLoops], tuple[int, ...]] = {
    SmladLoops: (16, 8, 4, 2),
    VmlavaLoops: (16, 8, 4),
}
# Of one position, and of several.
_DSP = DenseCost(0.98, 20), DenseCost(0.87, 12)
_MVE = DenseCost(0.137, 4), DenseCost(0.115, 3.3)


def sparse_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of layers of bytes."""
    if not SmladLoops.takes_dtypes(spec):
        return []
    has_several = window_of(spec).positions > 1
    dense = (_MVE if target.has("mve") else _DSP)[has_several]
    loops: type[StagedLoops] = SmladLoops
    if target.has("mve") and VmlavaLoops.takes_dtypes(spec):
        loops = VmlavaLoops
    return [staged_form(loops, spec, block, dense) for block in _BLOCKS[loops]]
