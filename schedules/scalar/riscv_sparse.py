"""The loops of sparse layers for RISC-V without vectors (`../arm/sparse_staged.py`).

An entry of four positions by four outputs takes 40 instructions on 32 bits. A 64-bit core
multiplies two outputs at once (`riscv_frame.py`): 48 for eight positions by four.
"""

from __future__ import annotations

from ..arm.assembly import function
from ..arm.sparse_staged import StagedLoops
from .riscv_frame import Frame, load_pairs, store_pairs

_SAVED = tuple(f"s{i}" for i in range(12))
_SUMS = [*_SAVED, "t3", "t4", "t5", "t6"]
_DATA = ["t0", "t1", "t2", "a0"]


class Rv32SparseLoops(StagedLoops):
    """`mul` and `add`. After gathering: a1 weights, a6 and a7 where weights and stage are read, ra
    a product; what else the parts need is in the frame."""

    prefix = "sparse_rv32"
    call_cost, part_cost, channel_cost, output_cost = 60, 45, 45, 20
    widest = 4
    narrowest = 2
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
        frame = Frame(("ra", *_SAVED), 4, self.bytes_of_register)
        return function(
            self.name, frame.around([*self._gather(), *self._multiply(frame)]), thumb=False
        )

    def _gather(self) -> list[str]:
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

    def _multiply(self, frame: Frame) -> list[str]:
        n, store, load = self.outputs, frame.store, frame.load
        count = n * self.columns // self._together
        sums = _SUMS[:count]
        last, parity, stage, parts = (frame.slot(i) for i in range(4))
        return [
            f"{store} t3, {last}",
            "andi a6, a6, 1",
            f"{store} a6, {parity}",
            f"{store} a5, {stage}",
            f"li a6, {self.block // n}",
            f"{store} a6, {parts}",
            "3:",
            *self._start(sums),
            f"addi a3, a3, {4 * n}",
            "mv a6, a2",
            f"addi a2, a2, {n}",
            f"{load} a7, {stage}",
            f"{load} a5, {last}",
            f"{load} ra, {parity}",
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
            f"{load} a6, {parts}",
            "addi a6, a6, -1",
            f"{store} a6, {parts}",
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
        out = load_pairs(sums[:pairs], "lw", 4, "a3")
        return out + [f"mv {sums[i]}, {sums[i % pairs]}" for i in range(pairs, len(sums))]

    def _finish(self, sums: list[str]) -> list[str]:
        if self._together == 1:
            return super()._finish(sums)
        return store_pairs(sums, "a4")

    def _step(self, sums: list[str], weights: int, stage: int) -> list[str]:
        if self._together == 1:
            return super()._step(sums, weights, stage)
        pairs = self.outputs // 2
        held = ["t0", "t1"][:pairs]
        out = load_pairs(held, "lb", 1, "a6", weights)
        for p in range(self.columns):
            out.append(f"{self._load} a1, {stage + p}(a7)")
            for i, pair in enumerate(held):
                total = sums[p * pairs + i]
                out += [f"mul ra, a1, {pair}", f"add {total}, {total}, ra"]
        return out
