"""The copy of a band of input rows: bordered, converted, channels padded; what a task's reduction
reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import ir, tirx

from ..targets import Target
from .emit import Emitter, dtype_bits, splat, vector
from .fused import FusedFunction
from .operands import Operands
from .pitch import unaliased_row
from .spec import ceil_div
from .window import Window


def even_rows(rows: int, most: int, outer: int, threads: int, tile_rows: int = 1) -> int:
    """Rows of a task, at most `most` of `rows`, for the shortest longest run of tasks.

    Threads take equal runs of the `outer` x bands tasks, and the last band is moved back inside: a
    number of bands that the threads do not divide leaves one of them idle.
    """

    def run(bands: int) -> int:
        band = ceil_div(rows, bands)
        tasks = outer * ceil_div(rows, band)
        return ceil_div(tasks, threads) * ceil_div(band, tile_rows) * tile_rows

    least = ceil_div(rows, most)
    return ceil_div(rows, min(range(least, min(rows, least + 2 * threads) + 1), key=run))


@dataclass(frozen=True)
class Source:
    """The flat buffer a reduction reads: pitches in elements, and the offset of the band's first
    position."""

    buffer: tirx.Buffer
    base: Any
    row_pitch: int
    """Between two input rows."""
    column_pitch: int
    row_stride: int
    """Input rows between two output rows."""
    column_stride: int

    @property
    def step(self) -> tuple[int, int]:
        """Elements between two output rows and between two output columns."""
        return self.row_stride * self.row_pitch, self.column_stride * self.column_pitch


@dataclass(frozen=True)
class Band:
    """How the input is laid out for the kernel; `copied` False: it is read where it is."""

    window: Window
    copied: bool
    source_dtype: str
    dtype: str
    convert: Callable[[ir.Expr], ir.Expr]
    pad_value: int
    """Already converted."""
    group_pitch: int
    """Elements from one group's channels to the next; more than `window.channels` when padded."""
    repeat: int = 1
    """Copies of each channel (depthwise with a channel multiplier)."""
    slack: int = 0
    """Elements the kernel may read behind the last one."""

    @property
    def skips(self) -> bool:
        """A strided 1x1 convolution copies only what it uses."""
        return self.copied and self.window.kernel == (1, 1) and not any(self.window.padding)

    @property
    def pitch(self) -> int:
        """Elements from one column to the next."""
        return self.window.groups * self.group_pitch * self.repeat

    @property
    def columns(self) -> int:
        """Columns of the copy."""
        return self.window.columns if self.skips else self.window.padded_columns

    @property
    def row_pitch(self) -> int:
        """Elements from one row of the copy to the next: never a multiple of many cache lines."""
        width = dtype_bits(self.dtype) // 8
        return unaliased_row(self.columns * self.pitch, width)

    def rows(self, band: int) -> int:
        """Rows of the copy for `band` output rows."""
        return band if self.skips else self.window.input_rows(band)

    def bytes(self, band: int) -> int:
        """Size of the copy, or of what is read in place, for `band` output rows."""
        width = dtype_bits(self.dtype) // 8
        return self.rows(band) * self.row_pitch * width

    def most_rows(self, cache_bytes: int) -> int:
        """The most output rows of a task whose input stays in a cache of that size."""
        if not self.copied and self.window.columns > 1:
            return self.window.rows
        rows = self.window.rows
        while rows > 1 and self.bytes(rows) > cache_bytes:
            rows = max(1, min(rows - 1, rows * cache_bytes // self.bytes(rows)))
        return rows

    def choices(self, chosen: int) -> tuple[int, ...]:
        """Rows of a task that tuning tries: even parts of the whole, and what was chosen."""
        rows = self.window.rows
        parts = {ceil_div(rows, count) for count in (1, 2, 3, 4, 6, 8, 16)}
        return tuple(sorted({*parts, chosen}))


class BandReader:
    """Writes the copy of a band into an emitter and tells the kernel how to address it."""

    def __init__(
        self, e: Emitter, band: Band, fused: FusedFunction, operands: Operands, target: Target
    ) -> None:
        self.e, self.band, self.fused, self.operands = e, band, fused, operands
        self.data: tirx.Buffer | None = None
        if operands.data not in fused.producers and not band.window.turned:
            self.data = e.flat(operands.data)
        self.lanes = target.vector_bits // max(
            dtype_bits(band.dtype), dtype_bits(band.source_dtype)
        )

    def source(self, b: Any, y: Any, rows: int, group: Any) -> Source:
        """The input for output rows y .. y + rows of batch b, first channel of `group`."""
        band, window = self.band, self.band.window
        if not band.copied:
            assert self.data is not None
            pixel = window.channels * window.groups
            row = window.in_columns * pixel
            first = b * window.in_rows + y * window.strides[0]
            return Source(
                self.data, first * row + group * window.channels, row, pixel, *window.strides
            )
        copy = self._copy(b, y, rows)
        strides = (1, 1) if band.skips else window.strides
        base = group * (band.group_pitch * band.repeat)
        return Source(copy, base, band.row_pitch, band.pitch, *strides)

    def _copy(self, b: Any, y: Any, rows: int) -> tirx.Buffer:
        e, band, window = self.e, self.band, self.band.window
        count, columns, pitch = band.rows(rows), band.columns, band.pitch
        copy = e.alloc(count * band.row_pitch + band.slack, band.dtype, "window")
        top, left, bottom, right = window.padding
        step_y, step_x = window.strides if band.skips else (1, 1)
        first = y * window.strides[0] - top
        dense = pitch == window.channels * window.groups and step_x == 1

        def fill(start: Any, columns: int) -> None:
            border = tirx.const(band.pad_value, band.dtype)
            for offset, width in e.chunks(columns * pitch, self.lanes):
                e.store_vector(copy, splat(border, width), start + offset, width)

        def copy_row(row: Any, iy: Any) -> None:
            start = row * band.row_pitch
            if left:
                fill(start, left)
            if self.data is not None and dense:
                origin = (b * window.in_rows + iy) * window.in_columns * pitch
                for offset, width in e.chunks(window.in_columns * pitch, self.lanes):
                    value = band.convert(vector(self.data, origin + offset, width))
                    e.store_vector(copy, value, start + left * pitch + offset, width)
            else:
                with e.loop("x", columns if band.skips else window.in_columns) as x:
                    self._pixel(copy, start + (left + x) * pitch, b, iy, x * step_x)
            if right:
                fill(start + (left + window.in_columns) * pitch, right)

        with e.loop("row", count) as row:
            iy = first + row * step_y
            if top or bottom:
                e.branch(
                    tirx.all(iy >= 0, iy < window.in_rows),
                    lambda: copy_row(row, iy),
                    lambda: fill(row * band.row_pitch, columns),
                )
            else:
                copy_row(row, iy)
        return copy

    def _pixel(self, copy: tirx.Buffer, start: Any, b: Any, iy: Any, ix: Any) -> None:
        """All channels of one input position, each group's to its own place."""
        e, band, window = self.e, self.band, self.band.window
        channels = window.channels * window.groups
        padded = band.group_pitch != window.channels
        count = window.channels if padded else channels

        def group(g: Any) -> None:
            first, to = g * window.channels, start + g * band.group_pitch
            if self.data is not None and band.repeat == 1:
                origin = ((b * window.in_rows + iy) * window.in_columns + ix) * channels + first
                for offset, width in e.chunks(count, self.lanes):
                    value = band.convert(vector(self.data, origin + offset, width))
                    e.store_vector(copy, value, to + offset, width)
                return
            if band.repeat > 1:
                with e.loop("c", count) as c:
                    value = e.bind("value", band.convert(self._input(b, iy, ix, first + c)))
                    for r in range(band.repeat):
                        e.store(copy, value, to + c * band.repeat + r)
                return

            def body(c: Any) -> None:
                e.store(copy, band.convert(self._input(b, iy, ix, first + c)), to + c)

            e.elementwise(count, self.lanes, body)

        if padded:
            with e.loop("g", window.groups) as g:
                group(g)
        else:
            group(0)

    def _input(self, b: Any, iy: Any, ix: Any, channel: Any) -> ir.Expr:
        """The layer's input at one place, through whatever stages produce it."""
        window = self.band.window
        buffer = self.operands.window if window.turned else self.operands.data
        indices = window.indices(b, iy, ix, channel)
        return self.fused.inline(buffer, indices, lambda _buffer, _indices: None)
