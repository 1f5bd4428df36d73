"""The inner loops of the matrix kernel as assembly: a compiler keeps eight sums in fourteen
registers only with spills, a third of all instructions.

    void NAME(const int16_t *data, const int8_t *weights, const int32_t initial[2],
              int32_t sums[columns][2], const int16_t *end)

`data` is the first output's first position in the ring of rows, whose end is `end`. A *double step*
takes four positions of the reduction: for three outputs one `ldrd` of weights, four `sxtb16`, three
`ldrd` of data and twelve `smlad` for 24 multiply-adds. Four outputs leave registers for single
steps only: 15 instructions for 16. `ldrd` wants whole words: odd pitches take single steps, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from .assembly import add_constant, again, function, next_row

MOST_COLUMNS = 4
_LDRD_REACH, _LDR_REACH = 1020, 4095


@dataclass(frozen=True)
class MicroKernel:
    """What the loops depend on. Bytes throughout."""

    columns: int
    run: int
    """Steps of a kernel row: two positions each, one word of weights."""
    rows: int
    """Kernel rows."""
    column_bytes: int
    """Between two outputs of the tile."""
    row_bytes: int
    """Between two kernel rows in the ring."""
    ring_bytes: int
    unroll: int
    """Steps written out; even."""
    is_aligned: bool
    """Whether all data are read at whole words."""
    is_joined: bool = False

    @property
    def is_double(self) -> bool:
        """Whether double steps are possible."""
        return (
            self.columns <= 3
            and self.is_aligned
            and (self.columns - 1) * self.column_bytes <= _LDRD_REACH
        )

    @property
    def is_quadruple(self) -> bool:
        """Whether there are registers for four steps at once."""
        return self.columns == 1 and self.is_joined and self.is_double

    @property
    def is_possible(self) -> bool:
        """Whether the immediate offsets reach all outputs."""
        return (self.columns - 1) * self.column_bytes <= _LDR_REACH

    @property
    def cost(self) -> int:
        """Instructions of a call, roughly."""
        step = 5 * self.columns + 5 if self.is_double else 2 * (3 * self.columns + 3)
        step = 7 if self.is_quadruple else step - 2 * self.is_joined
        end = 6 + 2 * self.is_joined
        return self.rows * (self.run * step // 2 + 10) + end * self.columns + 20

    @property
    def name(self) -> str:
        """Unique among the kernels of a program, the same for equal ones."""
        facts = (
            self.columns, self.run, self.rows, self.column_bytes, self.row_bytes, self.ring_bytes,
            self.unroll, int(self.is_aligned), int(self.is_joined),
        )  # fmt: skip
        return "tvmc_smlad_" + "_".join(str(fact) for fact in facts)

    def assembly(self) -> str:
        """The function."""
        sums = [f"r{4 + i}" for i in range(2 * self.columns)]
        if self.columns == 4:
            opened, data = ["r2", "r3"], ["r12"]
        else:
            free = [f"r{i}" for i in range(4 + 2 * self.columns, 12)]
            opened, data = ["r2", "r3", *free[:2]], ["r12", "lr"]
        body = _Body(self, sums, opened, data)
        return function(self.name, body.lines())


class _Body:
    # The frame: where the sums go, end of a run's weights, kernel rows left, initial sums; then
    # what was pushed, and behind it the fifth argument.
    SUMS, LAST, ROWS, INITIAL, FRAME = 0, 4, 8, 12, 16
    END = FRAME + 36

    def __init__(
        self, kernel: MicroKernel, sums: list[str], opened: list[str], data: list[str]
    ) -> None:
        self.kernel, self.sums, self.opened, self.data = kernel, sums, opened, data

    def lines(self) -> list[str]:
        kernel, sums = self.kernel, self.sums
        out = ["push {r4-r11, lr}", f"sub sp, #{self.FRAME}", f"str r3, [sp, #{self.SUMS}]"]
        if kernel.is_joined:
            out += [f"str r2, [sp, #{self.INITIAL}]", f"ldr {sums[0]}, [r2]"]
            out += [f"mov {total}, {sums[0]}" for total in sums[1:]]
        else:
            out.append(f"ldrd {sums[0]}, {sums[1]}, [r2]")
            out += [f"mov {sums[i]}, {sums[i % 2]}" for i in range(2, len(sums))]
        if kernel.rows > 1:
            out += [f"movs r2, #{kernel.rows}", f"str r2, [sp, #{self.ROWS}]", "1:"]
        out += self.row()
        if kernel.rows > 1:
            out += self.next_row()
        if kernel.is_joined:
            out += [f"ldr r2, [sp, #{self.INITIAL}]", "ldr r2, [r2, #4]"]
            for first, second in zip(sums[::2], sums[1::2], strict=True):
                out += [f"sub {second}, {second}, {first}", f"add {second}, r2, {second}, asr #8"]
        out += [f"ldr r0, [sp, #{self.SUMS}]", f"stm r0, {{{', '.join(sums)}}}"]
        return [*out, f"add sp, #{self.FRAME}", "pop {r4-r11, pc}"]

    def row(self) -> list[str]:
        """One kernel row: a loop, then what does not fill a turn of it."""
        kernel, out = self.kernel, []
        turns = kernel.run // kernel.unroll
        rest = kernel.run - turns * kernel.unroll
        if turns == 1:
            turns, rest = 0, kernel.run
        if turns:
            last = turns * kernel.unroll * 4
            in_register = kernel.columns == 4 or kernel.columns <= 2
            limit = "lr" if kernel.columns == 4 else "r11"
            if in_register:
                out += add_constant(limit, "r1", last, "r2")
            else:
                out += [*add_constant("r2", "r1", last, "r3"), f"str r2, [sp, #{self.LAST}]"]
            out += ["2:", *self.steps(kernel.unroll)]
            if not in_register:
                limit = "r2"
                out.append(f"ldr r2, [sp, #{self.LAST}]")
            out += [f"cmp r1, {limit}", "bne.w 2b"]
        return out + self.steps(rest)

    def steps(self, count: int) -> list[str]:
        if not self.kernel.is_double:
            return [line for _ in range(count) for line in self.single()]
        if self.kernel.is_quadruple:
            out = [line for _ in range(count // 4) for line in self.quadruple()]
            count %= 4
            out += [line for _ in range(count // 2) for line in self.double()]
            return out + (self.single() if count % 2 else [])
        out = [line for _ in range(count // 2) for line in self.double()]
        return out + (self.single() if count % 2 else [])

    def quadruple(self) -> list[str]:
        """Four words of data and of joined weights."""
        first, second = self.sums
        words, data, opened = ["r6", "r7", "r8", "r9"], ["r2", "r3", "r12", "lr"], "r10"
        out = [f"ldm r1!, {{{', '.join(words)}}}", f"ldm r0!, {{{', '.join(data)}}}"]
        for x, w in zip(data, words, strict=True):
            out += [
                f"sxtb16 {opened}, {w}",
                f"smlad {first}, {x}, {opened}, {first}",
                f"smlad {second}, {x}, {w}, {second}",
            ]
        return out

    def double(self) -> list[str]:
        """[a0 b0 a1 b1] [a2 b2 a3 b3]"""
        a0, b0, a1, b1 = self.opened
        x, y = self.data
        if self.kernel.is_joined:
            out = [f"ldrd {b0}, {b1}, [r1], #8", f"sxtb16 {a0}, {b0}", f"sxtb16 {a1}, {b1}"]
        else:
            out = [f"ldrd {a0}, {a1}, [r1], #8"]
            for even, odd in ((a0, b0), (a1, b1)):
                out += [f"sxtb16 {odd}, {even}, ror #8", f"sxtb16 {even}, {even}"]
        for p in range(self.kernel.columns):
            sa, sb = self.sums[2 * p : 2 * p + 2]
            out += [
                self.load(f"ldrd {x}, {y}", p, 8),
                f"smlad {sa}, {x}, {a0}, {sa}",
                f"smlad {sb}, {x}, {b0}, {sb}",
                f"smlad {sa}, {y}, {a1}, {sa}",
                f"smlad {sb}, {y}, {b1}, {sb}",
            ]
        return out

    def single(self) -> list[str]:
        a, b = self.opened[:2]
        x = self.data[0]
        if self.kernel.is_joined:
            out = [f"ldr {b}, [r1], #4", f"sxtb16 {a}, {b}"]
        else:
            out = [f"ldr {a}, [r1], #4", f"sxtb16 {b}, {a}, ror #8", f"sxtb16 {a}, {a}"]
        for p in range(self.kernel.columns):
            sa, sb = self.sums[2 * p : 2 * p + 2]
            out += [
                self.load(f"ldr {x}", p, 4),
                f"smlad {sa}, {x}, {a}, {sa}",
                f"smlad {sb}, {x}, {b}, {sb}",
            ]
        return out

    def load(self, what: str, p: int, step: int) -> str:
        """The first output's load moves the address on, so it comes first."""
        if p == 0:
            return f"{what}, [r0], #{step}"
        return f"{what}, [r0, #{p * self.kernel.column_bytes - step}]"

    def next_row(self) -> list[str]:
        kernel = self.kernel
        distance = kernel.row_bytes - kernel.run * 4
        return [*next_row(distance, kernel.ring_bytes, self.END), *again(self.ROWS, "1b")]
