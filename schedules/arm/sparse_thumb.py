"""What the loops of sparse layers share in Thumb (`sparse_staged.py`): the frame, and in Thumb-2
everything but how entries are gathered and multiplied."""

from __future__ import annotations

from itertools import pairwise

from .assembly import again, arguments, entry, function
from .sparse_staged import StagedLoops

# The frame, of which the first two are read together.
VALUES, INITIAL, LAST, ENTRY, PARTS, FRAME = 0, 4, 8, 12, 16, 24
SUMS, STAGE, ENTRIES, COLUMN = arguments(FRAME, 4)


class ThumbLoops(StagedLoops):
    """Gathered one by one; at least two outputs at once."""

    narrowest = 2

    @property
    def _load(self) -> str:
        """The load of a byte of data."""
        return "ldrsb" if self.is_signed else "ldrb"

    @property
    def _load_offset(self) -> str:
        return "ldrh" if self.offset_bytes == 2 else "ldr"


class Thumb2Loops(ThumbLoops):
    """Up to three positions; the products' loop has two groups of entries."""

    widest = 3

    def assembly(self) -> str:
        body = [
            "push {r4-r11, lr}",
            f"sub sp, #{FRAME}",
            f"strd r2, r3, [sp, #{VALUES}]",
            *self._gather(),
            *self._multiply(),
            f"add sp, #{FRAME}",
            "pop {r4-r11, pc}",
        ]
        return function(self.name, body)

    def _gather(self) -> list[str]:
        """Then `LAST` is the stage's end, and `ENTRY` where the products begin: in the middle of
        the loop's two groups if the groups are odd, behind the loop if there are none."""
        bases = ["r0", "r3", "r4"][: self.columns]
        out = [f"ldr r12, [sp, #{ENTRIES}]", f"ldr r2, [sp, #{STAGE}]"]
        if self.columns > 1:
            out.append(f"ldr r5, [sp, #{COLUMN}]")
            out += [f"add {b}, {a}, r5" for a, b in pairwise(bases)]
        return [
            *out,
            *entry("r12", self.group, "4f", "5f", "6f", "r5", "r6"),
            f"str r5, [sp, #{ENTRY}]",
            "beq.w 2f",
            f"add r12, r1, r12, lsl #{self.offset_bytes // 2}",
            "1:",
            *self._gather_group(bases),
            "cmp r1, r12",
            "bne.w 1b",
            "2:",
            f"str r2, [sp, #{LAST}]",
        ]

    def _gather_group(self, bases: list[str]) -> list[str]:
        """A group of entries, whose offsets r1 leads to, of the positions at `bases`, to where r2
        leads; r5-r11 are free."""
        raise NotImplementedError

    def _multiply(self) -> list[str]:
        """All outputs of the block, a few at a time."""
        n = self.outputs
        sums = [f"r{4 + i}" for i in range(n * self.columns)]
        parts = self.block // n
        step, limit = self._step(sums), self._limit
        out = [
            "3:",
            f"ldrd r1, r2, [sp, #{VALUES}]",
            f"ldm r2!, {{{', '.join(sums[:n])}}}",
            *(f"mov {sums[i]}, {sums[i % n]}" for i in range(n, len(sums))),
            f"add r3, r1, #{self.group * n}",
            f"strd r3, r2, [sp, #{VALUES}]",
            f"ldr r0, [sp, #{STAGE}]",
            *([f"ldr {limit}, [sp, #{LAST}]"] if limit else []),
            f"ldr pc, [sp, #{ENTRY}]",
            "4:",
            *step,
            "5:",
            *step,
            *([] if limit else [f"ldr r2, [sp, #{LAST}]"]),
            f"cmp r0, {limit or 'r2'}",
            "bne.w 4b",
            "6:",
            f"ldr r2, [sp, #{SUMS}]",
            f"stm r2!, {{{', '.join(sums)}}}",
            f"str r2, [sp, #{SUMS}]",
        ]
        if parts == 1:
            return out
        start = [f"movs r1, #{parts}", f"str r1, [sp, #{PARTS}]"]
        return [*start, *out, *again(PARTS, "3b", "r1")]

    @property
    def _limit(self) -> str:
        """A register that holds the stage's end while groups are multiplied; none: ''."""
        raise NotImplementedError

    def _step(self, sums: list[str]) -> list[str]:
        """A group: r0 and r1, where data and weights are, move on."""
        raise NotImplementedError
