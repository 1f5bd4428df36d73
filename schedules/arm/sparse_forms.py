"""Sparse forms of Cortex-M and what they cost against dense kernels: instructions under QEMU."""

from __future__ import annotations

from ...targets import Target
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec
from .mve_sparse_loops import VmlavaLoops
from .sparse_loops import SmladLoops


def sparse_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of layers of bytes."""
    if not SmladLoops.takes_dtypes(spec):
        return []
    if target.has("mve") and VmlavaLoops.takes_dtypes(spec):
        return [SparseForm(block, 1.2, VmlavaLoops.group) for block in (16, 8, 4)]
    return [SparseForm(block, 1.2, SmladLoops.group) for block in (16, 8, 4, 2)]
