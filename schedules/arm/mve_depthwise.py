"""Depthwise convolution with Helium, sixteen channels at a time (`mve_taps.py`).

Columns of input are copied so that the rows of a window lie in words, channel by channel, the
border among them; channel by channel `vmlav` sums. The sums of a segment of a row, or of a few
short rows, are requantised in vectors of four channels, which a gathering load collects.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tvm import tirx

from ...targets import Target
from ..choice import Choice, SearchSpace
from ..epilogue import Epilogue
from ..fused import FusedFunction, Stage
from ..layer_kernel import Layer, LayerKernel, read_layer
from ..layout import PackedLayout
from ..operands import Operands, find_operands
from ..spec import Conv2dSpec, ceil_div
from ..window import window_of
from .assembly import as_llvm
from .mve_taps import GROUP, WINDOW, Columns, Taps
from .mve_vector import LANES, VectorEmitter, picked
from .rounding import finisher

LAYOUT = PackedLayout(1, 1, "K")
"""Channel by channel, its taps by rows."""
_COLUMN_BYTES = GROUP * WINDOW
_SUMS_BYTES = 2048
_MOST_COLUMNS = 16


def takes(spec: Conv2dSpec) -> bool:
    """Whether the kernel has a form for the layer's numbers."""
    return (
        spec.is_depthwise
        and spec.columns == 1
        and spec.data_dtype == "int8"
        and spec.weight_dtype == "int8"
        and not spec.weight_zero_point
        and not spec.group_size
        and spec.acc_dtype == "int32"
        and spec.dilation == (1, 1)
        and max(spec.kernel) <= WINDOW
        and max(spec.strides) <= WINDOW
    )


def depthwise_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None = None
) -> _DepthwiseKernel | None:
    """The whole fused function around its depthwise convolution; None: no form for it."""
    layer = read_layer(fused, target, choice, (Conv2dSpec,), takes, _stored_operands, Epilogue)
    return None if layer is None else _DepthwiseKernel(layer)


def _stored_operands(fused: FusedFunction, anchor: Stage, spec: Conv2dSpec) -> Operands | None:
    """None for a weight in another order, or data computed in the same function."""
    operands = find_operands(fused, anchor, spec)
    if operands is None or spec.packed_layout != LAYOUT or operands.data in fused.producers:
        return None
    return operands


