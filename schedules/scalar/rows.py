"""Where a kernel reads its bytes: the layer's input as it lies, or a ring of its rows with border.

Rows are copied where they need a border, or where something is fused in front of the layer: a ring
of as many rows as the kernel is high, each input row once. A 1x1 layer behind something fused
copies the positions of a tile.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..arm.border import fill_sides
from ..emit import Emitter
from ..fused import FusedFunction
from ..operands import Operands
from ..window import Window


class Rows:
    """Writes the copies, where there are any, and says where a position's bytes are."""

    def __init__(
        self,
        e: Emitter,
        window: Window,
        fused: FusedFunction,
        operands: Operands,
        dtype: str,
        pad_value: int,
        tile: int,
        channels: int = 0,
    ) -> None:
        """`tile`: positions of a 1x1 layer at a time; `channels` of the input, where they are not
        the window's."""
        self.e, self.window, self.fused, self.operands = e, window, fused, operands
        self.channels = channels or window.channels
        self.dtype, self.pad_value = dtype, pad_value
        self.data = None if operands.data in fused.producers else e.flat(operands.data)
        self.is_direct = self.data is not None and not any(window.padding)
        self.is_flat = window.is_flat
        self.rows = (window.kernel[0] - 1) * window.dilation[0] + 1
        self.row_pitch = window.padded_columns * self.channels
        self.ring = 0
        """Elements of the ring; 0: there is none."""
        if self.data is not None and self.is_direct:
            self.buffer = self.data
            return
        if self.is_flat:
            self.buffer = e.alloc(tile * self.channels, dtype, "tile")
            return
        self.ring = self.rows * self.row_pitch
        self.buffer = e.alloc(self.ring, dtype, "rows")

    def tile(self, first: Any, count: int) -> Any:
        """Where positions `first`.. of a layer without neighbours begin."""
        channels = self.channels
        if self.is_direct:
            return first * channels
        with self.e.loop("p", count) as p:
            self._position(p * channels, 0, first + p, 0)
        return tirx.const(0, "int32")

    def start(self, b: Any) -> None:
        """The border, and the rows that the first output row shares with the next ones."""
        if self.is_direct:
            return
        e = self.e
        fill_sides(e, self.window, self.rows, self.channels, self._constant)
        with e.loop("row", self.rows - self._fresh) as row:
            self._fill(b, row)

    @property
    def _fresh(self) -> int:
        """Rows that every output row brings."""
        return min(self.window.strides[0], self.rows)

    def next(self, b: Any, y: Any) -> Any:
        """Bring in the rows of output row `y`; where the first of them begins."""
        e, window = self.e, self.window
        first = y * window.strides[0]
        if self.is_direct:
            return e.bind("top", (b * window.in_rows + first) * self.row_pitch)
        with e.loop("row", self._fresh) as row:
            self._fill(b, first + (self.rows - self._fresh) + row)
        return e.bind("top", first % self.rows * self.row_pitch)

    def row(self, top: Any, ky: int) -> Any:
        """Where kernel row `ky` begins."""
        place = top + ky * self.window.dilation[0] * self.row_pitch
        if not self.ring or not ky:
            return place
        return tirx.Select(place >= self.ring, place - self.ring, place)

    def _fill(self, b: Any, padded_row: Any) -> None:
        """Row `padded_row`, counted from the border's first, into its place in the ring."""
        e, window = self.e, self.window
        top, left, bottom, _ = window.padding
        count = window.in_columns * self.channels
        first = e.bind("start", padded_row % self.rows * self.row_pitch + left * self.channels)
        row = padded_row - top

        def copy() -> None:
            if self.data is not None:
                origin = (b * window.in_rows + row) * count
                with e.loop("i", count) as i:
                    e.store(self.buffer, self.data[origin + i], first + i)
                return
            with e.loop("x", window.in_columns) as x:
                self._position(first + x * self.channels, b, row, x)

        if not top and not bottom:
            copy()
            return
        e.branch(
            tirx.all(row >= 0, row < window.in_rows), copy, lambda: self._constant(first, count)
        )

    def _constant(self, first: Any, count: int) -> None:
        value = tirx.const(self.pad_value, self.dtype)
        with self.e.loop("i", count) as i:
            self.e.store(self.buffer, value, first + i)

    def _position(self, to: Any, b: Any, row: Any, x: Any) -> None:
        """The channels of one position, through whatever stages produce them."""
        e, window = self.e, self.window
        buffer = self.operands.data
        with e.loop("c", self.channels) as c:
            indices = window.indices(b, row, x, c)
            value = self.fused.inline(buffer, indices, lambda _buffer, _indices: None)
            e.store(self.buffer, value, to + c)
