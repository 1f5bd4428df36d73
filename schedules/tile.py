"""How many outputs one pass over the reduction computes: the register tile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` output positions times `vectors` registers of output channels."""

    rows: int
    columns: int
    vectors: int

    @property
    def positions(self) -> int:
        """Output positions."""
        return self.rows * self.columns