class _DepthwiseKernel(LayerKernel[Conv2dSpec, Operands, Epilogue]):
    """One function being written."""

    def __init__(self, layer: Layer[Conv2dSpec, Operands, Epilogue]) -> None:
        super().__init__(layer)
        spec, choice = layer.spec, layer.choice
        self.window = window_of(spec)
        self.width = min(GROUP, spec.in_channels)
        places = [
            min(2, (WINDOW - kernel) // stride + 1, extent)
            for kernel, stride, extent in zip(
                spec.kernel, spec.strides, (self.window.rows, self.window.columns), strict=True
            )
        ]
        self.outputs = places[0], places[1]
        self.read_rows = spec.kernel[0] + (self.outputs[0] - 1) * spec.strides[0]
        self.columns, self.bands = self._segment()
        if choice is not None:
            self.columns, self.bands = choice["columns"], choice["bands"]
        self.e = VectorEmitter(finisher(self.target))

    def _segment(self) -> tuple[int, int]:
        """Columns and windows one below the other whose sums are made in one go."""
        extent = self.window.columns
        columns = min(
            range(1, min(extent, _MOST_COLUMNS) + 1),
            key=lambda n: (ceil_div(extent, n) * self._windows(n), -n),
        )
        return columns, self._most_bands(columns)

    def _windows(self, columns: int) -> int:
        return ceil_div(columns, self.outputs[1])

    def _most_bands(self, columns: int) -> int:
        row_bytes = self._windows(columns) * self.outputs[1] * GROUP * 4
        most = max(1, _SUMS_BYTES // (row_bytes * self.outputs[0]))
        return min(most, self.window.rows // self.outputs[0])

    @property
    def read_columns(self) -> int:
        """Columns of input that the windows of a segment reach over."""
        windows = self._windows(self.columns)
        return (windows - 1) * self.outputs[1] * self.spec.strides[1] + WINDOW

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        extent = self.window.columns
        columns = {n for n in (1, 2, 4, 6, 8, 12, 16, extent) if n <= min(extent, _MOST_COLUMNS)}
        return SearchSpace(
            "arm.mve_depthwise",
            {
                "columns": tuple(sorted({*columns, self.columns})),
                "bands": tuple(sorted({1, 2, 3, 4, self.bands})),
            },
            {"columns": self.columns, "bands": self.bands},
            lambda choice: choice["bands"] <= self._most_bands(choice["columns"]),
        )

    def build(self) -> tirx.PrimFunc:
        e, window, spec = self.e, self.window, self.spec
        self.weight = e.flat(self.operands.weight)
        self.data = e.flat(self.operands.data)
        self.epilogue.declare(e)
        self.turned = e.opaque(self.bands * self.read_columns * _COLUMN_BYTES, "int8", "turned")
        self.windows = self._windows(self.columns)
        places = self.outputs[0] * self.outputs[1]
        self.sums = e.opaque(self.bands * self.windows * places * self.width, "int32", "sums")
        self.segments = ceil_div(window.columns, self.columns)
        self.code: dict[str, str] = {}
        groups = ceil_div(spec.in_channels, GROUP)
        if self.segments == 1:
            self._border(tirx.const(0, "int32"))
        with e.loop("b", window.batch) as b, e.loop("group", groups) as group:
            channel: Any = group * GROUP
            if spec.in_channels % GROUP and groups > 1:
                channel = tirx.min(channel, spec.in_channels - GROUP)
            self._group(b, e.bind("channel", channel))
        self.epilogue.emit_rest(e, 1)
        code = "".join(self.code.values())
        return e.function(list(self.fused.func.params), {}, code)

    def _group(self, b: Any, channel: Any) -> None:
        """All outputs of some channels: bands of rows, the last of which is moved back."""
        e, rows = self.e, self.window.rows
        height = self.bands * self.outputs[0]
        whole, rest = divmod(rows, height)
        with e.loop("band", whole) as band:
            self._band(b, channel, e.bind("y", band * height), self.bands)
        if rest:
            bands = ceil_div(rest, self.outputs[0])
            self._band(b, channel, tirx.const(rows - bands * self.outputs[0], "int32"), bands)

    def _band(self, b: Any, channel: Any, y: Any, bands: int) -> None:
        """Output rows from y on, segment by segment."""
        e, window = self.e, self.window
        with e.loop("segment", self.segments) as segment:
            first = segment * self.columns
            if window.columns % self.columns:
                first = tirx.min(first, window.columns - self.columns)
            x = e.bind("x", first)
            if self.segments > 1:
                self._border(x)
            with e.loop("i", bands) as i:
                self._turn(b, channel, y + i * self.outputs[0], x, i)
            self._sum(channel, bands)
            self._results(b, channel, y, x, bands)

    def _inside(self, x: Any) -> tuple[Any, Any]:
        """Which columns of a segment are inside the input: from .. to."""
        window = self.window
        left = window.padding[1]
        if self.segments == 1:
            return left, min(left + window.in_columns, self.read_columns)
        start = left - x * self.spec.strides[1]
        return tirx.max(start, 0), tirx.min(start + window.in_columns, self.read_columns)

    def _border(self, x: Any) -> None:
        """Columns outside the input: they are not written by what copies the others."""
        e, value = self.e, tirx.const(self.spec.pad_value, "int8")
        first, end = self._inside(x)
        left, _, right = self.window.padding[1:]
        read, bands = self.read_columns, self.bands
        if not left and not right:
            return

        def column(band: Any, number: Any) -> None:
            at = (band * read + number) * _COLUMN_BYTES
            with e.loop("i", _COLUMN_BYTES // GROUP) as i:
                wide = tirx.Broadcast(value, GROUP)
                e.store_vector(self.turned, wide, at + i * GROUP, GROUP)

        with e.loop("band", bands) as band:
            for number in range(min(left, read)):
                if self.segments == 1:
                    column(band, number)
                else:
                    with e.when(first > number):
                        column(band, number)
            for number in range(max(0, read - right - WINDOW), read):
                if self.segments > 1:
                    with e.when(end <= number):
                        column(band, number)
                elif number >= end:
                    column(band, number)

    def _call(self, loops: Columns | Taps, pointers: list[Any], integers: Sequence[Any]) -> None:
        if loops.name not in self.code:
            text = as_llvm(loops.name, loops.assembly(), len(pointers), len(integers))
            self.code[loops.name] = text
        addresses = map(tirx.address_of, pointers)
        self.e.evaluate(tirx.call_extern("void", f"{loops.name}_call", *addresses, *integers))

    def _turn(self, b: Any, channel: Any, y: Any, x: Any, band: Any) -> None:
        """The columns of a segment that one row of windows reads."""
        e, spec, window = self.e, self.spec, self.window
        top, left = window.padding[:2]
        channels, row_bytes = spec.in_channels, window.in_columns * spec.in_channels
        loops = Columns(
            self.read_rows, window.in_rows, row_bytes, channels, self.width, spec.pad_value
        )
        first, end = self._inside(x)
        row = e.bind("row", y * spec.strides[0] - top)
        offset = row * row_bytes + (x * spec.strides[1] + first - left) * channels
        image = self.data[b * (window.in_rows * row_bytes) + channel]
        to = self.turned[(band * self.read_columns + first) * _COLUMN_BYTES]
        self._call(loops, [to, image], [offset, row, tirx.const(0, "int32") + (end - first)])

    def _sum(self, channel: Any, bands: int) -> None:
        spec = self.spec
        loops = Taps(
            kernel=spec.kernel, strides=spec.strides, outputs=self.outputs, channels=self.width,
            bands=bands, columns=self.read_columns, windows=self.windows,
        )  # fmt: skip
        taps = self.weight[channel * spec.reduction_size]
        self._call(loops, [self.turned[0], taps, self.sums[0]], [])

    def _results(self, b: Any, channel: Any, y: Any, x: Any, bands: int) -> None:
        """What becomes of the sums of a segment."""
        e = self.e
        blocks = ceil_div(self.width, LANES)
        with e.loop("block", blocks) as block:
            first = e.bind("first", channel + block * LANES)

            def write(parts: list[tuple[int, int]]) -> None:
                count = sum(width for _, width in parts)
                self._block(b, y, x, first, block, count, bands)

            e.ragged(block, blocks, self.width % LANES, LANES, write)

    def _block(
        self, b: Any, y: Any, x: Any, channel: Any, block: Any, count: int, bands: int
    ) -> None:
        """Results of a vector of channels, or of `count` of them, at all pixels."""
        e, (rows, columns) = self.e, self.outputs
        places = rows * columns
        distance = bands * self.windows * places  # of two channels
        start = block * (LANES * distance)

        def window(band: Any, number: Any, width: int) -> None:
            for cx in range(width):
                for cy in range(rows):
                    place = cx * rows + cy
                    at = start + (band * self.windows + number) * places + place
                    self._finish(
                        b, y + band * rows + cy, x + number * columns + cx, channel, count,
                        at, distance,
                    )  # fmt: skip

        whole, rest = divmod(self.columns, columns)
        params = self.fused.func.params
        with (
            e.constants_of_channels(self.spec.out_channels, params),
            e.loop("band", bands) as band,
        ):
            if whole:
                with e.loop("window", whole) as number:
                    window(band, number, columns)
            if rest:
                window(band, tirx.const(whole, "int32"), rest)

    def _finish(
        self, b: Any, y: Any, x: Any, channel: Any, count: int, at: Any, distance: int
    ) -> None:
        window = self.window
        parts = [(0, LANES)] if count == LANES else [(lane, 1) for lane in range(count)]
        for lane, width in parts:
            self.epilogue.emit(
                self.e,
                partial(window.indices, b, y, x),
                (b * window.rows + y) * window.columns + x,
                channel + lane,
                width,
                partial(self._accumulator, at, distance, lane),
            )

    def _accumulator(self, at: Any, distance: int, first: int, lane: Any) -> Any:
        return picked(self.sums, at, (lane + first) * (4 * distance))
