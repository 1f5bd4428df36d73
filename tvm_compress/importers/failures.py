"""When another library fails: its error in one line, and its builder left tidy."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm import relax


def first_line(error: BaseException) -> str:
    """The line of an error that says what is wrong: the first, or the last of a C++ trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    chosen = lines[-1] if lines[0].startswith(("Traceback", "Stack trace", "[")) else lines[0]
    return chosen[:300]


def close_blocks(builder: relax.BlockBuilder) -> None:
    """End the blocks that an error left open; TVM would print a warning for them."""
    with contextlib.suppress(Exception):
        for _ in range(64):
            builder._end_block()
