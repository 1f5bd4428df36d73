"""A way to store a layer's weights that are not zero, as a kernel of the target reads them."""

from __future__ import annotations

from dataclasses import dataclass

from .saturation import NarrowSums

# Weights of a layer whose pattern is written into its kernel, at most: by then the code leaves the
# first-level cache.
MOST_COMPILED = 2048
# Code of one of them.
CODE_BYTES = 10


@dataclass(frozen=True)
class SparseForm:
    """One form, with the time that its kernel is expected to take.

    A weight is stored for each input that any of `block` neighbouring outputs reads; blocks are
    filled up with zeros to whole `group`s of entries.
    """

    block: int
    cost: float
    """Of a stored weight, in times of a weight of the layer's dense kernel."""
    group: int = 1
    constant: float = 0.0
    """What the kernel takes beside its weights, in times of the whole dense kernel."""
    by_channel: bool = False
    """Whether offsets name channels and taps, entries in this order."""
    compiled: bool = False
    """Whether the pattern is part of the kernel's code."""
    bits: bool = False
    """Whether a bit of each weight, or of each input of a block, says that it is stored."""
    sums: NarrowSums | None = None
    """How the kernel adds in 16 bits; it serves weights that prove this exact."""

    @property
    def words(self) -> str:
        """Tells the forms of a layer apart, in reports and where a choice is noted."""
        words = f"{self.block}x1" + (f" in groups of {self.group}" if self.group > 1 else "")
        words += " by channel" if self.by_channel else " by bits" if self.bits else ""
        return words + (" in code" if self.compiled else "")

    def share(self, stored: int, size: int) -> float:
        """Expected time in times of the dense kernel's, for `stored` of `size` weights."""
        return self.cost * stored / size + self.constant
