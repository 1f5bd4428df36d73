"""Sparse forms of RISC-V's vectors and what they cost: instructions under QEMU (README.md)."""

from __future__ import annotations

from ...targets import Target
from ..sparse_cost import DenseCost, EntryCost
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec
from .dot import dot_for
from .pack import choose_lanes

# By the channels of the dense kernel's registers: it has fewer where they do not divide.
_BYTES = {32: DenseCost(0.123, 0.3), 16: DenseCost(0.172, 0.9)}
_FLOATS = {32: DenseCost(0.106, 0.3), 16: DenseCost(0.194, 0.3)}
_NARROW = 16
# LLVM calls memcpy for rows behind a border; that of a bare program takes them byte by byte.
_SPARSE_BYTES = EntryCost({32: 0.16, 16: 0.20, 8: 0.38}, 2.4, copied=9.0)
_SPARSE_FLOATS = EntryCost({32: 0.15, 16: 0.20, 8: 0.37}, 0.6, copied=24.0)


def sparse_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of float32 layers and of bytes."""
    if dot_for(spec.data_dtype, spec.weight_dtype, spec.acc_dtype, _NARROW) is None:
        return []
    is_float = spec.data_dtype == "float32"
    lanes = max(_NARROW, choose_lanes(spec, target))
    dense = (_FLOATS if is_float else _BYTES)[lanes].of(spec)
    entries = _SPARSE_FLOATS if is_float else _SPARSE_BYTES
    outputs = spec.columns * spec.groups_of_channels
    # A block that is cut off in the middle of its vectors spills.
    blocks = (n for n in entries.weights if n <= _NARROW or outputs % n == 0)
    return [entries.form(spec, block, dense) for block in blocks]
