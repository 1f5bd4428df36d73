"""The loops for Cortex-M without DSP instructions. See `loops.py`."""

from __future__ import annotations

from itertools import pairwise

from ..arm.assembly import add_constant, again, next_row
from .loops import Loops

_LDRSB_REACH = 4095


class _ThumbLoops(Loops):
    is_thumb = True

    @property
    def _load(self) -> str:
        """The load of a byte of data."""
        return "ldrsb" if self.is_signed else "ldrb"


class Thumb2Loops(_ThumbLoops):
    """A position: one load for every output and channel, one `mla` for every product. Of outputs
    and channels the fewer wait in two registers, the others pass through a third."""

    prefix = "mla"
    # The frame: where the sums go, kernel rows left, the ring's end.
    SUMS, ROWS, END, FRAME = 0, 4, 8, 12

    @property
    def is_possible(self) -> bool:
        far = (self.columns - 1) * self.column_bytes
        few = min(self.columns, self.channels) <= 2 and self.columns * self.channels <= 8
        return few and far <= _LDRSB_REACH

    @property
    def step_cost(self) -> float:
        return self.columns + self.channels + self.columns * self.channels + 2 / self.unroll

    def lines(self) -> list[str]:
        sums = [f"r{4 + i}" for i in range(self.columns * self.channels)]
        out = ["push {r4-r11, lr}", f"sub sp, #{self.FRAME}", f"str r2, [sp, #{self.SUMS}]"]
        if self.ring_bytes:
            out.append(f"str r3, [sp, #{self.END}]")
        out += [f"ldr {sums[c]}, [r2, #{4 * c}]" for c in range(self.channels)]
        out += [
            f"mov {sums[i]}, {sums[i % self.channels]}" for i in range(self.channels, len(sums))
        ]
        if self.rows > 1:
            out += [f"movs r2, #{self.rows}", f"str r2, [sp, #{self.ROWS}]", "1:"]
        out += self._row(sums)
        if self.rows > 1:
            out += self._next_row()
        out += [f"ldr r0, [sp, #{self.SUMS}]", f"stm r0, {{{', '.join(sums)}}}"]
        if len(sums) == 1:
            out[-1] = f"str {sums[0]}, [r0]"
        return [*out, f"add sp, #{self.FRAME}", "pop {r4-r11, pc}"]

    def _row(self, sums: list[str]) -> list[str]:
        turns, rest = divmod(self.run, self.unroll)
        if turns == 1:
            turns, rest = 0, self.run
        out = []
        if turns:
            out += add_constant("lr", "r1", turns * self.unroll * self.channels, "r2")
            out += ["2:", *(line for _ in range(self.unroll) for line in self._step(sums))]
            out += ["cmp r1, lr", "bne.w 2b"]
        return out + [line for _ in range(rest) for line in self._step(sums)]

    def _step(self, sums: list[str]) -> list[str]:
        data = [self._datum(p) for p in range(self.columns)]
        weights = ["ldrsb {}, [r1], #1"] * self.channels
        by_column = self.channels <= 2
        held, passing = (weights, data) if by_column else (data, weights)
        out = [load.format(f"r{2 + i}") for i, load in enumerate(held)]
        for j, load in enumerate(passing):
            out.append(load.format("r12"))
            for i in range(len(held)):
                place = j * self.channels + i if by_column else i * self.channels + j
                out.append(f"mla {sums[place]}, r12, r{2 + i}, {sums[place]}")
        return out

    def _datum(self, p: int) -> str:
        """The first output's load moves the address on, so it comes first."""
        if p == 0:
            return f"{self._load} {{}}, [r0], #1"
        return f"{self._load} {{}}, [r0, #{p * self.column_bytes - 1}]"

    def _next_row(self) -> list[str]:
        distance = self.row_bytes - self.run
        return [*next_row(distance, self.ring_bytes, self.END), *again(self.ROWS, "1b")]


