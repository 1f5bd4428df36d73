"""How far apart rows of a copy lie."""

from __future__ import annotations

LINE_BYTES = 64
# Rows at such a distance share a few sets of the first-level cache (64 sets of 64 bytes, 8 ways):
# the rows of one tile would throw each other out.
ALIASED_BYTES = 1024


def unaliased_row(elements: int, element_bytes: int) -> int:
    """Elements from one row to the next, for rows of `elements`."""
    is_aliased = elements * element_bytes % ALIASED_BYTES == 0
    return elements + (LINE_BYTES // element_bytes if is_aliased else 0)
