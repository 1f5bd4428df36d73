"""The loops for RISC-V without vectors. See `loops.py`.

A position: weights wait in registers, data pass through one. A 64-bit core multiplies two channels
at once: x * (a + b * 2^32) = x*a + (x*b) * 2^32, and so do the sums, from which the lower half is
taken as a signed number and off the whole.
"""

from __future__ import annotations

from .loops import Loops

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
        size = self.bytes_of_register
        store, load = ("sw", "lw") if size == 4 else ("sd", "ld")
        count = self.columns * self.channels // self._together
        # a0, a1: addresses; a2: limit; a3: what passes; ra: product.
        registers = [*_FREE, *_SAVED]
        self_sums, registers = registers[:count], registers[count:]
        held = registers[: self._held]
        saved = ["ra", *(r for r in _SAVED if r in self_sums or r in held)]
        frame = -(-(len(saved) + 3) * size // 16) * 16
        sums_at, end_at, rows_at = (frame - (i + 1) * size for i in range(3))
        out = [f"addi sp, sp, -{frame}"]
        out += [f"{store} {register}, {i * size}(sp)" for i, register in enumerate(saved)]
        out += [f"{store} a2, {sums_at}(sp)", f"{store} a3, {end_at}(sp)"]
        out += self._start(self_sums)
        if self.rows > 1:
            out += [f"li a2, {self.rows}", f"{store} a2, {rows_at}(sp)", "1:"]
        out += self._row(self_sums, held)
        if self.rows > 1:
            if self.ring_bytes:
                out += [f"{load} a2, {end_at}(sp)", "bltu a0, a2, 3f"]
                out += [f"li a2, {self.ring_bytes}", "sub a0, a0, a2", "3:"]
            out += [f"{load} a2, {rows_at}(sp)", "addi a2, a2, -1", f"{store} a2, {rows_at}(sp)"]
            out += ["beqz a2, 4f", "j 1b", "4:"]
        out += [f"{load} a2, {sums_at}(sp)", *self._finish(self_sums)]
        out += [f"{load} {register}, {i * size}(sp)" for i, register in enumerate(saved)]
        return [*out, f"addi sp, sp, {frame}", "ret"]

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
        out = []
        for i in range(pairs):
            out += [f"lw {sums[i]}, {8 * i}(a2)", f"lw ra, {8 * i + 4}(a2)"]
            out += ["slli ra, ra, 32", f"add {sums[i]}, {sums[i]}, ra"]
        return out + [f"mv {sums[i]}, {sums[i % pairs]}" for i in range(pairs, len(sums))]

    def _finish(self, sums: list[str]) -> list[str]:
        if self._together == 1:
            return super()._finish(sums)
        out = []
        for i, both in enumerate(sums):
            out += [f"sw {both}, {8 * i}(a2)", f"sext.w ra, {both}", f"sub {both}, {both}, ra"]
            out += [f"srli {both}, {both}, 32", f"sw {both}, {8 * i + 4}(a2)"]
        return out

    def _weights(self, held: list[str], place: int) -> list[str]:
        if self._together == 1:
            return super()._weights(held, place)
        out = []
        for i, pair in enumerate(held):
            out += [f"lb {pair}, {place + 2 * i}(a1)", f"lb ra, {place + 2 * i + 1}(a1)"]
            out += ["slli ra, ra, 32", f"add {pair}, {pair}, ra"]
        return out


def _add(to: str, value: str, number: int) -> list[str]:
    """to = value + number"""
    if number == 0 and to == value:
        return []
    if abs(number) <= _REACH:
        return [f"addi {to}, {value}, {number}"]
    return [f"li ra, {number}", f"add {to}, {value}, ra"]
