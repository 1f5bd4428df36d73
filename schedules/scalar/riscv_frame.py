"""What the loops for RISC-V without vectors share: the frame, and two numbers in a register.

A 64-bit core multiplies two channels at once: x * (a + b * 2^32) = x*a + (x*b) * 2^32, and so do
the sums, from which the lower half is taken as a signed number and off the whole.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """Registers that are kept, and behind them a few slots for addresses and counts."""

    saved: tuple[str, ...]
    slots: int
    size: int
    """Bytes of a register."""

    @property
    def store(self) -> str:
        """The store of a register."""
        return "sw" if self.size == 4 else "sd"

    @property
    def load(self) -> str:
        """The load of a register."""
        return "lw" if self.size == 4 else "ld"

    @property
    def _bytes(self) -> int:
        return -(-(len(self.saved) + self.slots) * self.size // 16) * 16

    def slot(self, number: int) -> str:
        """The address of a slot."""
        return f"{self._bytes - (number + 1) * self.size}(sp)"

    def around(self, body: list[str]) -> list[str]:
        """A whole function of what is in the frame."""
        places = [(register, f"{i * self.size}(sp)") for i, register in enumerate(self.saved)]
        return [
            f"addi sp, sp, -{self._bytes}",
            *(f"{self.store} {register}, {place}" for register, place in places),
            *body,
            *(f"{self.load} {register}, {place}" for register, place in places),
            f"addi sp, sp, {self._bytes}",
            "ret",
        ]


def load_pairs(pairs: list[str], load: str, size: int, base: str, at: int = 0) -> list[str]:
    """Two neighbouring numbers of `size` bytes each to a register, from `at` behind `base` on."""
    out = []
    for i, pair in enumerate(pairs):
        first = at + 2 * i * size
        out += [f"{load} {pair}, {first}({base})", f"{load} ra, {first + size}({base})"]
        out += ["slli ra, ra, 32", f"add {pair}, {pair}, ra"]
    return out


def store_pairs(pairs: list[str], base: str) -> list[str]:
    """Inverse of loading words."""
    out = []
    for i, both in enumerate(pairs):
        out += [f"sw {both}, {8 * i}({base})", f"sext.w ra, {both}", f"sub {both}, {both}, ra"]
        out += [f"srli {both}, {both}, 32", f"sw {both}, {8 * i + 4}({base})"]
    return out
