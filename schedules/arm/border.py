"""The border of input rows that are copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..emit import Emitter
from ..window import Window


def fill_sides(
    e: Emitter, window: Window, rows: int, pitch: int, constant: Callable[[Any, int], None]
) -> None:
    """The columns left and right of the input, `pitch` elements each: written once, no row changes
    them. `constant(first, count)` writes elements of the border."""
    left, right = window.padding[1], window.padding[3]
    if not left and not right:
        return
    with e.loop("row", rows) as row:
        start = row * (window.padded_columns * pitch)
        constant(start, left * pitch)
        constant(start + (left + window.in_columns) * pitch, right * pitch)
