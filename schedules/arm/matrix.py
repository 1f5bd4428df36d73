"""Convolutions and linear layers with `smlad`: a tile of a few neighbouring outputs of a row times
two channels in registers.

The input comes as rows of 16-bit integers (`rows.py`), so one load gives two operands. A word of
weights holds two positions of two channels, [a0, b0, a1, b1]: `sxtb16` opens it in two instructions
into the pairs (a0, a1) and (b0, b1), for all outputs of the tile. Four outputs by two channels need
all fourteen registers: eight sums, two weights, one of data, two addresses and a counter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from tvm import tirx

from ...targets import Target
from ..choice import Choice, SearchSpace
from ..emit import Emitter
from ..fused import FusedFunction
from ..layer_kernel import Layer, TiledKernel, read_layer
from ..layout import PackedLayout
from ..operands import Operands, find_operands
from ..spec import Conv2dSpec, MatmulSpec, WeightedSpec, ceil_div
from ..window import window_of
from .assembly import as_llvm
from .epilogue import DspEpilogue
from .microkernel import MOST_COLUMNS, MicroKernel
from .nibble_kernel import SUM_LIMIT, NibbleKernel
from .rounding import finisher, llvm_helpers
from .rows import Widened

CHANNELS = 2
LAYOUT = PackedLayout(CHANNELS, 2, "R", turned=True)
JOINED = PackedLayout(CHANNELS, 2, "R", turned=True, joined=True)
# Taking joined sums apart costs as much as opening the weights of so many steps.
_LEAST_JOINED_STEPS = 12
# Steps written out: a turn of the loop costs four instructions, a step of a full tile fifteen.
_STEPS = (12, 10, 8, 6, 4)
_EPILOGUE = 11

_Layer = Layer[Conv2dSpec | MatmulSpec, Operands, DspEpilogue]


def takes(spec: WeightedSpec) -> bool:
    """Whether the kernel has a form for the layer's numbers."""
    return (
        isinstance(spec, (Conv2dSpec, MatmulSpec))
        and spec.data_dtype in ("int8", "uint8", "int16")
        and spec.acc_dtype == "int32"
        and (_takes_nibbles(spec) or (spec.weight_dtype == "int8" and not spec.group_size))
        and not spec.weight_zero_point
        and spec.groups_of_channels == 1
        # Columns of a kernel row side by side.
        and not (isinstance(spec, Conv2dSpec) and spec.dilation[1] != 1 and spec.kernel[1] != 1)
    )


def _takes_nibbles(spec: WeightedSpec) -> bool:
    """Whether kernel rows are whole words of 4-bit codes, and whole groups."""
    rows, columns, channels = spec.reduction
    row = columns * channels
    return (
        spec.weight_dtype == "int4"
        and spec.data_dtype != "int16"
        and not spec.table_channels
        and not spec.group_zero_points
        and (row % 4 == 0 or (rows == 1 and not spec.group_size))
        and (not spec.group_size or (spec.group_size % 4 == 0 and row % spec.group_size == 0))
    )


def fits_nibbles(spec: WeightedSpec, codes: np.ndarray) -> bool:
    """Whether the sums of 4-bit codes [1, K, N] fit the kernel, those of a group where there are
    groups."""
    if codes.min() < -8 or codes.max() > 7:
        return False
    low, high = (-128, 127) if spec.data_dtype == "int8" else (0, 255)
    wide = codes[0].astype(np.int64)
    size = spec.group_size or len(wide)
    starts = np.arange(0, len(wide), size)
    most = np.add.reduceat(np.maximum(wide * low, wide * high), starts, axis=0)
    least = np.add.reduceat(np.minimum(wide * low, wide * high), starts, axis=0)
    return bool(most.max() < SUM_LIMIT and least.min() >= -SUM_LIMIT)


def layout_of(spec: WeightedSpec, codes: np.ndarray) -> PackedLayout:
    """The layout for codes [1, K, N]: joined where it pays and every second channel's sum, whatever
    the data, fits 24 bits."""
    if LAYOUT.steps(spec.reduction) < _LEAST_JOINED_STEPS or spec.data_dtype == "int16":
        return LAYOUT
    first, second = codes[0, :, 0::2].astype(np.int64), codes[0, :, 1::2].astype(np.int64)
    low, high = (-128, 127) if spec.data_dtype == "int8" else (0, 255)
    most = np.maximum(second * low, second * high).sum(axis=0)
    least = np.minimum(second * low, second * high).sum(axis=0)
    if second.size and (most.max() >= 1 << 23 or least.min() < -(1 << 23)):
        return LAYOUT
    pairs = second.shape[1]
    if np.any((first[:, :pairs] < 0) & (second == -128)):
        return LAYOUT
    return JOINED


