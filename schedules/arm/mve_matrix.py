"""Convolutions and linear layers with Helium: sums by `vmlava` (`mve_microkernel.py`), sixteen
products of one output an instruction; eight where the data have 16 bits.

Channels lie last in the data, so a kernel row of an output is one run of integers; weights are
packed as such runs, four output channels side by side, padded to whole vectors. Rows are read where
they are, unless there is a border (`mve_rows.py`). Where short runs would waste vectors (a stem of
one or three channels), the rows of an output's window are first put together to one run.

A segment of a row is summed for all channels, then requantised in vectors of four channels, whose
constants are loaded once a segment.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ...targets import Target
from ..choice import Choice, SearchSpace
from ..emit import vector
from ..epilogue import Epilogue
from ..fused import FusedFunction
from ..layer_kernel import Layer, TiledKernel, read_layer
from ..layout import PackedLayout
from ..operands import Operands, find_operands
from ..spec import Conv2dSpec, MatmulSpec, WeightedSpec, ceil_div
from ..window import window_of
from .assembly import as_llvm
from .mve_microkernel import CHANNELS, MOST_OUTPUTS, VECTOR_BYTES, MicroKernel
from .mve_rows import Rows, lanes_of
from .mve_vector import VectorEmitter
from .rounding import finisher

_SUMS_BYTES = 2048
_UNROLLS = (4, 6, 8, 12, 18)
# Instructions: a vector of four results; the constants of a segment's channels; a segment's loops.
_RESULT, _CONSTANTS, _SEGMENT = 12, 8, 20

_Layer = Layer[Conv2dSpec | MatmulSpec, Operands, Epilogue]


def takes(spec: WeightedSpec) -> bool:
    """Whether the kernel has a form for the layer's numbers."""
    return (
        isinstance(spec, (Conv2dSpec, MatmulSpec))
        and spec.data_dtype in ("int8", "int16")
        and spec.acc_dtype == "int32"
        and spec.weight_dtype == "int8"
        and not spec.weight_zero_point
        and not spec.group_size
        and spec.groups_of_channels == 1
        # Columns of a kernel row side by side.
        and not (isinstance(spec, Conv2dSpec) and spec.dilation[1] != 1 and spec.kernel[1] != 1)
    )


def _layouts(spec: WeightedSpec) -> tuple[PackedLayout, PackedLayout]:
    """By kernel rows, and the whole window together."""
    lanes = lanes_of(spec.data_dtype)
    return PackedLayout(CHANNELS, lanes, "R"), PackedLayout(CHANNELS, lanes, "K")


def layout_for(spec: WeightedSpec) -> PackedLayout:
    """By kernel rows, or the whole window together where that takes fewer instructions."""
    by_rows, together = _layouts(spec)
    kernel_rows, columns, channels = spec.reduction
    vectors = kernel_rows * ceil_div(columns * channels, by_rows.group)
    blocks = ceil_div(spec.columns, CHANNELS)
    saved = (vectors - ceil_div(spec.reduction_size, together.group)) * 14 * blocks
    return together if saved > MOST_OUTPUTS * (2 * vectors + 4) else by_rows


def _reads(spec: Conv2dSpec | MatmulSpec) -> bool:
    return takes(spec) and spec.packed_layout in _layouts(spec)


def matrix_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None = None
) -> _MatrixKernel | None:
    """The whole fused function around its convolution or linear layer; None: no form for it."""
    layer: _Layer | None = read_layer(
        fused, target, choice, (Conv2dSpec, MatmulSpec), _reads, find_operands, Epilogue
    )
    if layer is None:
        return None
    kernel = _MatrixKernel(layer)
    return kernel if kernel.is_possible else None


