"""Sparse forms of linear layers of few rows on x86 and what they cost, measured on Zen 4."""

from __future__ import annotations

from dataclasses import dataclass

from ...targets import Target
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec, SparseRowsSpec
from ..window import window_of
from .dot import has_byte_dot
from .sparse_bytes import CHAINS, PAIRS, QUADS

MOST_ROWS = 4
"""Beyond these, bytes are interleaved for many positions at once."""
BLOCK = SparseRowsSpec.LANES


@dataclass(frozen=True)
class _RowCost:
    """In times of a dense multiply-add of one row."""

    weight: float
    """Of a stored weight."""
    constant: float
    """Of a weight of the layer, stored or not."""

    def form(self, block: int, group: int = 1, bits: bool = True) -> SparseForm:
        return SparseForm(block, self.weight, group, self.constant, bits=bits)


# Bytes: bits of inputs, bits of weights, and offsets with and without `vpdpbusd`; floats. Weights
# in the third-level cache; from memory, bits of weights gain what they save in bytes.
_COMPRESSED = _RowCost(0.85, 0.12)
_EXPANDED_BYTES = _RowCost(0.2, 1.2)
_OFFSETS, _OFFSETS_IN_PAIRS = _RowCost(2.3, 0.05), _RowCost(1.7, 0.05)
_EXPANDED_FLOATS = _RowCost(0.2, 0.85)


def has_few_rows(spec: Conv2dSpec | MatmulSpec) -> bool:
    """Whether the layer is a product of few rows."""
    window = window_of(spec)
    return window.shape != () and window.columns == 1 and window.rows <= MOST_ROWS


def spreads_by_bits(target: Target, is_integer: bool) -> bool:
    """Whether the target has the instructions that spread or collect values by bits."""
    if target.lanes(32) < BLOCK:
        return False
    if is_integer:
        return target.has("avx512vbmi2") and has_byte_dot(target, BLOCK)
    return target.has("avx512f")


def float_row_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of float32 beside those of other layers."""
    if not isinstance(spec, MatmulSpec) or not spreads_by_bits(target, is_integer=False):
        return []
    return [_EXPANDED_FLOATS.form(1)]


def byte_row_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of bytes, in the place of those of other layers."""
    if isinstance(spec, MatmulSpec) and spreads_by_bits(target, is_integer=True):
        return [_COMPRESSED.form(BLOCK, QUADS), _EXPANDED_BYTES.form(1, QUADS)]
    if has_byte_dot(target, min(BLOCK, target.lanes(32))):
        return [_OFFSETS.form(BLOCK, QUADS, bits=False)]
    cost = _OFFSETS_IN_PAIRS
    chained = SparseForm(BLOCK, cost.weight, QUADS, cost.constant, sums=CHAINS)
    return [chained, cost.form(BLOCK, PAIRS, bits=False)]
