"""The inner loops of the matrix kernel as assembly: what they depend on.

    void NAME(const int8_t *data, const int8_t *weights, int32_t *sums, const int8_t *end)

`sums` [columns][channels] begins with what the channels' sums start from. `data` is the first
output's first position in rows, of which a ring ends at `end`. Compilers spill a tile that fills
the registers, or multiply first and add later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..arm.assembly import function


@dataclass(frozen=True)
class Loops:
    """What the loops depend on. All lengths in bytes, which are positions."""

    columns: int
    channels: int
    run: int
    """Positions of a kernel row."""
    rows: int
    """Kernel rows."""
    column_bytes: int
    """Between two outputs of the tile."""
    row_bytes: int
    """Between two kernel rows."""
    ring_bytes: int
    """0: the rows are no ring."""
    unroll: int
    """Positions written out."""
    is_signed: bool

    prefix: ClassVar[str] = ""
    is_thumb: ClassVar[bool] = False
    is_channel_major: ClassVar[bool] = False
    """Whether weights lie channel by channel; else those of a position side by side."""

    @property
    def is_possible(self) -> bool:
        """Whether registers and immediate offsets reach."""
        raise NotImplementedError

    @property
    def step_cost(self) -> float:
        """Instructions of a position."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """The function's instructions."""
        raise NotImplementedError

    def assembly(self) -> str:
        """The function."""
        return function(self.name, self.lines(), self.is_thumb)

    @property
    def name(self) -> str:
        """Unique among the kernels of a program, the same for equal ones."""
        facts = (
            self.columns, self.channels, self.run, self.rows, self.column_bytes, self.row_bytes,
            self.ring_bytes, self.unroll, int(self.is_signed),
        )  # fmt: skip
        return f"tvmc_{self.prefix}_" + "_".join(str(fact) for fact in facts)