class _MatrixKernel(TiledKernel[Conv2dSpec | MatmulSpec, Operands, Epilogue]):
    """One function being written."""

    e: VectorEmitter

    def __init__(self, layer: _Layer) -> None:
        spec, choice = layer.spec, layer.choice
        super().__init__(layer, window_of(spec))
        window = self.window
        self.is_together = spec.packed_layout == _layouts(spec)[1]
        self.lanes = lanes_of(spec.data_dtype)
        is_computed = self.operands.data in self.fused.producers
        self.is_copied = self.is_together or any(window.padding) or is_computed
        self.blocks = ceil_div(window.out_channels, CHANNELS)
        self.unroll = MicroKernel.unroll if choice is None else choice["unroll"]
        self.pixels = self._pixels() if choice is None else choice["pixels"]
        self.e = VectorEmitter(finisher(self.target))

    @property
    def is_possible(self) -> bool:
        """Whether the loops' immediate numbers reach everywhere."""
        return self._loops(MOST_OUTPUTS).is_possible

    def _segments(self) -> list[int]:
        """How many pixels a segment can have."""
        most = max(2, _SUMS_BYTES // (4 * CHANNELS * self.blocks))
        return list(range(1, min(self.extent, most) + 1))

    def _pixels(self) -> int:
        """Pixels of a segment, for the fewest instructions."""

        def cost(pixels: int) -> int:
            pairs, single = divmod(pixels, 2)
            sums = (pairs * self._loops(2).cost if pairs else 0) + single * self._loops(1).cost
            results = self.blocks * (pixels * _RESULT + _CONSTANTS)
            return ceil_div(self.extent, pixels) * (sums + results + _SEGMENT)

        return min(self._segments(), key=cost)

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        pixels = {n for n in self._segments() if n % 2 == 0 or n == self.extent or n == 1}
        return SearchSpace(
            "arm.mve_matrix",
            {
                "pixels": tuple(sorted({*pixels, self.pixels})),
                "unroll": tuple(sorted({*_UNROLLS, self.unroll})),
            },
            {"pixels": self.pixels, "unroll": self.unroll},
            lambda choice: True,
        )

    def _loops(self, outputs: int) -> MicroKernel:
        window, channels = self.window, self.window.channels
        item = VECTOR_BYTES // self.lanes
        pitch = channels if self.flat else channels * window.strides[1]
        row = window.padded_columns * channels * window.dilation[0]
        if self.is_together:
            size = ceil_div(self.spec.reduction_size, self.lanes) * self.lanes
            geometry = {"rows": 1, "run": size, "column_bytes": size * item, "row_bytes": 0}
        else:
            rows = window.kernel[0]
            geometry = {
                "rows": rows,
                "run": window.kernel[1] * channels,
                "column_bytes": pitch * item,
                "row_bytes": row * item if rows > 1 else 0,
            }
        if outputs == 1:
            geometry["column_bytes"] = 0
        return MicroKernel(
            outputs=outputs, blocks=self.blocks, is_exact=not self.is_copied, item_bytes=item,
            unroll=self.unroll, **geometry,
        )  # fmt: skip

    def build(self) -> tirx.PrimFunc:
        e, window, spec = self.e, self.window, self.spec
        self.weight = e.flat(self.operands.weight)
        self.epilogue.declare(e)
        self.sums = e.opaque(self.pixels * self.blocks * CHANNELS, "int32", "sums")
        if self.is_copied:
            pad_value = 0 if isinstance(spec, MatmulSpec) else spec.pad_value
            count = self.pixels if self.flat else (window.kernel[0] - 1) * window.dilation[0] + 1
            self.rows = Rows(
                e, window, self.fused, self.operands, pad_value, count, window.channels,
                window.channels, window.input_rows(window.rows),
            )  # fmt: skip
            self.source = self.rows.buffer
        else:
            self.source = e.flat(self.operands.data)
        if self.is_together:
            size = self._loops(1).run
            self.gathered = e.opaque(MOST_OUTPUTS * size + self.lanes, spec.data_dtype, "gathered")
        self.used = set[int]()
        if self.flat:
            self._flat()
        else:
            with e.loop("b", window.batch) as b:
                self._image(b)
        self.epilogue.emit_rest(e, 1)
        loops = [self._loops(outputs) for outputs in sorted(self.used)]
        code = "".join(as_llvm(each.name, each.assembly(), 3) for each in loops)
        return e.function(list(self.fused.func.params), {}, code)

    def _flat(self) -> None:
        """A layer without neighbours."""
        zero = tirx.const(0, "int32")
        with self.e.loop("segment", ceil_div(self.extent, self.pixels)) as segment:
            first = self._first(segment, self.pixels)
            start: Any = first * self.window.channels
            if self.is_copied:
                self.rows.fill(zero, first)
                start = zero
            self._segment(zero, zero, first, start)

    def _image(self, b: Any) -> None:
        e, window = self.e, self.window
        channels, (down, along) = window.channels, window.strides
        if self.is_copied:
            self.rows.fill_border()
        with e.loop("y", window.rows) as y:
            start: Any = tirx.const(0, "int32")
            if self.is_copied:
                self.rows.fill(b, y * down)
            else:
                start = (b * window.in_rows + y * down) * (window.in_columns * channels)
            with e.loop("segment", ceil_div(self.extent, self.pixels)) as segment:
                x = self._first(segment, self.pixels)
                self._segment(b, y, x, start + x * (along * channels))

    def _segment(self, b: Any, y: Any, x: Any, start: Any) -> None:
        """Sums of neighbouring pixels, then their results; `start` is where the first one's data
        are."""
        e = self.e
        start = e.bind("data", start)
        step = self.window.channels * (1 if self.flat else self.window.strides[1])
        pairs, single = divmod(self.pixels, MOST_OUTPUTS)
        size = self.blocks * CHANNELS
        if pairs:
            with e.loop("pair", pairs) as pair:
                self._sum(2, start + pair * (2 * step), pair * (2 * size))
        if single:
            self._sum(1, start + (self.pixels - 1) * step, (self.pixels - 1) * size)

        with e.loop("block", self.blocks) as block:

            def write(parts: list[tuple[int, int]]) -> None:
                self._results(b, y, x, block, sum(width for _, width in parts))

            e.ragged(block, self.blocks, self.window.out_channels % CHANNELS, CHANNELS, write)

    def _results(self, b: Any, y: Any, x: Any, block: Any, count: int) -> None:
        """Results of a block of channels, or of `count` of them, at all pixels of a segment."""
        e = self.e
        pairs, single = divmod(self.pixels, MOST_OUTPUTS)
        with e.constants_of_channels(self.window.out_channels, self.fused.func.params):
            if pairs:
                with e.loop("pair", pairs) as pair:
                    for p in range(2):
                        at = (pair * self.blocks + block) * (2 * CHANNELS) + p * CHANNELS
                        self._finish(b, y, x + pair * 2 + p, block, at, count)
            if single:
                at = (pairs * 2 * self.blocks + block) * CHANNELS
                self._finish(b, y, x + (self.pixels - 1), block, at, count)

    def _sum(self, outputs: int, start: Any, sums: Any) -> None:
        e = self.e
        self.used.add(outputs)
        data, at = self.source, start
        if self.is_together:
            self._gather(outputs, start)
            data, at = self.gathered, tirx.const(0, "int32")
        e.evaluate(
            tirx.call_extern(
                "void", f"{self._loops(outputs).name}_call", tirx.address_of(data[at]),
                tirx.address_of(self.weight[0]), tirx.address_of(self.sums[sums]),
            )
        )  # fmt: skip

    def _gather(self, outputs: int, start: Any) -> None:
        """The windows of one or two outputs, each as one run. Whole vectors are copied: what they
        bring too much is covered by the next row, or multiplied by zeros."""
        e, window = self.e, self.window
        run = window.kernel[1] * window.channels
        size = self._loops(1).run
        lanes = self.lanes
        vectors = ceil_div(run, lanes)
        for p in range(outputs):
            origin = start + p * (window.strides[1] * window.channels)
            with e.loop("ky", window.kernel[0]) as ky:
                row = origin + ky * (window.dilation[0] * self.rows.row_pitch)
                for i in range(vectors):
                    e.store_vector(
                        self.gathered,
                        vector(self.source, row + i * lanes, lanes),
                        p * size + ky * run + i * lanes,
                        lanes,
                    )

    def _finish(self, b: Any, y: Any, x: Any, block: Any, at: Any, count: int) -> None:
        """Results of a block of a pixel, the sums of which are from `at` on."""
        parts = [(0, CHANNELS)] if count == CHANNELS else [(lane, 1) for lane in range(count)]
        for lane, width in parts:
            self._write(b, y, x, block * CHANNELS + lane, self.sums, at + lane, width)
