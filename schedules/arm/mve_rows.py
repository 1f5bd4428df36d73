"""Rows of the input with their border, integers as they are: a kernel then asks nothing.

Every output row copies the rows that it reads. Copying sixteen bytes takes two instructions, so
that a 3x3 layer of 16 channels spends 0.003 instructions a multiply-add on it; a ring of rows,
where each is copied once, would spend more on finding where it begins.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..emit import Emitter, vector
from ..fused import FusedFunction
from ..operands import Operands
from ..window import Window
from .border import fill_sides
from .mve_microkernel import VECTOR_BYTES


class Rows:
    """Writes the copies into an emitter. `count` rows, of `width` channels a pixel at a distance of
    `pitch`; a vector behind them may be read. Of the padded input, `asked` rows are asked for;
    those behind it are border."""

    def __init__(
        self,
        e: Emitter,
        window: Window,
        fused: FusedFunction,
        operands: Operands,
        pad_value: int,
        count: int,
        width: int,
        pitch: int,
        asked: int,
    ) -> None:
        self.e, self.window, self.fused, self.operands = e, window, fused, operands
        self.pad_value, self.count, self.width, self.pitch = pad_value, count, width, pitch
        self.data = None if operands.data in fused.producers else e.flat(operands.data)
        self.channels = int(operands.data.shape[-1])
        self.row_pitch = window.padded_columns * pitch
        self.is_inside = not window.padding[0] and asked <= window.in_rows
        self.dtype = str(operands.data.dtype)
        self.lanes = lanes_of(self.dtype)
        self.buffer = e.opaque(count * self.row_pitch + self.lanes, self.dtype, "rows")

    def fill_border(self) -> None:
        """The columns left and right of the input."""
        fill_sides(self.e, self.window, self.count, self.pitch, self._constant)

    def fill(self, b: Any, first: Any, channel: Any = 0) -> None:
        """Rows `first`.. of the padded input, and of their pixels `width` channels from `channel`
        on."""
        e, window = self.e, self.window
        top, left, _, _ = window.padding
        with e.loop("row", self.count) as row:
            start = e.bind("start", row * self.row_pitch + left * self.pitch)
            source = e.bind("source", first + row - top)

            def copy(start: Any = start, source: Any = source) -> None:
                self._copy(start, b, source, channel)

            def border(start: Any = start) -> None:
                self._constant(start, window.in_columns * self.pitch)

            if self.is_inside:
                copy()
            else:
                e.branch(tirx.all(source >= 0, source < window.in_rows), copy, border)

    def _copy(self, to: Any, b: Any, row: Any, channel: Any) -> None:
        e, window = self.e, self.window
        first = (b * window.in_rows + row) * window.in_columns
        if self.data is None:
            with e.loop("x", window.in_columns) as x, e.loop("c", self.width) as c:
                e.store(self.buffer, self._element(b, row, x, channel + c), to + x * self.pitch + c)
        elif self.width == self.channels == self.pitch:
            self.run(to, first * self.channels, window.in_columns * self.channels)
        else:
            with e.loop("x", window.in_columns) as x:
                self.run(to + x * self.pitch, (first + x) * self.channels + channel, self.width)

    def _element(self, b: Any, row: Any, x: Any, c: Any) -> Any:
        indices = self.window.indices(b, row, x, c)
        return self.fused.inline(self.operands.data, indices, lambda _buffer, _indices: None)

    def run(self, to: Any, origin: Any, count: int) -> None:
        """`count` neighbouring integers of the input; the last vector is moved back."""
        assert self.data is not None
        copy_run(self.e, self.buffer, to, self.data, origin, count)

    def _constant(self, start: Any, count: int) -> None:
        value, lanes = tirx.const(self.pad_value, self.dtype), self.lanes
        whole, rest = divmod(count, lanes)
        if whole:
            with self.e.loop("i", whole) as i:
                wide = tirx.Broadcast(value, lanes)
                self.e.store_vector(self.buffer, wide, start + i * lanes, lanes)
        if rest:
            with self.e.loop("i", rest) as i:
                self.e.store(self.buffer, value, start + whole * lanes + i)


def lanes_of(dtype: str) -> int:
    """Integers of a vector."""
    return VECTOR_BYTES * 8 // int(dtype.removeprefix("int"))


def copy_run(
    e: Emitter, to: tirx.Buffer, at: Any, source: tirx.Buffer, origin: Any, count: int
) -> None:
    """to[at..] = source[origin..], in vectors, of which the last is moved back."""
    widest = lanes_of(str(to.dtype))
    lanes = next(n for n in (16, 8, 4, 1) if n <= min(widest, count))
    whole = count // lanes

    def one(i: Any) -> None:
        e.store_vector(to, vector(source, origin + i, lanes), at + i, lanes)

    with e.loop("i", whole) as i:
        one(i * lanes)
    if count % lanes:
        one(count - lanes)
