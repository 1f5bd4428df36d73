"""Depthwise convolution with Helium, sixteen channels at a time (`mve_taps.py`).

Rows of a group of channels are copied with their border, then turned so that the rows of a window
lie in words, channel by channel; channel by channel `vmlav` sums. The sums of a segment, all
channels of the group again side by side, are requantised in vectors of four channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from ...targets import Target
from ..choice import Choice, SearchSpace
from ..epilogue import Epilogue
from ..fused import FusedFunction, Stage
from ..layout import PackedLayout
from ..operands import Operands, find_operands
from ..spec import Conv2dSpec, ceil_div
from ..window import window_of
from .microkernel import as_llvm
from .mve_rows import Rows, opaque
from .mve_taps import GROUP, WINDOW, Columns, Taps
from .mve_vector import LANES, VectorEmitter, llvm_helpers
from .rounding import finisher

LAYOUT = PackedLayout(1, 1, "K")
"""Channel by channel, its taps by rows."""
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
    anchor = fused.anchor
    if anchor is None or not isinstance(anchor.spec, Conv2dSpec) or not takes(anchor.spec):
        return None
    operands = find_operands(fused, anchor, anchor.spec)
    if operands is None or anchor.spec.packed_layout != LAYOUT:
        return None
    epilogue = Epilogue(fused, anchor)
    if any(not stage.is_map for stage in epilogue.rest):
        return None
    return _DepthwiseKernel(fused, anchor, anchor.spec, operands, target, epilogue, choice)


class _DepthwiseKernel:
    """One function being written."""

    def __init__(
        self,
        fused: FusedFunction,
        anchor: Stage,
        spec: Conv2dSpec,
        operands: Operands,
        target: Target,
        epilogue: Epilogue,
        choice: Choice | None,
    ) -> None:
        self.fused, self.anchor, self.spec, self.operands = fused, anchor, spec, operands
        self.target, self.epilogue = target, epilogue
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
        self.e = VectorEmitter(finisher(target))

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

    def _read_columns(self) -> int:
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
        self.epilogue.declare(e)
        down, along = spec.strides
        read = self._read_columns()
        beyond = (window.columns - self.columns) * along + read - window.padded_columns
        self.rows = Rows(
            e, window, self.fused, self.operands, spec.pad_value, self.read_rows, self.width,
            GROUP, window.input_rows(window.rows), max(0, beyond) * GROUP + GROUP,
        )  # fmt: skip
        self.turned = opaque(e, self.bands * read * GROUP * WINDOW, "int8", "turned")
        across = self._windows(self.columns) * self.outputs[1]
        self.row_pitch = across * GROUP
        self.sums = opaque(e, self.bands * self.outputs[0] * self.row_pitch, "int32", "sums")
        self.code: dict[str, str] = {}
        groups = ceil_div(spec.in_channels, GROUP)
        with e.loop("b", window.batch) as b:
            self.rows.fill_border()
            with e.loop("group", groups) as group:
                channel: Any = group * GROUP
                if spec.in_channels % GROUP and groups > 1:
                    channel = tirx.min(channel, spec.in_channels - GROUP)
                self._group(b, e.bind("channel", channel))
        self.epilogue.emit_rest(e, 1)
        code = "".join(self.code.values())
        return e.function(list(self.fused.func.params), {}, code + llvm_helpers())

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
        segments = ceil_div(window.columns, self.columns)
        down = self.spec.strides[0]
        if segments == 1:
            with e.loop("i", bands) as i:
                self.rows.fill(b, (y + i * self.outputs[0]) * down, channel)
                self._turn(tirx.const(0, "int32"), i)
            self._segment_results(b, channel, y, tirx.const(0, "int32"), bands)
            return
        if bands > 1:
            # The rows of one window are at hand at a time.
            with e.loop("i", bands) as i:
                self._band(b, channel, y + i * self.outputs[0], 1)
            return
        self.rows.fill(b, y * down, channel)
        with e.loop("segment", segments) as segment:
            first = segment * self.columns
            if window.columns % self.columns:
                first = tirx.min(first, window.columns - self.columns)
            x = e.bind("x", first)
            self._turn(x, tirx.const(0, "int32"))
            self._segment_results(b, channel, y, x, 1)

    def _call(self, loops: Columns | Taps, *pointers: Any) -> None:
        if loops.name not in self.code:
            self.code[loops.name] = as_llvm(loops.name, loops.assembly(), len(pointers))
        self.e.evaluate(
            tirx.call_extern("void", f"{loops.name}_call", *map(tirx.address_of, pointers))
        )

    def _turn(self, x: Any, band: Any) -> None:
        """Columns of a segment, the rows of a window in words."""
        read = self._read_columns()
        loops = Columns(read, self.read_rows, self.rows.row_pitch)
        self._call(
            loops,
            self.turned[band * (read * GROUP * WINDOW)],
            self.rows.buffer[x * (self.spec.strides[1] * GROUP)],
        )

    def _segment_results(self, b: Any, channel: Any, y: Any, x: Any, bands: int) -> None:
        e, spec, window = self.e, self.spec, self.window
        loops = Taps(
            kernel=spec.kernel, strides=spec.strides, outputs=self.outputs, channels=self.width,
            bands=bands, columns=self._read_columns(), windows=self._windows(self.columns),
        )  # fmt: skip
        taps = spec.reduction_size
        self._call(loops, self.turned[0], self.weight[channel * taps], self.sums[0])
        blocks = ceil_div(self.width, LANES)
        with (
            e.loop("block", blocks) as block,
            e.loop("row", bands * self.outputs[0]) as row,
            e.loop("column", self.columns) as column,
        ):
            at = row * self.row_pitch + column * GROUP + block * LANES
            position = (b * window.rows + y + row) * window.columns + x + column

            def write(parts: list[tuple[int, int]]) -> None:
                count = sum(width for _, width in parts)
                whole = count == LANES
                for lane, width in [(0, count)] if whole else [(i, 1) for i in range(count)]:
                    self.epilogue.emit(
                        e,
                        partial(window.indices, b, y + row, x + column),
                        position,
                        channel + block * LANES + lane,
                        width,
                        partial(self._accumulator, at + lane),
                    )

            e.ragged(block, blocks, self.width % LANES, LANES, write)

    def _accumulator(self, at: Any, lane: Any) -> Any:
        return self.sums[at + lane]
