"""Packed weight layouts: a [K, N] weight cut into blocks that one vector instruction reads.

A layout's name is `O<width><axis><group>`: blocks of `width` output channels, inside a block
`group` consecutive reduction positions of one output side by side (4 for a byte dot product, 2 for
a 16-bit multiply-add, 1 for float). `axis` says what is padded to a multiple of `group`: `I` the
input channels of every tap, `R` every kernel row (its columns and channels lie side by side in NHWC
data), `K` the whole reduction axis. The array is [groups, blocks, K / group, width, group],
zero-filled; int4 codes lie two in a byte, K-step 2j in the low nibble and 2j + 1 in the high one.

A `T` behind the name turns the last two axes: [groups, blocks, K / group, group, width]. The
outputs of a position lie side by side, where an instruction takes every other byte of a word. A `J`
behind that joins two such outputs a, b to one 16-bit integer, 256 * b + a: with a negative a, the
byte of b is one less.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_NAME = re.compile(r"O(\d+)([IRK])(\d+)(TJ?)?")

Reduction = tuple[int, int, int]
"""Kernel rows, kernel columns, input channels of one group."""


@dataclass(frozen=True)
class PackedLayout:
    """`width` outputs by `group` reduction positions; `axis` is I, R or K."""

    width: int
    group: int
    axis: str
    turned: bool = False
    """Whether the outputs of a position lie side by side, not the positions of an output."""
    joined: bool = False
    """Whether two such outputs are one 16-bit integer."""

    @property
    def name(self) -> str:
        """The name `parse_layout` reads."""
        end = ("TJ" if self.joined else "T") if self.turned else ""
        return f"O{self.width}{self.axis}{self.group}{end}"

    def _round(self, n: int) -> int:
        return -(-n // self.group) * self.group

    def pitches(self, reduction: Reduction) -> tuple[int, int]:
        """Distance along the packed axis of two kernel rows and of two kernel columns."""
        _, columns, channels = reduction
        if self.axis == "I":
            return columns * self._round(channels), self._round(channels)
        row = columns * channels
        return (self._round(row) if self.axis == "R" else row), channels

    def steps(self, reduction: Reduction) -> int:
        """Length of the packed reduction axis in units of `group`."""
        return self._round(reduction[0] * self.pitches(reduction)[0]) // self.group

    def shape(self, groups: int, reduction: Reduction, columns: int, dtype: str) -> tuple[int, ...]:
        """Shape of the packed array for `groups` matrices [product(reduction), columns]."""
        steps = self.steps(reduction)
        if dtype == "int4":
            steps = -(-steps // 2)
        inner = (self.group, self.width) if self.turned else (self.width, self.group)
        return (groups, -(-columns // self.width), steps, *inner)


@lru_cache(maxsize=256)
def parse_layout(name: str) -> PackedLayout:
    """Inverse of `PackedLayout.name`; ValueError when `name` is no packed layout."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) < 1 or int(match[3]) < 1:
        rule = "O<width>(I|R|K)<group>[T[J]]"
        raise ValueError(f"weight layout {name!r} is neither plain nor {rule}")
    end = match[4] or ""
    return PackedLayout(int(match[1]), int(match[3]), match[2], bool(end), end == "TJ")
