"""The opening of all kernel templates: an anchor of the right kind, its operands, what follows it.

`read_layer` has the guards that templates share, `LayerKernel` the fields, `TiledKernel` how tiles
of positions are counted and written; a template's file holds what is its own: which specs it takes,
what it decides and how it writes the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from tvm import ir, tirx

from ..targets import Target
from .choice import Choice
from .emit import Emitter
from .epilogue import Epilogue
from .fused import FusedFunction, Stage
from .spec import KernelSpec
from .window import Window

SpecT = TypeVar("SpecT", bound=KernelSpec)
OperandsT = TypeVar("OperandsT")
EpilogueT = TypeVar("EpilogueT", bound=Epilogue)


@dataclass(frozen=True)
class Layer(Generic[SpecT, OperandsT, EpilogueT]):
    """A fused function that a template takes, in parts."""

    fused: FusedFunction
    spec: SpecT
    operands: OperandsT
    epilogue: EpilogueT
    target: Target
    choice: Choice | None


def read_layer(
    fused: FusedFunction,
    target: Target,
    choice: Choice | None,
    specs: tuple[type[SpecT], ...],
    takes: Callable[[SpecT], object],
    find: Callable[[FusedFunction, Stage, SpecT], OperandsT | None],
    epilogue_type: type[EpilogueT],
) -> Layer[SpecT, OperandsT, EpilogueT] | None:
    """The layer around an anchor of one of the `specs` that the template `takes` (a truth, or what
    it multiplies by); None: another anchor, arguments that `find` does not know, or a stage behind
    the anchor that is no map."""
    anchor = fused.anchor
    if anchor is None or not isinstance(anchor.spec, specs) or not takes(anchor.spec):
        return None
    operands = find(fused, anchor, anchor.spec)
    if operands is None:
        return None
    epilogue = epilogue_type(fused, anchor, target)
    if any(not stage.is_map for stage in epilogue.rest):
        return None
    return Layer(fused, anchor.spec, operands, epilogue, target, choice)


class LayerKernel(Generic[SpecT, OperandsT, EpilogueT]):
    """One function being written."""

    def __init__(self, layer: Layer[SpecT, OperandsT, EpilogueT]) -> None:
        self.fused, self.spec, self.operands = layer.fused, layer.spec, layer.operands
        self.epilogue, self.target = layer.epilogue, layer.target


class TiledKernel(LayerKernel[SpecT, OperandsT, EpilogueT]):
    """One that takes neighbouring positions at once: of a row, or of a layer without neighbours."""

    e: Emitter

    def __init__(self, layer: Layer[SpecT, OperandsT, EpilogueT], window: Window) -> None:
        super().__init__(layer)
        self.window = window
        self.flat, self.extent = window.is_flat, window.extent

    def _first(self, tile: Any, size: int) -> Any:
        """The first of a tile's `size` positions; the last tile is moved back inside."""
        first = tile * size
        if self.extent % size:
            first = tirx.min(first, self.extent - size)
        return self.e.bind("first", first)

    def _write(
        self, b: Any, y: Any, x: Any, channel: Any, sums: tirx.Buffer, place: Any, lanes: int = 1
    ) -> None:
        """What follows the sums [place] .. of a position, from `channel` on."""
        window = self.window
        row, column = (x, 0) if self.flat else (y, x)
        self.epilogue.emit(
            self.e,
            partial(window.indices, b, row, column),
            x if self.flat else (b * window.rows + y) * window.columns + x,
            channel,
            lanes,
            partial(_element, sums, place),
        )


def _element(buffer: tirx.Buffer, place: Any, lane: Any) -> ir.Expr:
    return buffer[place + lane]
