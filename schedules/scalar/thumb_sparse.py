"""The loops of sparse layers for Cortex-M without DSP instructions (`../arm/sparse_staged.py`)."""

from __future__ import annotations

from ..arm.assembly import function
from ..arm.sparse_thumb import (
    COLUMN,
    ENTRIES,
    FRAME,
    INITIAL,
    LAST,
    PARTS,
    STAGE,
    SUMS,
    VALUES,
    Thumb2Loops,
    ThumbLoops,
)


class MlaLoops(Thumb2Loops):
    """Thumb-2. Three positions by two outputs: nine instructions an entry for six multiply-adds,
    since the stage's words come by one `ldm`; two by four, one by eight."""

    prefix = "sparse_mla"
    call_cost, part_cost, channel_cost, output_cost = 60, 22, 40, 18
    stage_bytes = 4

    def _outputs(self) -> tuple[int, ...]:
        return {1: (8, 4, 2), 2: (4, 2), 3: (2,)}[self.columns]

    @property
    def entry_cost(self) -> float:
        n = self.outputs
        part = n + n * self.columns + 2
        return 4 + self.columns + self.block // n * part

    def _gather_group(self, bases: list[str]) -> list[str]:
        data = ["r6", "r7", "r8"][: self.columns]
        return [
            f"{self._load_offset} r5, [r1], #{self.offset_bytes}",
            *(f"{self._load} {x}, [{base}, r5]" for x, base in zip(data, bases, strict=True)),
            f"stm r2!, {{{', '.join(data)}}}" if len(data) > 1 else "str r6, [r2], #4",
        ]

    @property
    def _limit(self) -> str:
        return "lr"

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


class MulsLoops(ThumbLoops):
    """Thumb-1, sums in high registers: two positions by two outputs, one by four. Signed bytes are
    loaded from an address plus a register: registers hold 0, 1, 2 and 3."""

    prefix = "sparse_muls"
    call_cost, part_cost, channel_cost, output_cost = 100, 45, 240, 15
    stage_bytes = 4
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
            f"sub sp, #{FRAME}",
            f"str r2, [sp, #{VALUES}]",
            f"str r3, [sp, #{INITIAL}]",
            *self._gather(),
            *self._multiply(),
            f"add sp, #{FRAME}",
            "pop {r4-r7}",
            *(f"mov r{8 + i}, r{4 + i}" for i in range(4)),
            "pop {r4-r7, pc}",
        ]
        return function(self.name, body)

    def _gather(self) -> list[str]:
        """Then `LAST` is the stage's end."""
        load = self._load
        two = self.columns == 2
        return [
            f"ldr r7, [sp, #{ENTRIES}]",
            f"lsls r7, r7, #{self.offset_bytes // 2}",
            "adds r7, r7, r1",
            f"ldr r2, [sp, #{STAGE}]",
            *([f"ldr r3, [sp, #{COLUMN}]", "adds r3, r3, r0"] if two else []),
            "cmp r1, r7",
            "beq 2f",
            "1:",
            f"{self._load_offset} r4, [r1]",
            f"adds r1, #{self.offset_bytes}",
            f"{load} r5, [r0, r4]",
            *([f"{load} r6, [r3, r4]"] if two else []),
            f"stm r2!, {{{'r5, r6' if two else 'r5'}}}",
            "cmp r1, r7",
            "bne 1b",
            "2:",
            f"str r2, [sp, #{LAST}]",
        ]

    def _multiply(self) -> list[str]:
        n = self.outputs
        count = n * self.columns
        sums = [f"r{8 + i}" for i in range(count)]
        step = self._step(sums)
        numbers = {"r7": 0, "r6": 1} | ({"r5": 2, "r3": 3} if n == 4 else {})
        out = [f"movs r0, #{self.block // n}", f"str r0, [sp, #{PARTS}]", "3:"]
        out.append(f"ldr r0, [sp, #{INITIAL}]")
        for c in range(n):
            out.append(f"ldr r2, [r0, #{4 * c}]")
            out += [f"mov {sums[p * n + c]}, r2" for p in range(self.columns)]
        out += [
            f"adds r0, #{4 * n}",
            f"str r0, [sp, #{INITIAL}]",
            f"ldr r1, [sp, #{VALUES}]",
            "movs r2, r1",
            f"adds r2, #{n}",
            f"str r2, [sp, #{VALUES}]",
            f"ldr r0, [sp, #{LAST}]",
            "mov r12, r0",
            f"ldr r0, [sp, #{STAGE}]",
            *(f"movs {register}, #{number}" for register, number in numbers.items()),
            f"ldr r2, [sp, #{ENTRIES}]",
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
            f"ldr r0, [sp, #{SUMS}]",
            *(f"mov r{1 + i}, {total}" for i, total in enumerate(sums)),
            f"stm r0!, {{{', '.join(f'r{1 + i}' for i in range(count))}}}",
            f"str r0, [sp, #{SUMS}]",
            f"ldr r0, [sp, #{PARTS}]",
            "subs r0, #1",
            f"str r0, [sp, #{PARTS}]",
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
