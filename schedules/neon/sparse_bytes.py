"""Sparse convolutions of bytes with NEON (`../sparse_bytes.py`): groups of four by `sdot`, else
pairs by `smull` and `sadalp`, data as operands by lanes."""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..choice import Choice
from ..dot import Dot
from ..emit import dtype_bits, vector
from ..fused import FusedFunction
from ..sparse_bytes import SparseBytesKernel, sparse_bytes_kernel_as
from ..spec import SparseConv2dSpec, ceil_div
from .dot import LANES, ByteDot, MixedByteDot, OutputsDot, OutputsDot32
from .epilogue import NeonEpilogue

_VECTOR_BYTES = 16
# LLVM takes smaller vectors apart.
_LEAST_BITS = 64


def sparse_bytes_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> SparseBytesKernel | None:
    """None: no form for it."""
    return sparse_bytes_kernel_as(LaneKernel, select_dot, fused, target, choice)


def select_dot(spec: SparseConv2dSpec, target: Target) -> Dot | None:
    """What multiplies groups of the spec's size without changing the data; None: nothing does."""
    if (spec.weight_dtype, spec.acc_dtype) != ("int8", "int32"):
        return None
    if spec.group == ByteDot.group and target.has("dotprod"):
        if spec.data_dtype == "int8":
            return ByteDot(LANES, "int8", True)
        if spec.data_dtype == "uint8" and target.has("i8mm"):
            return MixedByteDot(LANES, "int8", True)
    if spec.group == OutputsDot.group and spec.data_dtype == "int8" and spec.chain:
        kind = OutputsDot if target.has("aarch64") else OutputsDot32
        return kind(2 * LANES if spec.block % 8 == 0 else LANES, "int8", True, chain=spec.chain)
    return None


class LaneKernel(SparseBytesKernel):
    """One load of data brings a group of several positions."""

    epilogue_type = NeonEpilogue
    epilogue_lanes = 16

    def _registers(self, positions: int, chain: int) -> int:
        sums = positions * self.vectors * (self.dot.lanes // LANES)
        # Loads and lanes of data under way, and products.
        return sums + chain * self.vectors + (2 + chain if self.dot.is_chained else 2)

    def _operands(self, woven: tirx.Buffer, at: Any) -> list[ir.Expr]:
        dot, size = self.dot, self.dot.group
        bits = size * dtype_bits(dot.data_dtype)
        most = _VECTOR_BYTES * 8 // bits
        found: list[ir.Expr] = []
        for first in range(0, self.positions, most):
            count = min(most, self.positions - first)
            loaded = vector(woven, at + first * size, count * size)
            if count * bits < _LEAST_BITS:
                parts = (vector(woven, at + (first + i) * size, size) for i in range(count))
                words = [self.e.bind("x", tirx.reinterpret(f"int{bits}", part)) for part in parts]
                found += [_every_lane(dot, tirx.Broadcast(word, dot.lanes)) for word in words]
                continue
            register = self.e.bind("words", tirx.reinterpret(f"int{bits}x{count}", loaded))
            for lane in range(count):
                index = [tirx.const(lane, "int32")] * dot.lanes
                spread = tirx.Shuffle([register] * ceil_div(dot.lanes, count), index)
                found.append(_every_lane(dot, spread))
        return found


def _every_lane(dot: Dot, words: ir.Expr) -> ir.Expr:
    return tirx.reinterpret(f"{dot.data_dtype}x{dot.group * dot.lanes}", words)
