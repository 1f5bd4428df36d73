"""The loops of sparse layers with `smlad` (`sparse_staged.py`).

A group is four entries: values [group][output][4], and of each position two words, (x0, x2) and
(x1, x3), since `sxtb16` opens a word of weights [w0, w1, w2, w3] into (w0, w2) and (w1, w3). Three
positions by two outputs take 20 instructions a group for 24 multiply-adds, one position by four
outputs 19 for 16; gathering 27 for three positions and all outputs of the block.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..spec import SparseConv2dSpec
from .assembly import entry, function
from .sparse_staged import StagedLoops

# The frame, of which the first two are read together; then what was pushed, and behind it the other
# arguments.
_VALUES, _INITIAL, _LAST, _ENTRY, _PARTS, _FRAME = 0, 4, 8, 12, 16, 24
_SUMS, _STAGE, _ENTRIES, _COLUMN = (_FRAME + 36 + 4 * i for i in range(4))


class SmladLoops(StagedLoops):
    """Of up to three positions; blocks of an even number of outputs."""

    prefix = "sparse_smlad"
    call_cost, part_cost, output_cost = 38, 25, 9.5
    group = 4
    stage_bytes = 2
    widest = 3

    @classmethod
    def takes(cls, spec: SparseConv2dSpec) -> bool:
        return super().takes(spec) and spec.block % 2 == 0

    @property
    def outputs(self) -> int:
        """Outputs at once."""
        return 4 if self.columns == 1 and self.block % 4 == 0 else 2

    def place(self, channel: Any, column: int) -> Any:
        n = self.outputs
        if self.columns == 1:
            return channel
        return channel // n * (n * self.columns) + column * n + channel % n

    @property
    def entry_cost(self) -> float:
        group = 19 if self.outputs == 4 else 5 + 5 * self.columns
        return (6 + 7 * self.columns + self.block // self.outputs * (group + 1)) / self.group

    def assembly(self) -> str:
        body = [
            "push {r4-r11, lr}",
            f"sub sp, #{_FRAME}",
            f"strd r2, r3, [sp, #{_VALUES}]",
            *self._gather(),
            *self._multiply(),
            f"add sp, #{_FRAME}",
            "pop {r4-r11, pc}",
        ]
        return function(self.name, body)

    def _gather(self) -> list[str]:
        """Then `_LAST` is the stage's end, and `_ENTRY` where the products begin: in the middle of
        the loop's two groups if the groups are odd, behind the loop if there are none."""
        load = "ldrsb" if self.is_signed else "ldrb"
        offset = "ldrh" if self.offset_bytes == 2 else "ldr"
        bases = ["r0", "r3", "r4"][: self.columns]
        out = [f"ldr r12, [sp, #{_ENTRIES}]", f"ldr r2, [sp, #{_STAGE}]"]
        if self.columns > 1:
            out.append(f"ldr r5, [sp, #{_COLUMN}]")
            out += [f"add {b}, {a}, r5" for a, b in pairwise(bases)]
        out += [
            *entry("r12", self.group, "4f", "5f", "6f", "r5", "r6"),
            f"str r5, [sp, #{_ENTRY}]",
            "beq.w 2f",
            f"add r12, r1, r12, lsl #{self.offset_bytes // 2}",
            "1:",
            *(f"{offset} r{5 + i}, [r1], #{self.offset_bytes}" for i in range(4)),
        ]
        for base in bases:
            out += [
                f"{load} r9, [{base}, r5]",
                f"{load} r10, [{base}, r7]",
                "pkhbt r9, r9, r10, lsl #16",
                f"{load} r10, [{base}, r6]",
                f"{load} r11, [{base}, r8]",
                "pkhbt r10, r10, r11, lsl #16",
                "strd r9, r10, [r2], #8",
            ]
        return [*out, "cmp r1, r12", "bne.w 1b", "2:", f"str r2, [sp, #{_LAST}]"]

    def _multiply(self) -> list[str]:
        """All outputs of the block, a few at a time."""
        n = self.outputs
        count = n * self.columns
        sums = [f"r{4 + i}" for i in range(count)]
        parts = self.block // n
        # What is left of r0-r12 and lr holds the stage's end, where anything is left.
        limit = "r3" if n == 4 else ("r8" if self.columns < 3 else "")
        steps = self._four(sums) if n == 4 else self._two(sums)
        out = ["3:", f"ldrd r1, r2, [sp, #{_VALUES}]"]
        if n == 4:
            out.append(f"ldm r2!, {{{', '.join(sums)}}}")
        else:
            out.append("ldrd r4, r5, [r2], #8")
            out += [f"mov {sums[i]}, {sums[i % 2]}" for i in range(2, count)]
        out += [
            f"add r3, r1, #{4 * n}",
            f"strd r3, r2, [sp, #{_VALUES}]",
            f"ldr r0, [sp, #{_STAGE}]",
        ]
        if limit:
            out.append(f"ldr {limit}, [sp, #{_LAST}]")
        out += [f"ldr pc, [sp, #{_ENTRY}]", "4:", *steps, "5:", *steps]
        if limit:
            out += [f"cmp r0, {limit}"]
        else:
            out += [f"ldr r2, [sp, #{_LAST}]", "cmp r0, r2"]
        out += [
            "bne.w 4b",
            "6:",
            f"ldr r2, [sp, #{_SUMS}]",
            f"stm r2!, {{{', '.join(sums)}}}",
            f"str r2, [sp, #{_SUMS}]",
        ]
        if parts > 1:  # the count has been used
            out += [
                f"ldr r1, [sp, #{_PARTS}]",
                "subs r1, #1",
                f"str r1, [sp, #{_PARTS}]",
                "bne.w 3b",
            ]
            return [f"movs r1, #{parts}", f"str r1, [sp, #{_PARTS}]", *out]
        return out

    def _two(self, sums: list[str]) -> list[str]:
        """A group: two outputs by all positions."""
        a, b, odd_a, odd_b, x, y = "r2", "r3", "r10", "r11", "r12", "lr"
        out = [f"ldrd {a}, {b}, [r1], #{4 * self.block}"]
        for even, odd in ((a, odd_a), (b, odd_b)):
            out += [f"sxtb16 {odd}, {even}, ror #8", f"sxtb16 {even}, {even}"]
        for p in range(self.columns):
            sa, sb = sums[2 * p : 2 * p + 2]
            out += [
                f"ldrd {x}, {y}, [r0], #8",
                f"smlad {sa}, {x}, {a}, {sa}",
                f"smlad {sb}, {x}, {b}, {sb}",
                f"smlad {sa}, {y}, {odd_a}, {sa}",
                f"smlad {sb}, {y}, {odd_b}, {sb}",
            ]
        return out

    def _four(self, sums: list[str]) -> list[str]:
        """A group: four outputs by one position."""
        words, x, y = ["r8", "r9", "r10", "r11"], "r12", "lr"
        out = [f"ldrd {x}, {y}, [r0], #8", f"ldm r1, {{{', '.join(words)}}}"]
        out.append(f"add r1, #{4 * self.block}")
        for total, word in zip(sums, words, strict=True):
            out += [
                f"sxtb16 r2, {word}",
                f"smlad {total}, {x}, r2, {total}",
                f"sxtb16 {word}, {word}, ror #8",
                f"smlad {total}, {y}, {word}, {total}",
            ]
        return out
