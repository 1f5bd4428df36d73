"""The register-tiled kernel of `../matrix.py` on x86."""

from __future__ import annotations

from ...targets import Target
from ..choice import Choice
from ..dot import Dot, FloatDot
from ..fused import FusedFunction
from ..layout import PackedLayout
from ..matrix import MatrixKernel, matrix_kernel_as, takes_weight
from ..spec import WeightedSpec
from ..tile import Tile
from .dot import WordDot, select_dot
from .tile import choose_tile


def matrix_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> MatrixKernel | None:
    """The anchor as a register-tiled kernel; None: no form for it."""
    return matrix_kernel_as(X86MatrixKernel, takes_weight, fused, target, choice)


class X86MatrixKernel(MatrixKernel):
    """One function being written."""

    name = "x86.matrix"

    @staticmethod
    def select_dot(spec: WeightedSpec, target: Target, packed: PackedLayout) -> Dot | None:
        return select_dot(spec, target, packed.width)

    def _unrolling(self) -> int:
        # Loop control is a larger part of a step of narrow registers.
        return 2 if self.lanes <= 8 and not self.dot.is_chained else 1

    def _tile_costs(self) -> tuple[float, int, int]:
        """Cycles an accumulator, instructions a weight register, and registers besides both."""
        dot = self.dot
        spare = (1 if dot.fused else 2) + self.corrected
        weight_instructions = 0
        if dot.is_chained:
            # Products, their additions, and widening once a chain; two of three ports each.
            return (2 * dot.chain + 1) / dot.chain / 2, 0, 3 + self.corrected
        if isinstance(dot, WordDot):
            weight_instructions = 1 + bool(dot.zero_point)
        elif isinstance(dot, FloatDot) and dot.weight_dtype != "float32":
            weight_instructions = 3
        cycles = (1 if dot.fused else 2) / (1 if self.lanes > 8 else 2)
        return cycles, weight_instructions, spare

    def _fastest_tile(self, rows: int, blocks: int) -> tuple[Tile, float]:
        """For that many output rows and registers of channels; and its cycles."""
        return choose_tile(
            rows,
            self.window.columns,
            blocks,
            self.steps,
            self.target.vector_registers,
            *self._tile_costs(),
        )

    def _spare_registers(self) -> int:
        return self._tile_costs()[-1]
