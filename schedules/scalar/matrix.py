"""Convolutions and linear layers on cores without vectors: a tile of neighbouring outputs of a row
times a few channels in registers, so that a byte that was loaded is multiplied several times.

The loops are assembly (`loops.py`): compilers spill a third of what such a tile holds.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ...targets import Target
from ..arm.assembly import as_llvm
from ..choice import Choice, SearchSpace
from ..emit import Emitter
from ..fused import FusedFunction
from ..layer_kernel import Layer, TiledKernel, read_layer
from ..operands import Operands, find_operands
from ..spec import Conv2dSpec, MatmulSpec, WeightedSpec, ceil_div
from ..window import window_of
from .epilogue import ScalarEpilogue
from .loops import Loops
from .riscv import Rv32Loops, Rv64Loops
from .rows import Rows
from .thumb import Thumb1Loops, Thumb2Loops

_COLUMNS = (1, 2, 3, 4, 5, 6, 8, 10)
_UNROLLS = (1, 2, 4, 8)
_TURN = 120
"""Instructions of a turn of the innermost loop, which has three or four of its own."""
_EPILOGUE = 16
"""Instructions of an output behind its sum, roughly."""

_Layer = Layer[Conv2dSpec | MatmulSpec, Operands, ScalarEpilogue]


def takes(spec: WeightedSpec) -> bool:
    """Whether the kernel has a form for the layer's numbers."""
    return (
        isinstance(spec, (Conv2dSpec, MatmulSpec))
        and spec.data_dtype in ("int8", "uint8")
        and spec.acc_dtype == "int32"
        and spec.weight_dtype == "int8"
        and not spec.weight_zero_point
        and not spec.group_size
        and not spec.table_channels
        and spec.groups_of_channels == 1
        # Columns of a kernel row side by side.
        and not (isinstance(spec, Conv2dSpec) and spec.dilation[1] != 1 and spec.kernel[1] != 1)
    )


def _reads(spec: Conv2dSpec | MatmulSpec) -> bool:
    packed = spec.packed_layout
    return takes(spec) and packed is not None and (packed.group, packed.axis) == (1, "R")


def matrix_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> _MatrixKernel | None:
    """The convolution or linear layer with what follows it; None: no form for it."""
    layer: _Layer | None = read_layer(
        fused, target, choice, (Conv2dSpec, MatmulSpec), _reads, find_operands, ScalarEpilogue
    )
    return None if layer is None else _MatrixKernel(layer)


def loops_of(target: Target) -> type[Loops]:
    """The form of the loops for a target."""
    if target.has("thumb"):
        return Thumb2Loops if target.has("thumb2") else Thumb1Loops
    return Rv64Loops if target.has("rv64") else Rv32Loops


