"""Rows of the input as 16-bit integers: what a reduction reads as words of two.

A ring of as many rows as the kernel is high: each input row is widened once, and the border is in
the ring, so that the kernel asks nothing. A 1x1 layer widens the positions of a tile.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx

from ..emit import Emitter
from ..fused import FusedFunction
from ..operands import Operands
from ..spec import ceil_div
from ..window import Window
from .border import fill_sides
from .dsp import extend_even, extend_odd, join_high, join_low, word


class Widened:
    """Writes the copies of input into an emitter."""

    def __init__(
        self,
        e: Emitter,
        window: Window,
        fused: FusedFunction,
        operands: Operands,
        dtype: str,
        pad_value: int,
        pitch: int,
        tile: int,
        slack: int,
    ) -> None:
        self.e, self.window, self.fused, self.operands = e, window, fused, operands
        self.dtype, self.pad_value, self.pitch = dtype, pad_value, pitch
        self.data = None if operands.data in fused.producers else e.flat(operands.data)
        self.flat = window.is_flat
        self.rows = (window.kernel[0] - 1) * window.dilation[0] + 1
        self.row_pitch = window.padded_columns * pitch
        size = tile * pitch if self.flat else self.rows * self.row_pitch
        # Whole words, so that all rows but those of an odd pitch are read aligned.
        self.buffer = e.alloc(ceil_div(size + slack, 2) * 2, "int16", "rows")

    def fill_tile(self, first: Any, count: int) -> None:
        """Positions `first`.. of a 1x1 layer."""
        window = self.window
        if self.data is not None and self.pitch == window.channels:
            channels = window.channels
            self._run(tirx.const(0, "int32"), first * channels, count * channels)
            return
        with self.e.loop("p", count) as p:
            self._pixel(p * self.pitch, 0, first + p, 0)

    def fill_border(self) -> None:
        """The columns left and right of the input."""
        fill_sides(self.e, self.window, self.rows, self.pitch, self._constant)

    def fill_row(self, b: Any, padded_row: Any) -> None:
        """Row `padded_row`, counted from the border's first, into its slot of the ring."""
        e, window = self.e, self.window
        top, left, bottom, _ = window.padding
        start = e.bind("start", padded_row % self.rows * self.row_pitch + left * self.pitch)
        row = padded_row - top

        def copy() -> None:
            if self.data is not None and self.pitch == window.channels:
                count = window.in_columns * window.channels
                self._run(start, (b * window.in_rows + row) * count, count)
                return
            with e.loop("x", window.in_columns) as x:
                self._pixel(start + x * self.pitch, b, row, x)

        if not top and not bottom:
            copy()
            return
        e.branch(
            tirx.all(row >= 0, row < window.in_rows),
            copy,
            lambda: self._constant(start, window.in_columns * self.pitch),
        )

    def slot(self, padded_row: Any) -> Any:
        """Where a row of the ring starts."""
        return padded_row % self.rows * self.row_pitch

    def _constant(self, start: Any, count: int) -> None:
        """`count` times the border's value, by words where they are whole."""
        value = tirx.const(self.pad_value, "int16")
        if count % 2 or self.pitch % 2:
            with self.e.loop("i", count) as i:
                self.e.store(self.buffer, value, start + i)
            return
        # Not a word reinterpreted: LLVM's code generator takes a zero for a null pointer.
        pair = tirx.Broadcast(value, 2)
        with self.e.loop("i", count // 2) as i:
            self.e.store_vector(self.buffer, pair, start + i * 2, 2)

    def _run(self, to: Any, origin: Any, count: int) -> None:
        """`count` neighbouring elements."""
        e, data = self.e, self.data
        assert data is not None
        if self.dtype == "int16":
            with e.loop("i", count) as i:
                e.store(self.buffer, data[origin + i], to + i)
            return
        signed = self.dtype == "int8"

        def four(i: Any) -> None:
            bytes_ = e.bind("bytes", word(data, origin + i * 4, 4))
            even, odd = extend_even(bytes_, signed), extend_odd(bytes_, signed)
            even, odd = e.bind("even", even), e.bind("odd", odd)
            self._store(to + i * 4, join_low(even, odd))
            self._store(to + i * 4 + 2, join_high(even, odd))

        e.unrolled("i", count // 4, 4 if count >= 32 else 1, four)
        for rest in range(count - count % 4, count):
            e.store(self.buffer, data[origin + rest].astype("int16"), to + rest)

    def _store(self, to: Any, pair: ir.Expr) -> None:
        halves = tirx.reinterpret("int16x2", pair)
        self.e.store_vector(self.buffer, halves, to, 2)

    def _pixel(self, to: Any, b: Any, row: Any, x: Any) -> None:
        """The channels of one position, through whatever stages produce them."""
        e, window = self.e, self.window
        buffer = self.operands.data
        with e.loop("c", window.channels) as c:
            indices = window.indices(b, row, x, c)
            value = self.fused.inline(buffer, indices, lambda _buffer, _indices: None)
            e.store(self.buffer, value.astype("int16"), to + c)
        for c in range(window.channels, self.pitch):
            e.store(self.buffer, tirx.const(0, "int16"), to + c)
