"""The inner loops of the Helium matrix kernel as assembly.

    void NAME(const int8_t *data, const int8_t *weights, int32_t *sums)

One or two outputs by all channels. `vmlava` adds sixteen products to one general register, an even
one, so a tile has at most eight sums, and the odd registers hold addresses and counters. Two
outputs by four channels take two loads of data, four of weights and eight `vmlava` for 128
multiply-adds; one output goes by eight channels, with nine loads. Of 16-bit data a vector has eight
positions, whose weights are widened when they are loaded. Weights lie in the order in which they
are read. Sums are stored in blocks: [channels / 4][outputs][4].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .assembly import function
from .mve_taps import NEAR

VECTOR_BYTES = 16
CHANNELS = 4
MOST_OUTPUTS = 2
# Longer reductions are loops: so many steps are at most written out.
_MOST_STEPS = 12
_REACH = 1 << 20  # of an addition of two immediate numbers
_SUMS = ("r0", "r2", "r4", "r6", "r8", "r10", "r12", "lr")


@dataclass(frozen=True)
class MicroKernel:
    """What the loops depend on."""

    outputs: int
    """1 or 2, `column_bytes` apart in the data."""
    blocks: int
    """Channels / 4, rounded up."""
    rows: int
    """Kernel rows, `row_bytes` apart in the data."""
    run: int
    """Positions of a kernel row, rounded up to vectors in the weights."""
    column_bytes: int
    row_bytes: int
    is_exact: bool
    """Whether nothing behind a run may be read."""
    item_bytes: int
    """Of the data: 1 or 2."""
    unroll: int = _MOST_STEPS
    """Steps written out at most."""

    @property
    def lanes(self) -> int:
        """Positions of a vector."""
        return VECTOR_BYTES // self.item_bytes

    @property
    def steps(self) -> int:
        """Vectors of a kernel row."""
        return -(-self.run // self.lanes)

    @property
    def weight_bytes(self) -> int:
        """Of a block."""
        return self.rows * self.steps * CHANNELS * self.lanes

    @property
    def is_near(self) -> bool:
        """Whether one address serves both outputs."""
        return self.column_bytes <= NEAR

    @property
    def is_possible(self) -> bool:
        """Whether two immediate numbers reach from one row, output or block to the next."""
        run = self.run * self.item_bytes
        return max(self.row_bytes, self.column_bytes, run, self.weight_bytes) < _REACH

    @property
    def at_once(self) -> int:
        """Blocks of channels of one turn."""
        return 2 if self.outputs == 1 and self.blocks > 1 else 1

    @property
    def has_tail(self) -> bool:
        """Whether the last vector of a row is read in part."""
        return self.is_exact and self.run % self.lanes != 0

    @property
    def is_whole(self) -> bool:
        """Whether the whole reduction is written out."""
        return self.rows * self.steps <= self.unroll

    @property
    def turns(self) -> tuple[int, int]:
        """(turns of the loop over a kernel row, steps of a turn); what is left is written out."""
        steps = self.steps
        if steps <= self.unroll:
            return 1, steps
        steps -= self.has_tail
        each = -(-steps // -(-steps // self.unroll))
        return steps // each, each

    @property
    def cost(self) -> int:
        """Instructions of a call, roughly."""
        together = self.at_once
        step = self.outputs + CHANNELS * together * (1 + self.outputs)
        turns = -(-self.blocks // together)
        inside = self.rows * (self.steps * step + 3) + 6
        return 30 + turns * inside

    @property
    def name(self) -> str:
        """Unique among the kernels of a program, the same for equal ones."""
        facts = (
            self.outputs, self.blocks, self.rows, self.run, self.column_bytes, self.row_bytes,
            int(self.is_exact), self.item_bytes, self.unroll,
        )  # fmt: skip
        return "tvmc_mve_" + "_".join(str(fact) for fact in facts)

    def assembly(self) -> str:
        """The function."""
        body = ["push {r4-r11, lr}", "mov r9, r2", "mov r3, r0"]
        if self.has_tail:
            body += [f"movs r2, #{self.run % self.lanes}", f"vctp.{8 * self.item_bytes} r2"]
        body += _open(self)
        together = self.at_once
        whole, rest = divmod(self.blocks, together)
        body += _Turn(self, together, 1).lines(whole)
        if rest:
            body += _Turn(replace(self, blocks=1), 1, 5).lines(1)
        body += [f"add sp, #{_BYTES}", "pop {r4-r11, pc}"]
        return function(self.name, body)


# The frame: eight zeros that sums start from, both outputs' data, a counter of blocks.
_ZEROS, _DATA, _BLOCKS, _BYTES = 0, 32, 40, 48


def _open(kernel: MicroKernel) -> list[str]:
    """The frame; r0 and r2 are free."""
    out = [f"sub sp, #{_BYTES}"]
    if not kernel.is_whole:
        out += ["movs r2, #0", "vdup.32 q0, r2"]
        out += [f"vstrw.32 q0, [sp, #{_ZEROS + at}]" for at in (0, 16)]
    if kernel.outputs == 2 and not kernel.is_near:
        out += add("r5", "r3", kernel.column_bytes)
    return [*out, f"strd r3, r5, [sp, #{_DATA}]"]


class _Turn:
    """All channels, `together` blocks at a time. r1: weights; r3, r5: data, or r3 alone where the
    second output is near; r5: the second block's weights; r7, r11: counters; r9: sums."""

    def __init__(self, kernel: MicroKernel, together: int, label: int) -> None:
        self.kernel, self.together, self.label = kernel, together, label
        self.sums = list(_SUMS[: kernel.outputs * CHANNELS * together])

    def lines(self, count: int) -> list[str]:
        """`count` turns."""
        kernel = self.kernel
        out: list[str] = []
        # With loops over rows and over their steps, both counters are taken.
        in_memory = kernel.rows > 1 and kernel.turns[0] > 1
        if count > 1:
            out.append(f"movw r11, #{count}")
            if in_memory:
                out.append(f"str r11, [sp, #{_BLOCKS}]")
        out.append(f"{self.label}:")
        if kernel.outputs == 2 and not kernel.is_near:
            out.append(f"ldrd r3, r5, [sp, #{_DATA}]")
        else:
            out.append(f"ldr r3, [sp, #{_DATA}]")
        if self.together == 2:
            out += add("r5", "r1", kernel.weight_bytes)
        sums = ", ".join(self.sums)
        out += self.whole() if kernel.is_whole else [f"ldm sp, {{{sums}}}", *self.loops()]
        if self.together == 2:
            out.append("mov r1, r5")
        out.append(f"stm r9!, {{{sums}}}")
        if count > 1:
            if in_memory:
                out.append(f"ldr r11, [sp, #{_BLOCKS}]")
            out.append("subs r11, #1")
            if in_memory:
                out.append(f"str r11, [sp, #{_BLOCKS}]")
            out.append(f"bne.w {self.label}b")
        return out

    def whole(self) -> list[str]:
        """The reduction without loops: its first step starts the sums."""
        out: list[str] = []
        for row in range(self.kernel.rows):
            out += self.next_row() if row else []
            for step in range(self.kernel.steps):
                out += self.step(step, "vmlav" if row == step == 0 else "vmlava")
        return out

    def loops(self) -> list[str]:
        kernel = self.kernel
        turns, each = kernel.turns
        rows, inner = self.label + 1, self.label + 2
        counter = "r11" if turns > 1 else "r7"
        out: list[str] = []
        if kernel.rows > 1:
            out += [f"movw {counter}, #{kernel.rows}", f"{rows}:"]
        if turns > 1:
            out += [f"movw r7, #{turns}", f"{inner}:"]
        for step in range(each):
            out += self.step(step, "vmlava")
        if turns > 1:
            out += ["subs r7, #1", f"bne.w {inner}b"]
        for step in range(turns * each, kernel.steps):
            out += self.step(step, "vmlava")
        if kernel.rows > 1:
            out += [*self.next_row(), f"subs {counter}, #1", f"bne.w {rows}b"]
        return out

    def next_row(self) -> list[str]:
        """From behind one kernel row's data to the next."""
        kernel = self.kernel
        forth = kernel.row_bytes - kernel.steps * VECTOR_BYTES
        out = add("r3", "r3", forth)
        if kernel.outputs == 2 and not kernel.is_near:
            out += add("r5", "r5", forth)
        return out

    def step(self, number: int, operation: str) -> list[str]:
        """A vector of positions: all loads and products."""
        kernel = self.kernel
        is_tail = kernel.has_tail and number == kernel.steps - 1
        out = [f"vps{'t' * kernel.outputs}"] if is_tail else []
        bits = 8 * kernel.item_bytes
        load = f"vldr{'bh'[kernel.item_bytes - 1]}{'t' * is_tail}.u{bits}"
        weights_load = "vldrb.u8" if bits == 8 else "vldrb.s16"
        if kernel.outputs == 2:
            second = f"[r3, #{kernel.column_bytes}]" if kernel.is_near else "[r5], #16"
            out.append(f"{load} q1, {second}")
        out.append(f"{load} q0, [r3], #16")
        for block in range(self.together):
            weights = "r5" if block else "r1"
            for c in range(CHANNELS):
                w = f"q{2 + c % 2}"
                out.append(f"{weights_load} {w}, [{weights}], #{kernel.lanes}")
                for p in range(kernel.outputs):
                    total = self.sums[(block * kernel.outputs + p) * CHANNELS + c]
                    out.append(f"{operation}.s{bits} {total}, {w}, q{p}")
        return out


def add(to: str, value: str, number: int) -> list[str]:
    """to = value + number, |number| below `_REACH`."""
    if number == 0:
        return [] if to == value else [f"mov {to}, {value}"]
    name = "add" if number > 0 else "sub"
    number = abs(number)
    assert number < _REACH, number
    low, high = number & 0xFFF, number & 0xFF000
    out = [f"{name}.w {to}, {value}, #{high}"] if high else []
    return out + ([f"{name}w {to}, {to if high else value}, #{low}"] if low else [])
