"""Sparse layers of bytes with Helium; what follows the sums in vectors of four channels."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ...targets import Target
from ..choice import Choice
from ..epilogue import Epilogue
from ..fused import FusedFunction
from ..layer_kernel import read_layer
from ..sparse import sparse_operands
from ..spec import SparseConv2dSpec, ceil_div
from .mve_sparse_loops import VmlavaLoops
from .mve_vector import LANES, VectorEmitter
from .rounding import finisher
from .sparse_staged import StagedKernel

NAME = "arm.mve_sparse"


def sparse_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> StagedKernel[Epilogue] | None:
    """The sparse layer with what follows it; None: no form for it."""
    layer = read_layer(
        fused, target, choice, (SparseConv2dSpec,), VmlavaLoops.takes, sparse_operands, Epilogue
    )
    return None if layer is None else _SparseKernel(layer, VmlavaLoops, NAME)


class _SparseKernel(StagedKernel[Epilogue]):
    """One function being written."""

    def _emitter(self) -> VectorEmitter:
        return VectorEmitter(finisher(self.target))

    def _declare_initial(self) -> None:
        """Nothing: sums start from zero."""

    def _initial(self, block: Any) -> Any:
        return tirx.address_of(self.sums[0])  # not looked at

    def _results(self, b: Any, y: Any, x: Any, block: Any) -> None:
        e, spec = self.e, self.spec
        assert isinstance(e, VectorEmitter)
        total = ceil_div(spec.out_channels, LANES)
        of_a_block = spec.block // LANES
        count: Any = of_a_block
        if total % of_a_block:
            count = e.bind("count", tirx.min(count, total - block * of_a_block))
        with e.loop("quad", count) as quad:
            self._stay_rolled()
            number = e.bind("number", block * of_a_block + quad)

            def write(parts: list[tuple[int, int]]) -> None:
                width = sum(width for _, width in parts)
                lanes = LANES if width == LANES else 1
                with e.constants_of_channels(spec.out_channels, self.fused.func.params):
                    with e.loop("tile", self.tiles) as tile:
                        for p in range(self.columns):
                            at = tile * (spec.block * self.columns)
                            at = e.bind("at", at + self.loops.place(quad * LANES, p))
                            column = e.bind("column", x + tile * self.columns + p)
                            for lane in range(0, width, lanes):
                                channel = number * LANES + lane
                                self._write(b, y, column, channel, self.sums, at + lane, lanes)

            e.ragged(number, total, spec.out_channels % LANES, LANES, write)
