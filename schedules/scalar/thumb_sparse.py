"""The loops of sparse layers for Cortex-M without DSP instructions (`../arm/sparse_staged.py`)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..arm.assembly import entry, function
from ..arm.sparse_staged import StagedLoops
from ..spec import SparseConv2dSpec

# The frame, of which the first two are read together; then what was pushed, and behind it the other
# arguments.
_VALUES, _INITIAL, _LAST, _ENTRY, _PARTS, _FRAME = 0, 4, 8, 12, 16, 24
_SUMS, _STAGE, _ENTRIES, _COLUMN = (_FRAME + 36 + 4 * i for i in range(4))


class WordLoops(StagedLoops):
    """Sums in words, outputs of a part side by side for each position; and the stage."""

    stage_bytes = 4

    @classmethod
    def takes(cls, spec: SparseConv2dSpec) -> bool:
        return super().takes(spec) and spec.block % 2 == 0

    @property
    def outputs(self) -> int:
        """Outputs at once: a part of the block."""
        return next(n for n in self._outputs() if self.block % n == 0)

    def _outputs(self) -> tuple[int, ...]:
        """What `outputs` may be, the best first."""
        raise NotImplementedError

    def place(self, channel: Any, column: int) -> Any:
        n = self.outputs
        return channel // n * (n * self.columns) + column * n + channel % n


class MlaLoops(WordLoops):
    """Thumb-2. Three positions by two outputs: nine instructions an entry for six multiply-adds,
    since the stage's words come by one `ldm`; two by four, one by eight."""

    prefix = "sparse_mla"
    call_cost, part_cost, channel_cost, output_cost = 60, 22, 40, 18
    widest = 3

    def _outputs(self) -> tuple[int, ...]:
        return {1: (8, 4, 2), 2: (4, 2), 3: (2,)}[self.columns]

    @property
    def entry_cost(self) -> float:
        n = self.outputs
        part = n + n * self.columns + 2
        return 4 + self.columns + self.block // n * part

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
        """Then `_LAST` is the stage's end, and `_ENTRY` where the products begin."""
        load = "ldrsb" if self.is_signed else "ldrb"
        offset = "ldrh" if self.offset_bytes == 2 else "ldr"
        bases = ["r0", "r3", "r4"][: self.columns]
        data = ["r6", "r7", "r8"][: self.columns]
        out = [f"ldr r12, [sp, #{_ENTRIES}]", f"ldr r2, [sp, #{_STAGE}]"]
        if self.columns > 1:
            out.append(f"ldr r5, [sp, #{_COLUMN}]")
            out += [f"add {b}, {a}, r5" for a, b in pairwise(bases)]
        out += [
            *entry("r12", 1, "4f", "5f", "6f", "r5", "r6"),
            f"str r5, [sp, #{_ENTRY}]",
            "beq.w 2f",
            f"add r12, r1, r12, lsl #{self.offset_bytes // 2}",
            "1:",
            f"{offset} r5, [r1], #{self.offset_bytes}",
            *(f"{load} {x}, [{base}, r5]" for x, base in zip(data, bases, strict=True)),
        ]
        if self.columns == 1:
            out.append("str r6, [r2], #4")
        else:
            out.append(f"stm r2!, {{{', '.join(data)}}}")
        return [*out, "cmp r1, r12", "bne.w 1b", "2:", f"str r2, [sp, #{_LAST}]"]

    def _multiply(self) -> list[str]:
        n = self.outputs
        sums = [f"r{4 + i}" for i in range(n * self.columns)]
        parts = self.block // n
        return [
            f"movs r1, #{parts}",
            f"str r1, [sp, #{_PARTS}]",
            "3:",
            f"ldrd r1, r2, [sp, #{_VALUES}]",
            f"ldm r2!, {{{', '.join(sums[:n])}}}",
            *(f"mov {sums[i]}, {sums[i % n]}" for i in range(n, len(sums))),
            f"add r3, r1, #{n}",
            f"strd r3, r2, [sp, #{_VALUES}]",
            f"ldr r0, [sp, #{_STAGE}]",
            f"ldr lr, [sp, #{_LAST}]",
            f"ldr pc, [sp, #{_ENTRY}]",
            "4:",
            *self._step(sums),
            "5:",
            *self._step(sums),
            "cmp r0, lr",
            "bne.w 4b",
            "6:",
            f"ldr r2, [sp, #{_SUMS}]",
            f"stm r2!, {{{', '.join(sums)}}}",
            f"str r2, [sp, #{_SUMS}]",
            f"ldr r1, [sp, #{_PARTS}]",
            "subs r1, #1",
            f"str r1, [sp, #{_PARTS}]",
            "bne.w 3b",
        ]

    def _step(self, sums: list[str]) -> list[str]:
        """An entry. The first output's weight moves the address on, so it comes last."""
        n = self.outputs
        data = {1: ["r12"], 2: ["r12", "r3"], 3: ["r10", "r11", "r12"]}[self.columns]
        load = {
            1: "ldr r12, [r0], #4",
            2: "ldrd r12, r3, [r0], #8",
            3: "ldm r0!, {r10, r11, r12}",
        }[self.columns]
        out = [load]
        for c in (*range(1, n), 0):
            out.append(f"ldrsb r2, [r1, #{c}]" if c else f"ldrsb r2, [r1], #{self.block}")
            out += [
                f"mla {sums[p * n + c]}, {x}, r2, {sums[p * n + c]}" for p, x in enumerate(data)
            ]
        return out


