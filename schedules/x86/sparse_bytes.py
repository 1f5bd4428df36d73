"""Sparse convolutions of bytes on x86 (`../sparse_bytes.py`): groups of four by `vpdpbusd`, or by
`vpmaddubsw` where the weights prove that nothing saturates; else pairs by `vpmaddwd`."""

from __future__ import annotations

from typing import Any

from ...targets import Target
from ..byte_shuffles import LANE, interleave_by_unpacking, unpacked_slot
from ..choice import Choice
from ..dot import Dot
from ..fused import FusedFunction
from ..saturation import NarrowSums
from ..sparse_bytes import SparseBytesKernel, sparse_bytes_kernel_as
from ..sparse_conv2d import BYTES
from ..spec import SparseConv2dSpec
from .dot import ByteDot, ChainDot, WordDot, has_byte_dot, has_pairs

QUADS, PAIRS = ByteDot.group, WordDot.group
"""Entries that an instruction takes."""
CHAINS = NarrowSums((0, 255), 2)
"""Of `vpmaddubsw`: unsigned data, products added in pairs."""


def sparse_bytes_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> SparseBytesKernel | None:
    """None: no form for it."""
    return sparse_bytes_kernel_as(UnpackingKernel, select_dot, fused, target, choice)


def select_dot(spec: SparseConv2dSpec, target: Target) -> Dot | None:
    """What multiplies groups of the spec's size, in the widest registers; None: nothing does."""
    if spec.by_channel or (spec.data_dtype, spec.weight_dtype, spec.acc_dtype) != BYTES:
        return None
    for lanes in (n for n in (16, 8, 4) if n <= target.lanes(32) and spec.block % n == 0):
        if spec.group == PAIRS:
            return WordDot(lanes, "int8", False)
        if spec.group == QUADS and has_byte_dot(target, lanes):
            return ByteDot(lanes, "int8", True)
        if spec.group == QUADS and spec.chain and has_pairs(target, lanes):
            return ChainDot(lanes, "int8", False, chain=spec.chain)
    return None


class UnpackingKernel(SparseBytesKernel):
    """Groups of four in the order in which unpacking instructions leave them."""

    def _registers(self, positions: int, chain: int) -> int:
        products = 0 if self.dot.fused else 1
        return super()._registers(positions, chain) + products

    def _interleave(self) -> str:
        if self.dot.group != QUADS:
            return super()._interleave()
        return interleave_by_unpacking(self.run)

    def _slot(self, position: int) -> int:
        return unpacked_slot(position, self.run) if self.dot.group == QUADS else position

    def _first_slot(self, position: Any) -> Any:
        if self.dot.group != QUADS:
            return position
        of_a_vector = position % LANE // 4 * (self.run // 4)
        return of_a_vector + position // LANE * 4 + position % 4