class Thumb1Loops(_ThumbLoops):
    """Signed bytes are loaded from an address plus a register, so every output and every channel
    has its address, at the end of its run, and one register counts up to 0 for all. Sums are in
    high registers, to which `add` reaches. Weights lie channel by channel."""

    prefix = "muls"
    is_channel_major = True
    SUMS, END, ROWS, FRAME = 0, 4, 8, 12

    @property
    def is_possible(self) -> bool:
        tile = sorted((self.columns, self.channels))
        return tile == [2, 2] or (tile[0] == 1 and tile[1] <= 4)

    @property
    def step_cost(self) -> float:
        products = self.columns * self.channels
        copies = 1 if products == 4 and self.columns == 2 else 0
        return self.columns + self.channels + 2 * products + copies + 1 + 1 / self.unroll

    def lines(self) -> list[str]:
        count = self.columns + self.channels
        xs = [f"r{i}" for i in range(self.columns)]
        ws = [f"r{i}" for i in range(self.columns, count)]
        t = [f"r{i}" for i in range(count, 7)]
        sums = [f"r{8 + i}" for i in range(self.columns * self.channels)]
        out = ["push {r4-r7, lr}"]
        out += [f"mov r{4 + i}, r{8 + i}" for i in range(4)]
        out += ["push {r4-r7}", f"sub sp, #{self.FRAME}", f"str r2, [sp, #{self.SUMS}]"]
        if self.ring_bytes:  # compared with addresses at the ends of runs
            out += [*_small("r4", self.run), "adds r3, r3, r4", f"str r3, [sp, #{self.END}]"]
        for c in range(self.channels):
            out.append(f"ldr r4, [r2, #{4 * c}]")
            out += [f"mov {sums[p * self.channels + c]}, r4" for p in range(self.columns)]
        out.append("movs r6, r1")
        out += self._addresses("r0", xs, self.column_bytes, "r7")
        out += self._addresses("r6", ws, self.rows * self.run, "r7")
        if self.rows > 1:
            out += [f"movs r7, #{self.rows}", f"str r7, [sp, #{self.ROWS}]", "1:"]
        out += self._row(xs, ws, t, sums)
        if self.rows > 1:
            out += self._next_row(xs, ws, t)
        out.append(f"ldr r0, [sp, #{self.SUMS}]")
        for i, register in enumerate(sums):
            out += [f"mov r1, {register}", f"str r1, [r0, #{4 * i}]"]
        out += [f"add sp, #{self.FRAME}", "pop {r4-r7}"]
        out += [f"mov r{8 + i}, r{4 + i}" for i in range(4)]
        return [*out, "pop {r4-r7, pc}", ".balign 4", ".ltorg"]

    def _addresses(self, first: str, to: list[str], distance: int, scratch: str) -> list[str]:
        """to[i] = first + run + i * distance; `first` may be to[0]."""
        out = [*_small(scratch, self.run), f"adds {to[0]}, {first}, {scratch}"]
        if len(to) > 1:
            out += _small(scratch, distance)
        return out + [f"adds {b}, {a}, {scratch}" for a, b in pairwise(to)]

    def _row(self, xs: list[str], ws: list[str], t: list[str], sums: list[str]) -> list[str]:
        turns, rest = divmod(self.run, self.unroll)
        out = [*_small("r7", self.run), "rsbs r7, r7, #0"]
        step = self._step(xs, ws, t, sums)
        out += step * rest
        if turns:
            out += ["2:", *(step * self.unroll), "bne 2b"]
        return out

    def _step(self, xs: list[str], ws: list[str], t: list[str], sums: list[str]) -> list[str]:
        def load(to: str, address: str) -> str:
            name = self._load if address in xs else "ldrsb"
            return f"{name} {to}, [{address}, r7]"

        if self.columns == 2 and self.channels == 2:
            x, w, y = t
            out = [
                load(x, xs[0]),
                load(w, ws[0]),
                f"movs {y}, {w}",
                f"muls {y}, {x}, {y}",
                f"add {sums[0]}, {y}",
                load(y, xs[1]),
                f"muls {w}, {y}, {w}",
                f"add {sums[2]}, {w}",
                load(w, ws[1]),
                f"muls {x}, {w}, {x}",
                f"add {sums[1]}, {x}",
                f"muls {w}, {y}, {w}",
                f"add {sums[3]}, {w}",
            ]
        else:
            held, passing = (xs[0], ws) if self.columns == 1 else (ws[0], xs)
            out = [load(t[0], held)]
            for address, total in zip(passing, sums, strict=True):
                out += [load(t[1], address), f"muls {t[1]}, {t[0]}, {t[1]}", f"add {total}, {t[1]}"]
        return [*out, "adds r7, #1"]

    def _next_row(self, xs: list[str], ws: list[str], t: list[str]) -> list[str]:
        a, b = t[:2]
        out = [*_small(a, self.row_bytes), *(f"adds {x}, {x}, {a}" for x in xs)]
        out += [*_small(a, self.run), *(f"adds {w}, {w}, {a}" for w in ws)]
        if self.ring_bytes:
            out += [f"ldr {a}, [sp, #{self.END}]", *_small(b, self.ring_bytes)]
            for x in xs:
                out += [f"cmp {x}, {a}", "blo 3f", f"subs {x}, {x}, {b}", "3:"]
        return [
            *out,
            f"ldr {a}, [sp, #{self.ROWS}]",
            f"subs {a}, #1",
            f"str {a}, [sp, #{self.ROWS}]",
            "beq 4f",
            "b 1b",
            "4:",
        ]


def _small(to: str, number: int) -> list[str]:
    """to = number, in Thumb-1."""
    return [f"movs {to}, #{number}"] if number < 256 else [f"ldr {to}, ={number}"]