class MulsLoops(WordLoops):
    """Thumb-1, sums in high registers: two positions by two outputs, one by four. Signed bytes are
    loaded from an address plus a register: registers hold 0, 1, 2 and 3."""

    prefix = "sparse_muls"
    call_cost, part_cost, channel_cost, output_cost = 100, 45, 240, 15
    widest = 2

    def _outputs(self) -> tuple[int, ...]:
        return (4, 2) if self.columns == 1 else (2,)

    @property
    def entry_cost(self) -> float:
        n = self.outputs
        part = 14 if self.columns == 2 else 3 * n + 3
        return 6 + self.columns + self.block // n * part

    def assembly(self) -> str:
        body = [
            "push {r4-r7, lr}",
            *(f"mov r{4 + i}, r{8 + i}" for i in range(4)),
            "push {r4-r7}",
            f"sub sp, #{_FRAME}",
            f"str r2, [sp, #{_VALUES}]",
            f"str r3, [sp, #{_INITIAL}]",
            *self._gather(),
            *self._multiply(),
            f"add sp, #{_FRAME}",
            "pop {r4-r7}",
            *(f"mov r{8 + i}, r{4 + i}" for i in range(4)),
            "pop {r4-r7, pc}",
        ]
        return function(self.name, body)

    def _gather(self) -> list[str]:
        """Then `_LAST` is the stage's end."""
        load = "ldrsb" if self.is_signed else "ldrb"
        offset = "ldrh" if self.offset_bytes == 2 else "ldr"
        two = self.columns == 2
        return [
            f"ldr r7, [sp, #{_ENTRIES}]",
            f"lsls r7, r7, #{self.offset_bytes // 2}",
            "adds r7, r7, r1",
            f"ldr r2, [sp, #{_STAGE}]",
            *([f"ldr r3, [sp, #{_COLUMN}]", "adds r3, r3, r0"] if two else []),
            "cmp r1, r7",
            "beq 2f",
            "1:",
            f"{offset} r4, [r1]",
            f"adds r1, #{self.offset_bytes}",
            f"{load} r5, [r0, r4]",
            *([f"{load} r6, [r3, r4]"] if two else []),
            f"stm r2!, {{{'r5, r6' if two else 'r5'}}}",
            "cmp r1, r7",
            "bne 1b",
            "2:",
            f"str r2, [sp, #{_LAST}]",
        ]

    def _multiply(self) -> list[str]:
        n = self.outputs
        count = n * self.columns
        sums = [f"r{8 + i}" for i in range(count)]
        step = self._step(sums)
        numbers = {"r7": 0, "r6": 1} | ({"r5": 2, "r3": 3} if n == 4 else {})
        out = [f"movs r0, #{self.block // n}", f"str r0, [sp, #{_PARTS}]", "3:"]
        out.append(f"ldr r0, [sp, #{_INITIAL}]")
        for c in range(n):
            out.append(f"ldr r2, [r0, #{4 * c}]")
            out += [f"mov {sums[p * n + c]}, r2" for p in range(self.columns)]
        out += [
            f"adds r0, #{4 * n}",
            f"str r0, [sp, #{_INITIAL}]",
            f"ldr r1, [sp, #{_VALUES}]",
            "movs r2, r1",
            f"adds r2, #{n}",
            f"str r2, [sp, #{_VALUES}]",
            f"ldr r0, [sp, #{_LAST}]",
            "mov r12, r0",
            f"ldr r0, [sp, #{_STAGE}]",
            *(f"movs {register}, #{number}" for register, number in numbers.items()),
            f"ldr r2, [sp, #{_ENTRIES}]",
            "lsrs r2, r2, #1",
            "bcc 4f",
            *step,
            "4:",
            "cmp r0, r12",
            "beq 6f",
            "5:",
            *step,
            *step,
            "cmp r0, r12",
            "bne 5b",
            "6:",
            f"ldr r0, [sp, #{_SUMS}]",
            *(f"mov r{1 + i}, {total}" for i, total in enumerate(sums)),
            f"stm r0!, {{{', '.join(f'r{1 + i}' for i in range(count))}}}",
            f"str r0, [sp, #{_SUMS}]",
            f"ldr r0, [sp, #{_PARTS}]",
            "subs r0, #1",
            f"str r0, [sp, #{_PARTS}]",
            "beq 7f",
            "b 3b",
            "7:",
        ]
        return out

    def _step(self, sums: list[str]) -> list[str]:
        """An entry."""
        if self.columns == 2:
            return [
                "ldm r0!, {r2, r3}",
                "ldrsb r4, [r1, r7]",
                "movs r5, r4",
                "muls r5, r2, r5",
                f"add {sums[0]}, r5",
                "muls r4, r3, r4",
                f"add {sums[2]}, r4",
                "ldrsb r4, [r1, r6]",
                "muls r2, r4, r2",
                f"add {sums[1]}, r2",
                "muls r3, r4, r3",
                f"add {sums[3]}, r3",
                f"adds r1, #{self.block}",
            ]
        out = ["ldm r0!, {r2}"]
        for total, number in zip(sums, ("r7", "r6", "r5", "r3"), strict=False):
            out += [f"ldrsb r4, [r1, {number}]", "muls r4, r2, r4", f"add {total}, r4"]
        return [*out, f"adds r1, #{self.block}"]
