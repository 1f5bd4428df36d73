"""The loops for RISC-V without vectors. See `loops.py`.

A position: weights wait in registers, data pass through one. A 64-bit core multiplies two channels
at once (`riscv_frame.py`).
"""

from __future__ import annotations

from .loops import Loops
from .riscv_frame import Frame, load_pairs, store_pairs

_REACH = 2047
_SAVED = [f"s{i}" for i in range(12)]
_FREE = [*(f"t{i}" for i in range(7)), *(f"a{i}" for i in range(4, 8))]
_CONSTANTS = 5
"""Addresses, the loop's limit, what passes and a product."""


class Rv32Loops(Loops):
    """`mul` and `add`."""

    prefix = "rv32"
    bytes_of_register = 4

    @property
    def _together(self) -> int:
        """Channels that share a multiplication."""
        return 1

    @property
    def _held(self) -> int:
        """Registers for weights of a position; none where they serve one output."""
        return self.channels // self._together if self.columns > 1 else 0

    @property
    def is_possible(self) -> bool:
        sums = self.columns * self.channels // self._together
        far = (self.columns - 1) * self.column_bytes + self.unroll
        registers = sums + self._held + _CONSTANTS
        return far <= _REACH and registers <= len(_SAVED) + len(_FREE) + 5

    @property
    def step_cost(self) -> float:
        products = self.columns * self.channels // self._together
        weights = self.channels * (1 if self._together == 1 else 2)
        return self.columns + weights + 2 * products + 3 / self.unroll

    def lines(self) -> list[str]:
        count = self.columns * self.channels // self._together
        # a0, a1: addresses; a2: limit; a3: what passes; ra: product.
        registers = [*_FREE, *_SAVED]
        sums, registers = registers[:count], registers[count:]
        held = registers[: self._held]
        saved = ("ra", *(r for r in _SAVED if r in sums or r in held))
        frame = Frame(saved, 3, self.bytes_of_register)
        store, load = frame.store, frame.load
        sums_at, end, rows = (frame.slot(i) for i in range(3))
        out = [f"{store} a2, {sums_at}", f"{store} a3, {end}", *self._start(sums)]
        if self.rows > 1:
            out += [f"li a2, {self.rows}", f"{store} a2, {rows}", "1:"]
        out += self._row(sums, held)
        if self.rows > 1:
            if self.ring_bytes:
                out += [f"{load} a2, {end}", "bltu a0, a2, 3f"]
                out += [f"li a2, {self.ring_bytes}", "sub a0, a0, a2", "3:"]
            out += [f"{load} a2, {rows}", "addi a2, a2, -1", f"{store} a2, {rows}"]
            out += ["beqz a2, 4f", "j 1b", "4:"]
        return frame.around([*out, f"{load} a2, {sums_at}", *self._finish(sums)])

    def _start(self, sums: list[str]) -> list[str]:
        out = [f"lw {sums[c]}, {4 * c}(a2)" for c in range(self.channels)]
        rest = range(self.channels, len(sums))
        return out + [f"mv {sums[i]}, {sums[i % self.channels]}" for i in rest]

    def _finish(self, sums: list[str]) -> list[str]:
        return [f"sw {register}, {4 * i}(a2)" for i, register in enumerate(sums)]

    def _row(self, sums: list[str], held: list[str]) -> list[str]:
        turns, rest = divmod(self.run, self.unroll)
        done, out = turns * self.unroll, []
        if turns:
            out += [*_add("a2", "a1", done * self.channels), "2:"]
            for u in range(self.unroll):
                out += self._step(sums, held, u)
            out += [f"addi a0, a0, {self.unroll}", f"addi a1, a1, {self.unroll * self.channels}"]
            out.append("bne a1, a2, 2b")
        for u in range(rest):
            out += self._step(sums, held, u)
        out += _add("a1", "a1", rest * self.channels)
        return out + (_add("a0", "a0", self.row_bytes - done) if self.rows > 1 else [])

    def _step(self, sums: list[str], held: list[str], u: int) -> list[str]:
        load = "lb" if self.is_signed else "lbu"
        place = u * self.channels
        if not held:
            out = [f"{load} a3, {u}(a0)"]
            for c, total in enumerate(sums):
                out += [f"lb ra, {place + c}(a1)", "mul ra, ra, a3", f"add {total}, {total}, ra"]
            return out
        out = self._weights(held, place)
        for p in range(self.columns):
            out.append(f"{load} a3, {p * self.column_bytes + u}(a0)")
            for i, weight in enumerate(held):
                total = sums[p * len(held) + i]
                out += [f"mul ra, a3, {weight}", f"add {total}, {total}, ra"]
        return out

    def _weights(self, held: list[str], place: int) -> list[str]:
        return [f"lb {register}, {place + i}(a1)" for i, register in enumerate(held)]


class Rv64Loops(Rv32Loops):
    """Two channels a multiplication, where several outputs use the pair."""

    prefix = "rv64"
    bytes_of_register = 8

    @property
    def _together(self) -> int:
        return 2 if self.columns > 1 and self.channels % 2 == 0 else 1

    def _start(self, sums: list[str]) -> list[str]:
        if self._together == 1:
            return super()._start(sums)
        pairs = self.channels // 2
        out = load_pairs(sums[:pairs], "lw", 4, "a2")
        return out + [f"mv {sums[i]}, {sums[i % pairs]}" for i in range(pairs, len(sums))]

    def _finish(self, sums: list[str]) -> list[str]:
        if self._together == 1:
            return super()._finish(sums)
        return store_pairs(sums, "a2")

    def _weights(self, held: list[str], place: int) -> list[str]:
        if self._together == 1:
            return super()._weights(held, place)
        return load_pairs(held, "lb", 1, "a1", place)


def _add(to: str, value: str, number: int) -> list[str]:
    """to = value + number"""
    if number == 0 and to == value:
        return []
    if abs(number) <= _REACH:
        return [f"addi {to}, {value}, {number}"]
    return [f"li ra, {number}", f"add {to}, {value}, ra"]
