"""The inner loops of the matrix kernel for weights of four bits, opened while they are used.

A word holds four positions of two channels. In layout O2R2T a half of it is four codes of one
position pair: [a0 a2 b0 b2] and [a1 a3 b1 b3]. Moved to the top of its half, a code is 4096 times
itself, so that one `and` with a mask, its operand shifted, makes a pair for `smlad`: four of them
and a load for eight weights, as many instructions as bytes take. Sums are 4096 times too large
until the end (of a group), which they must fit: below 2^19, proven from the weights.

    void NAME(data, weights, initial, sums, end[, scales])

as in `microkernel.py`; `scales` are a byte for each of the two channels, group by group.
"""

from __future__ import annotations

from dataclasses import dataclass

from .assembly import add_constant, again, function, next_row
from .microkernel import MicroKernel

MOST_COLUMNS = 3
SUM_LIMIT = 1 << 19
_MASK = "0xf000f000"
_LDRD_REACH = 1020


@dataclass(frozen=True)
class NibbleKernel(MicroKernel):
    """`run` is even: steps of a group where there are groups, of a kernel row where not."""

    groups: int = 0
    """Of a kernel row, each with its own scale; 0: no scales."""

    @property
    def is_double(self) -> bool:
        """Whether a word's four pairs stay in registers for all outputs."""
        reach = (self.columns - 1) * self.column_bytes
        return self.columns <= 2 and self.is_aligned and reach <= _LDRD_REACH

    @property
    def is_possible(self) -> bool:
        return self.columns <= MOST_COLUMNS and super().is_possible

    @property
    def cost(self) -> int:
        """Instructions of a call, roughly."""
        word = 5 * (self.columns + 1) if self.is_double else 5 + 6 * self.columns
        group = 8 + 8 * self.columns if self.groups else 0
        runs = self.rows * max(1, self.groups)
        return runs * (self.run // 2 * word + 4 + group) + 6 * self.rows + 8 * self.columns + 24

    @property
    def name(self) -> str:
        return f"{super().name.replace('smlad', 'smlad4')}_{self.groups}"

    def assembly(self) -> str:
        """The function."""
        return function(self.name, _Body(self).lines())


class _Body:
    # The frame, what was pushed, and behind it the further arguments.
    SUMS, INITIAL, ROWS, GROUPS, SCALES, TOTALS, FRAME = 0, 4, 8, 12, 16, 24, 48
    END, SCALES_ARGUMENT = FRAME + 36, FRAME + 40

    def __init__(self, kernel: NibbleKernel) -> None:
        self.kernel = kernel
        self.sums = [f"r{4 + i}" for i in range(2 * kernel.columns)]
        self.pairs = list(zip(self.sums[::2], self.sums[1::2], strict=True))
        self.mask, self.limit = ("r11", "lr") if kernel.columns == 3 else ("r10", "r11")

    def lines(self) -> list[str]:
        kernel = self.kernel
        out = [
            "push {r4-r11, lr}",
            f"sub sp, #{self.FRAME}",
            f"str r3, [sp, #{self.SUMS}]",
            f"str r2, [sp, #{self.INITIAL}]",
        ]
        if kernel.groups:
            out += [f"ldr r12, [sp, #{self.SCALES_ARGUMENT}]", f"str r12, [sp, #{self.SCALES}]"]
            out.append("ldrd r12, lr, [r2]")
            out += [f"strd r12, lr, [sp, #{self._total(p)}]" for p in range(kernel.columns)]
        out.append(f"mov {self.mask}, #{_MASK}")
        out += [f"mov {total}, #0" for total in self.sums]
        if kernel.rows > 1:
            out += [f"movs r2, #{kernel.rows}", f"str r2, [sp, #{self.ROWS}]", "1:"]
        if kernel.groups > 1:
            out += [f"movs r2, #{kernel.groups}", f"str r2, [sp, #{self.GROUPS}]", "3:"]
        out += self.run()
        if kernel.groups:
            out += self.end_of_group()
        if kernel.groups > 1:
            out += again(self.GROUPS, "3b")
        if kernel.rows > 1:
            out += [*self.next_row(), *again(self.ROWS, "1b")]
        if kernel.groups:
            out += [
                f"ldrd {a}, {b}, [sp, #{self._total(p)}]" for p, (a, b) in enumerate(self.pairs)
            ]
        else:
            out += [f"ldr r2, [sp, #{self.INITIAL}]", "ldrd r2, r3, [r2]"]
            for a, b in self.pairs:
                out += [f"add {a}, r2, {a}, asr #12", f"add {b}, r3, {b}, asr #12"]
        out += [f"ldr r0, [sp, #{self.SUMS}]", f"stm r0, {{{', '.join(self.sums)}}}"]
        return [*out, f"add sp, #{self.FRAME}", "pop {r4-r11, pc}"]

    def _total(self, p: int) -> int:
        return self.TOTALS + 8 * p

    def run(self) -> list[str]:
        """The words of a kernel row or group: a loop, then what does not fill a turn of it."""
        words = self.kernel.run // 2
        unroll = max(1, self.kernel.unroll // 2)
        turns = words // unroll
        if turns <= 1:
            return [line for _ in range(words) for line in self.word()]
        out = add_constant(self.limit, "r1", turns * unroll * 4, "r2")
        out += ["2:", *(line for _ in range(unroll) for line in self.word())]
        out += [f"cmp r1, {self.limit}", "bne.w 2b"]
        return out + [line for _ in range(words % unroll) for line in self.word()]

    def word(self) -> list[str]:
        """Four positions of two channels."""
        mask = self.mask
        if self.kernel.is_double:
            a0, a1, b0, b1 = "r2", "r3", "r8", "r9"
            out = [
                f"ldr {b1}, [r1], #4",
                f"and {a0}, {mask}, {b1}, lsl #12",
                f"and {a1}, {mask}, {b1}, lsl #8",
                f"and {b0}, {mask}, {b1}, lsl #4",
                f"and {b1}, {mask}, {b1}",
            ]
            for p, (a, b) in enumerate(self.pairs):
                out.append(self.load("ldrd r12, lr", p, 8))
                out += [f"smlad {a}, r12, {a0}, {a}", f"smlad {b}, r12, {b0}, {b}"]
                out += [f"smlad {a}, lr, {a1}, {a}", f"smlad {b}, lr, {b1}, {b}"]
            return out
        out = ["ldr r2, [r1], #4"]
        second = "r10" if self.kernel.columns == 3 else "r9"
        for first_shift, second_shift in ((12, 4), (8, 0)):
            out.append(f"and r3, {mask}, r2, lsl #{first_shift}")
            moved = f", lsl #{second_shift}" if second_shift else ""
            out.append(f"and {second}, {mask}, r2{moved}")
            for p, (a, b) in enumerate(self.pairs):
                out.append(self.load("ldr r12", p, 4))
                out += [f"smlad {a}, r12, r3, {a}", f"smlad {b}, r12, {second}, {b}"]
        return out

    def load(self, what: str, p: int, step: int) -> str:
        """The first output's load moves the address on, so it comes first."""
        if p == 0:
            return f"{what}, [r0], #{step}"
        return f"{what}, [r0, #{p * self.kernel.column_bytes - step}]"

    def end_of_group(self) -> list[str]:
        """totals += scale * sums, and the sums start anew."""
        out = [f"ldr r12, [sp, #{self.SCALES}]", "ldrb r2, [r12], #1", "ldrb r3, [r12], #1"]
        out.append(f"str r12, [sp, #{self.SCALES}]")
        for p, (a, b) in enumerate(self.pairs):
            place = f"[sp, #{self._total(p)}]"
            out += [f"ldrd r12, lr, {place}", f"asr {a}, {a}, #12", f"asr {b}, {b}, #12"]
            out += [f"mla r12, {a}, r2, r12", f"mla lr, {b}, r3, lr", f"strd r12, lr, {place}"]
            out += [f"mov {a}, #0", f"mov {b}, #0"]
        return out

    def next_row(self) -> list[str]:
        """To the ring's next row."""
        kernel = self.kernel
        distance = kernel.row_bytes - kernel.run * max(1, kernel.groups) * 4
        return next_row(distance, kernel.ring_bytes, self.END)
