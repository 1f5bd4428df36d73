"""Sparse convolutions of floats with NEON: `../sparse.py`, four channels a register."""

from __future__ import annotations

from ...targets import Target
from ..choice import Choice
from ..fused import FusedFunction
from ..sparse import SparseKernel, float_dot, sparse_kernel_as
from .epilogue import NeonEpilogue


class NeonSparseKernel(SparseKernel):
    """With the epilogue of NEON."""

    epilogue_type = NeonEpilogue


def sparse_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> SparseKernel | None:
    """None: no form for it."""
    return sparse_kernel_as(NeonSparseKernel, float_dot, fused, target, choice)
