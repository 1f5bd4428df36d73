"""Sparse forms of cores without vectors and what they cost against dense kernels: instructions
under QEMU."""

from __future__ import annotations

from ...targets import Target
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec
from .sparse import loops_of


def sparse_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of layers of bytes."""
    form = loops_of(target)
    if not form.takes_dtypes(spec):
        return []
    return [SparseForm(block, 1.1, form.group) for block in (16, 8, 4, 2)]