class _MatrixKernel(TiledKernel[Conv2dSpec | MatmulSpec, Operands, ScalarEpilogue]):
    """One function being written."""

    def __init__(self, layer: _Layer) -> None:
        spec, choice = layer.spec, layer.choice
        super().__init__(layer, window_of(spec))
        packed = spec.packed_layout
        assert packed is not None
        self.run = self.window.kernel[1] * self.window.channels
        """Positions of the reduction that lie side by side."""
        self.form = loops_of(self.target)
        self.channels = packed.width
        if self.form.is_channel_major:
            most = 4 if self.extent == 1 else 2
            self.channels = min(most, self.window.out_channels)
        self.blocks = ceil_div(self.window.out_channels, self.channels)
        self.unroll = 1
        self.columns = self._columns()
        turn = _TURN / self._loops(self.columns).step_cost
        self.unroll = max(n for n in _UNROLLS if n <= max(1, min(turn, self.run)))
        if choice is not None:
            self.columns = min(choice["columns"], self.extent)
            self.unroll = choice["unroll"]
        self.e = Emitter()

    def _loops(self, columns: int) -> Loops:
        window = self.window
        row_pitch = window.padded_columns * window.channels
        rows = (window.kernel[0] - 1) * window.dilation[0] + 1
        is_ring = any(window.padding) or self.operands.data in self.fused.producers
        return self.form(
            columns=columns,
            channels=self.channels,
            run=self.run,
            rows=window.kernel[0],
            column_bytes=window.channels * (1 if self.flat else window.strides[1]),
            row_bytes=0 if self.flat else row_pitch * window.dilation[0],
            ring_bytes=rows * row_pitch if is_ring and not self.flat and rows > 1 else 0,
            unroll=self.unroll,
            is_signed=self.spec.data_dtype == "int8",
        )

    def _possible(self) -> list[int]:
        """Outputs that a tile may have."""
        return [n for n in _COLUMNS if n <= self.extent and self._loops(n).is_possible]

    def _columns(self) -> int:
        """Outputs of a tile, for the fewest instructions."""
        steps = self.run * self.window.kernel[0]

        def cost(columns: int) -> float:
            outputs = columns * self.channels * _EPILOGUE
            tile = steps * self._loops(columns).step_cost + outputs
            return ceil_div(self.extent, columns) * tile

        return min(self._possible(), key=cost)

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        unrolls = tuple(n for n in _UNROLLS if n <= self.run)
        return SearchSpace(
            "scalar.matrix",
            {"columns": tuple(self._possible()), "unroll": unrolls},
            {"columns": self.columns, "unroll": self.unroll},
            lambda choice: True,
        )

    def build(self) -> tirx.PrimFunc:
        e, window, spec = self.e, self.window, self.spec
        self.weight = e.flat(self.operands.weight)
        self.epilogue.declare(e)
        pad_value = 0 if isinstance(spec, MatmulSpec) else spec.pad_value
        self.rows = Rows(
            e, window, self.fused, self.operands, spec.data_dtype, pad_value, self.columns
        )
        self.loops = self._loops(self.columns)
        if self.flat:
            self._positions()
        else:
            with e.loop("b", window.batch) as b:
                self._image(b)
        self.epilogue.emit_rest(e, 1)
        code = as_llvm(self.loops.name, self.loops.assembly(), 4) + self.epilogue.helpers()
        return e.function(list(self.fused.func.params), {}, code)

    def _positions(self) -> None:
        """A layer without neighbours: its positions in tiles."""
        zero = tirx.const(0, "int32")
        with self.e.loop("tile", ceil_div(self.extent, self.columns)) as tile:
            first = self._first(tile, self.columns)
            self._all_channels(zero, zero, first, self.rows.tile(first, self.columns))

    def _image(self, b: Any) -> None:
        e, window = self.e, self.window
        self.rows.start(b)
        with e.loop("y", window.rows) as y:
            top = self.rows.next(b, y)
            with e.loop("tile", ceil_div(self.extent, self.columns)) as tile:
                x = self._first(tile, self.columns)
                column = x * (window.strides[1] * window.channels)
                self._all_channels(b, y, x, e.bind("data", top + column))

    def _all_channels(self, b: Any, y: Any, x: Any, data: Any) -> None:
        """All output channels of a tile."""
        with self.e.loop("block", self.blocks) as block:
            self._tile(b, y, x, data, block)

    def _tile(self, b: Any, y: Any, x: Any, data: Any, block: Any) -> None:
        e, out_channels = self.e, self.window.out_channels
        first = block * self.channels
        ragged = out_channels % self.channels
        if self.form.is_channel_major and ragged:
            # Every channel has its own weights: the last tile is moved back inside.
            first = tirx.min(first, out_channels - self.channels)
            ragged = 0
        first = e.bind("channel", first)
        sums = e.alloc(self.columns * self.channels, "int32", "sums", registers=True)
        self._reduce(sums, data, first, ragged)

        def write(parts: list[tuple[int, int]]) -> None:
            for c in range(sum(width for _, width in parts)):
                self.epilogue.start_channel(e)
                self.epilogue.sums = sums
                for p in range(self.columns):
                    self._write(b, y, x + p, first + c, sums, p * self.channels + c)

        e.ragged(block, self.blocks, ragged, self.channels, write)

    def _reduce(self, sums: tirx.Buffer, data: Any, first: Any, ragged: int) -> None:
        """The sums of a tile, from channel `first` on."""
        e, window = self.e, self.window
        zero = tirx.const(0, "int32")
        for c in range(self.channels):
            channel = tirx.min(first + c, window.out_channels - 1) if ragged else first + c
            indices = window.indices(zero, zero, zero, channel)
            e.store(sums, self.epilogue.initial(indices), c)
        rows = self.rows.buffer
        e.evaluate(
            tirx.call_extern(
                "void", f"{self.loops.name}_call",
                tirx.address_of(rows[data]),
                tirx.address_of(self.weight[first * (window.kernel[0] * self.run)]),
                tirx.address_of(sums[0]),
                tirx.address_of(rows[self.rows.ring]),
            )
        )  # fmt: skip