def _reads(spec: Conv2dSpec | MatmulSpec) -> bool:
    return takes(spec) and spec.packed_layout in (LAYOUT, JOINED)


def matrix_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> _MatrixKernel | None:
    """The convolution or linear layer with what follows it; None: no form for it."""
    layer: _Layer | None = read_layer(
        fused, target, choice, (Conv2dSpec, MatmulSpec), _reads, find_operands, DspEpilogue
    )
    return None if layer is None else _MatrixKernel(layer)


class _MatrixKernel(TiledKernel[Conv2dSpec | MatmulSpec, Operands, DspEpilogue]):
    """One function being written."""

    def __init__(self, layer: _Layer) -> None:
        spec, choice = layer.spec, layer.choice
        super().__init__(layer, window_of(spec))
        packed = spec.packed_layout
        assert packed is not None
        self.packed = packed
        self.steps = packed.steps(spec.reduction)
        self.blocks = ceil_div(self.window.out_channels, CHANNELS)
        row, column = packed.pitches(spec.reduction)
        self.pitch = column
        self.run = row // 2
        self.groups = row // spec.group_size if spec.group_size else 0
        self.is_nibbles = spec.weight_dtype == "int4"
        if self.is_nibbles:
            self.run = spec.group_size // 2 if self.groups else ceil_div(self.run, 2) * 2
        self.unroll = self._unroll()
        self.columns = self._columns()
        if choice is not None:
            self.columns = min(choice["columns"], self.extent)
            self.unroll = choice["unroll"]
        self.e = Emitter(finisher(self.target))

    def _columns(self) -> int:
        """Outputs of a tile, for the fewest instructions."""

        def cost(columns: int) -> int:
            kernel = self._loops(columns)
            outputs = columns * CHANNELS * _EPILOGUE
            return ceil_div(self.extent, columns) * (kernel.cost + outputs)

        tiles = range(1, min(self.extent, MOST_COLUMNS) + 1)
        return min((n for n in tiles if self._loops(n).is_possible), key=cost)

    def _unroll(self) -> int:
        if self.run <= max(_STEPS):
            return self.run
        return next((n for n in _STEPS if self.run % n == 0), _STEPS[0])

    def _loops(self, columns: int) -> MicroKernel:
        window = self.window
        kind = partial(NibbleKernel, groups=self.groups) if self.is_nibbles else MicroKernel
        rows = (window.kernel[0] - 1) * window.dilation[0] + 1
        pitch = window.padded_columns * self.pitch
        return kind(
            columns=columns,
            run=self.run,
            rows=window.kernel[0],
            column_bytes=2 * self.pitch * (1 if self.flat else window.strides[1]),
            row_bytes=0 if self.flat else 2 * pitch * window.dilation[0],
            ring_bytes=0 if self.flat or rows == 1 else 2 * pitch * rows,
            unroll=self.unroll,
            is_aligned=self.pitch % 2 == 0,
            is_joined=self.packed.joined,
        )

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        least = () if self.is_nibbles else (1,)
        unrolls = {*(n for n in (*least, 2, *_STEPS) if n <= self.run), self.unroll}
        most = min(self.extent, MOST_COLUMNS)
        columns = tuple(n for n in range(1, most + 1) if self._loops(n).is_possible)
        return SearchSpace(
            "arm.matrix",
            {
                "columns": columns,
                "unroll": tuple(sorted(unrolls)),
            },
            {"columns": self.columns, "unroll": self.unroll},
            lambda choice: True,
        )

    def build(self) -> tirx.PrimFunc:
        e, window, spec = self.e, self.window, self.spec
        self.weight = e.flat(self.operands.weight)
        if self.groups:
            assert self.operands.scales is not None
            self.scales = e.flat(self.operands.scales)
        self.epilogue.declare(e)
        self.loops = self._loops(self.columns)
        if self.epilogue.bias_buffer is not None:
            self.biases = e.flat(self.epilogue.bias_buffer)
        pad_value = 0 if isinstance(spec, MatmulSpec) else spec.pad_value
        self.rows = Widened(
            e, window, self.fused, self.operands, spec.data_dtype, pad_value, self.pitch,
            self.columns, slack=4 if self.is_nibbles else 2,
        )  # fmt: skip
        if self.flat:
            self._flat()
        else:
            with e.loop("b", window.batch) as b:
                self._image(b)
        self.epilogue.emit_rest(e, 1)
        code = (
            as_llvm(self.loops.name, self.loops.assembly(), 6 if self.groups else 5)
            + llvm_helpers()
        )
        return e.function(list(self.fused.func.params), {}, code)

    def _tiles(self) -> int:
        return ceil_div(self.extent, self.columns)

    def _flat(self) -> None:
        """A layer without neighbours: its positions in tiles."""
        e = self.e
        with e.loop("tile", self._tiles()) as tile:
            first = self._first(tile, self.columns)
            self.rows.fill_tile(first, self.columns)
            zero = tirx.const(0, "int32")
            self._channels(zero, zero, first, zero)

    def _image(self, b: Any) -> None:
        e, window, rows = self.e, self.window, self.rows
        stride = window.strides[0]
        rows.fill_border()
        fresh = min(stride, rows.rows)
        with e.loop("y", window.rows) as y:
            # All of them first, then those that are new: in one place, for it is much code.
            with e.loop("row", rows.rows) as row:
                with e.when(tirx.any(y == 0, row >= rows.rows - fresh)):
                    rows.fill_row(b, y * stride + row)
            oldest = e.bind("oldest", y * stride % rows.rows)
            with e.loop("tile", self._tiles()) as tile:
                x = self._first(tile, self.columns)
                origin = x * (window.strides[1] * self.pitch)

                base = e.bind("base", oldest * rows.row_pitch + origin)
                self._channels(b, y, x, base)

    def _channels(self, b: Any, y: Any, x: Any, base: Any) -> None:
        """All output channels of a tile."""
        with self.e.loop("block", self.blocks) as block:
            self._tile(b, y, x, base, block)

    def _tile(self, b: Any, y: Any, x: Any, base: Any, block: Any) -> None:
        e, window = self.e, self.window
        sums = e.alloc(self.columns * CHANNELS, "int32", "sums", registers=True)
        ragged = window.out_channels % CHANNELS
        size = ceil_div(self.steps, 2) * 4 if self.is_nibbles else self.steps * 4
        weights = e.bind("weights", block * size)
        self._call(sums, base, weights, block)

        def write(parts: list[tuple[int, int]]) -> None:
            channels = sum(width for _, width in parts)
            for c in range(channels):
                self.epilogue.start_channel(e)
                self.epilogue.sums = sums
                for p in range(self.columns):
                    self._write(b, y, x + p, block * CHANNELS + c, sums, p * CHANNELS + c)

        e.ragged(block, self.blocks, ragged, CHANNELS, write)

    def _initial(self, sums: tirx.Buffer, block: Any) -> Any:
        """Where the two channels' first sums are."""
        e, window, epilogue = self.e, self.window, self.epilogue
        bias = epilogue.bias_buffer
        if bias is not None and window.out_channels % CHANNELS == 0:
            return tirx.address_of(self.biases[block * CHANNELS])
        zero = tirx.const(0, "int32")
        for c in range(CHANNELS):
            channel = tirx.min(block * CHANNELS + c, window.out_channels - 1)
            e.store(sums, epilogue.initial(window.indices(zero, zero, zero, channel)), c)
        return tirx.address_of(sums[0])

    def _call(self, sums: tirx.Buffer, data: Any, weights: Any, block: Any) -> None:
        rows = self.rows.buffer
        end = 0 if self.flat else self.rows.rows * self.rows.row_pitch
        further = []
        if self.groups:
            count = self.groups * self.window.kernel[0] * CHANNELS
            further.append(tirx.address_of(self.scales[block * count]))
        self.e.evaluate(
            tirx.call_extern(
                "void", f"{self.loops.name}_call", tirx.address_of(rows[data]),
                tirx.address_of(self.weight[weights]), self._initial(sums, block),
                tirx.address_of(sums[0]), tirx.address_of(rows[end]), *further,
            )
        )  # fmt: skip
