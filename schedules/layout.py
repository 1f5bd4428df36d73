"""Packed weight layouts: a [K, N] weight cut into blocks that one vector instruction reads.

A layout's name is `O<width>K<group>` or `O<width>I<group>`: blocks of `width` output channels, inside a
block `group` consecutive reduction positions of one output side by side (4 for a byte dot product, 2 for a
16-bit multiply-add, 1 for float). With `K` the reduction axis (kernel row, kernel column, input channel) is
cut as a whole and padded once; with `I` the input channels of every tap are padded to a multiple of `group`.
The array is [groups, blocks, K / group, width, group], zero-filled; int4 codes lie two in a byte, K-step 2j in the
low nibble and 2j + 1 in the high one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_NAME = re.compile(r"O(\d+)([KI])(\d+)")


@dataclass(frozen=True)
class PackedLayout:
    """`width` outputs by `group` reduction positions; `per_tap` pads each tap's channels."""

    width: int
    group: int
    per_tap: bool

    @property
    def name(self) -> str:
        """The name `parse_layout` reads."""
        return f"O{self.width}{'I' if self.per_tap else 'K'}{self.group}"

    def tap_pitch(self, channels: int) -> int:
        """Distance of two taps along the packed reduction axis."""
        return -(-channels // self.group) * self.group if self.per_tap else channels

    def steps(self, taps: int, channels: int) -> int:
        """Length of the packed reduction axis in units of `group`."""
        return -(-taps * self.tap_pitch(channels) // self.group)

    def shape(
        self, groups: int, taps: int, channels: int, columns: int, dtype: str
    ) -> tuple[int, ...]:
        """Shape of the packed array for `groups` matrices [taps * channels, columns]."""
        steps = self.steps(taps, channels)
        if dtype == "int4":
            steps = -(-steps // 2)
        return (groups, -(-columns // self.width), steps, self.width, self.group)


@lru_cache(maxsize=256)
def parse_layout(name: str) -> PackedLayout:
    """Inverse of `PackedLayout.name`; ValueError when `name` is no packed layout."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) < 1 or int(match[3]) < 1:
        raise ValueError(
            f"weight layout {name!r} is neither plain nor O<width>K<group>/O<width>I<group>"
        )
    return PackedLayout(int(match[1]), int(match[3]), match[2] == "I")
