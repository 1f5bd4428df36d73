"""The register-tiled kernel of `../matrix.py` with RISC-V's vectors: a tile is a few positions by
one group of registers of channels."""

from __future__ import annotations

from ...targets import Target
from ..choice import Choice
from ..dot import Dot
from ..fused import FusedFunction
from ..layout import PackedLayout
from ..matrix import MatrixKernel, matrix_kernel_as, takes_weight
from ..spec import WeightedSpec, ceil_div
from ..tile import Tile
from .dot import registers_of_group, select_dot

# Instructions of a tile outside its reduction: loops and addresses, and for each position.
_TILE, _EPILOGUE = 25, 14
# Codes of a step are loaded and widened.
_WEIGHTS = 2
_MOST_POSITIONS = 16


def matrix_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> MatrixKernel | None:
    """The anchor as a register-tiled kernel; None: no form for it."""
    return matrix_kernel_as(VectorKernel, takes_weight, fused, target, choice)


class VectorKernel(MatrixKernel):
    """Tiles for the fewest instructions."""

    name = "riscv.matrix"

    @staticmethod
    def select_dot(spec: WeightedSpec, target: Target, packed: PackedLayout) -> Dot | None:
        return select_dot(spec, packed.width)

    def _unrolling(self) -> int:
        return 2

    def _registers(self, tile: Tile) -> int:
        group = registers_of_group(self.lanes, self.target)
        # Weights as they are stored and widened; the first register is the masks'.
        return tile.positions * tile.vectors * group + tile.vectors * ceil_div(3 * group, 4) + 1

    def _fastest_tile(self, rows: int, blocks: int) -> tuple[Tile, float]:
        best, least = Tile(1, 1, 1), float("inf")
        for positions in range(1, _MOST_POSITIONS + 1):
            one = self.steps * (_WEIGHTS + 2 * positions) + _TILE + _EPILOGUE * positions
            for columns in range(1, min(self.window.columns, positions) + 1):
                tile = Tile(positions // columns, columns, 1)
                if positions % columns or tile.rows > rows:
                    continue
                if self._registers(tile) > self.target.vector_registers:
                    continue
                count = ceil_div(rows, tile.rows) * ceil_div(self.window.columns, columns)
                cost = count * blocks * one
                if cost < least:
                    best, least = tile, cost
        return best, least
