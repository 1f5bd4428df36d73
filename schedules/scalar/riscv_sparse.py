"""The loops of sparse layers for RISC-V without vectors (`../arm/sparse_staged.py`).

An entry of four positions by four outputs takes 40 instructions on 32 bits. A 64-bit core
multiplies two outputs at once, as in `riscv.py`: 48 for eight positions by four.
"""

from __future__ import annotations

from ..arm.assembly import section
from .thumb_sparse import WordLoops

_SUMS = [*(f"s{i}" for i in range(12)), "t3", "t4", "t5", "t6"]
_DATA = ["t0", "t1", "t2", "a0"]


class Rv32SparseLoops(WordLoops):
    """`mul` and `add`. After gathering: a1 weights, a6 and a7 where weights and stage are read, ra
    a product; what else the parts need is in the frame."""

    prefix = "sparse_rv32"
    call_cost, part_cost, channel_cost, output_cost = 60, 45, 45, 20
    stage_bytes = 1
    widest = 4
    bytes_of_register = 4

    def _outputs(self) -> tuple[int, ...]:
        return (8, 4, 2) if self.columns == 1 else (4, 2)

    @property
    def _load(self) -> str:
        """The load of a byte of data."""
        return "lb" if self.is_signed else "lbu"

    @property
    def _together(self) -> int:
        """Outputs that share a multiplication."""
        return 1

    @property
    def entry_cost(self) -> float:
        n, products = self.outputs, self.outputs * self.columns // self._together
        weights = n * (1 if self._together == 1 else 2)
        part = self.columns + weights + 2 * products + 1.5
        return 4 + 3 * self.columns + self.block // n * part

    def assembly(self) -> str:
        size = self.bytes_of_register
        store, load = ("sw", "lw") if size == 4 else ("sd", "ld")
        saved = ["ra", *_SUMS[:12]]
        frame = -(-(len(saved) + 4) * size // 16) * 16
        slots = [frame - (i + 1) * size for i in range(4)]
        out = [f"addi sp, sp, -{frame}"]
        out += [f"{store} {register}, {i * size}(sp)" for i, register in enumerate(saved)]
        out += self._gather(store, slots)
        out += self._multiply(store, load, slots)
        out += [f"{load} {register}, {i * size}(sp)" for i, register in enumerate(saved)]
        out += [f"addi sp, sp, {frame}", "ret"]
        label = [f".type {self.name}, %function", f"{self.name}:"]
        return "\n".join([*section(self.name), *label, *out, f".size {self.name}, . - {self.name}"])

    def _gather(self, store: str, slots: list[int]) -> list[str]:
        """Then t3 is the stage's end."""
        load = self._load
        offset, shift = ("lhu", 1) if self.offset_bytes == 2 else ("lw", 2)
        out = [f"slli t4, a6, {shift}", "add t4, t4, a1", "mv t3, a5", "beq a1, t4, 2f", "1:"]
        out += [f"{offset} t0, 0(a1)", "add t0, t0, a0"]
        for p in range(self.columns):
            out += ["add t0, t0, a7"] if p else []
            out += [f"{load} t1, 0(t0)", f"sb t1, {p}(t3)"]
        out += [f"addi a1, a1, {self.offset_bytes}", f"addi t3, t3, {self.columns}"]
        return [*out, "bne a1, t4, 1b", "2:"]

    def _multiply(self, store: str, load: str, slots: list[int]) -> list[str]:
        n = self.outputs
        count = n * self.columns // self._together
        sums = _SUMS[:count]
        last, parity, stage, parts = slots
        return [
            f"{store} t3, {last}(sp)",
            "andi a6, a6, 1",
            f"{store} a6, {parity}(sp)",
            f"{store} a5, {stage}(sp)",
            f"li a6, {self.block // n}",
            f"{store} a6, {parts}(sp)",
            "3:",
            *self._start(sums),
            f"addi a3, a3, {4 * n}",
            "mv a6, a2",
            f"addi a2, a2, {n}",
            f"{load} a7, {stage}(sp)",
            f"{load} a5, {last}(sp)",
            f"{load} ra, {parity}(sp)",
            "beqz ra, 4f",
            *self._steps(sums, 1),
            "4:",
            "beq a7, a5, 6f",
            "5:",
            *self._steps(sums, 2),
            "bne a7, a5, 5b",
            "6:",
            *self._finish(sums),
            f"addi a4, a4, {4 * n * self.columns}",
            f"{load} a6, {parts}(sp)",
            "addi a6, a6, -1",
            f"{store} a6, {parts}(sp)",
            "beqz a6, 7f",
            "j 3b",
            "7:",
        ]

    def _start(self, sums: list[str]) -> list[str]:
        n = self.outputs
        out = [f"lw {sums[c]}, {4 * c}(a3)" for c in range(n)]
        return out + [f"mv {sums[i]}, {sums[i % n]}" for i in range(n, len(sums))]

    def _finish(self, sums: list[str]) -> list[str]:
        return [f"sw {register}, {4 * i}(a4)" for i, register in enumerate(sums)]

    def _steps(self, sums: list[str], count: int) -> list[str]:
        """So many entries."""
        out = []
        for u in range(count):
            out += self._step(sums, u * self.block, u * self.columns)
        return [
            *out,
            f"addi a6, a6, {count * self.block}",
            f"addi a7, a7, {count * self.columns}",
        ]

    def _step(self, sums: list[str], weights: int, stage: int) -> list[str]:
        n = self.outputs
        data = _DATA[: self.columns]
        out = [f"{self._load} {x}, {stage + p}(a7)" for p, x in enumerate(data)]
        for c in range(n):
            out.append(f"lb a1, {weights + c}(a6)")
            for p, x in enumerate(data):
                total = sums[p * n + c]
                out += [f"mul ra, {x}, a1", f"add {total}, {total}, ra"]
        return out


class Rv64SparseLoops(Rv32SparseLoops):
    """Two outputs a multiplication, where several positions use the pair of weights."""

    prefix = "sparse_rv64"
    call_cost, part_cost, output_cost = 30, 48, 13
    widest = 8
    bytes_of_register = 8

    @property
    def _together(self) -> int:
        return 2 if self.columns > 1 else 1

    def _start(self, sums: list[str]) -> list[str]:
        if self._together == 1:
            return super()._start(sums)
        pairs = self.outputs // 2
        out = []
        for i in range(pairs):
            out += [f"lw {sums[i]}, {8 * i}(a3)", f"lw ra, {8 * i + 4}(a3)"]
            out += ["slli ra, ra, 32", f"add {sums[i]}, {sums[i]}, ra"]
        return out + [f"mv {sums[i]}, {sums[i % pairs]}" for i in range(pairs, len(sums))]

    def _finish(self, sums: list[str]) -> list[str]:
        if self._together == 1:
            return super()._finish(sums)
        out = []
        for i, both in enumerate(sums):
            out += [f"sw {both}, {8 * i}(a4)", f"sext.w ra, {both}", f"sub {both}, {both}, ra"]
            out += [f"srli {both}, {both}, 32", f"sw {both}, {8 * i + 4}(a4)"]
        return out

    def _step(self, sums: list[str], weights: int, stage: int) -> list[str]:
        if self._together == 1:
            return super()._step(sums, weights, stage)
        pairs = self.outputs // 2
        held = ["t0", "t1"][:pairs]
        out = []
        for i, pair in enumerate(held):
            out += [f"lb {pair}, {weights + 2 * i}(a6)", f"lb ra, {weights + 2 * i + 1}(a6)"]
            out += ["slli ra, ra, 32", f"add {pair}, {pair}, ra"]
        for p in range(self.columns):
            out.append(f"{self._load} a1, {stage + p}(a7)")
            for i, pair in enumerate(held):
                total = sums[p * pairs + i]
                out += [f"mul ra, a1, {pair}", f"add {total}, {total}, ra"]
        return out
