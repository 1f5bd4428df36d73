"""The loops of sparse layers with Helium (`sparse_staged.py`).

A group is sixteen entries: values [group][output][16], and of each position sixteen bytes, gathered
by their 16-bit offsets, eight a load. Two positions by four outputs take 15 instructions a group
for 128 multiply-adds, one position by eight 18; gathering 11 for two positions and all outputs of
the block. Sums start from zero. A load that gathers is one instruction and eight
accesses, so that a real core gains less than instructions say.
"""

from __future__ import annotations

from ..spec import Conv2dSpec, MatmulSpec, SparseConv2dSpec
from .assembly import arguments, entry, function
from .mve_microkernel import VECTOR_BYTES
from .sparse_staged import StagedLoops

_REGISTERS = ("r0", "r2", "r4", "r6", "r8", "r10", "r12", "lr")
# The frame: eight zeros that sums start from, then numbers, of which the first two are read
# together.
_DATA, _OFFSETS, _VALUES, _PART, _ENTRY, _FRAME = 32, 36, 40, 44, 48, 56
_SUMS, _STAGE, _ENTRIES, _COLUMN, _TILES = arguments(_FRAME, 5)


class VmlavaLoops(StagedLoops):
    """Of one or two positions; blocks of four, eight or sixteen outputs."""

    prefix = "sparse_vmlava"
    call_cost, part_cost, output_cost, copy_cost = 60, 29, 1.4, 0.4
    group = VECTOR_BYTES
    widest = 2
    narrowest = 4
    several = True

    @classmethod
    def takes(cls, spec: SparseConv2dSpec) -> bool:
        return super().takes(spec) and spec.offsets_dtype == "uint16"

    @classmethod
    def takes_dtypes(cls, spec: SparseConv2dSpec | Conv2dSpec | MatmulSpec) -> bool:
        return super().takes_dtypes(spec) and spec.data_dtype == "int8"

    def _outputs(self) -> tuple[int, ...]:
        return (8, 4) if self.columns == 1 else (4,)

    @property
    def entry_cost(self) -> float:
        step = self.columns + self.outputs * (1 + self.columns) + 2
        gather = 3 + 4 * self.columns
        return (gather + self.block // self.outputs * step) / self.group

    def assembly(self) -> str:
        body = [
            "push {r4-r11, lr}",
            f"sub sp, #{_FRAME}",
            "vmov.i32 q0, #0",
            "vstrw.32 q0, [sp]",
            "vstrw.32 q0, [sp, #16]",
            f"strd r0, r1, [sp, #{_DATA}]",
            f"str r2, [sp, #{_VALUES}]",
            f"ldr r12, [sp, #{_ENTRIES}]",
            *entry("r12", self.group, "4f", "5f", "6f", "r5", "r6"),
            f"str r5, [sp, #{_ENTRY}]",
            f"ldr r9, [sp, #{_SUMS}]",
            f"ldr r7, [sp, #{_TILES}]",
            "7:",
            *self._gather(),
            *self._multiply(),
            "subs r7, #1",
            "bne.w 7b",
            f"add sp, #{_FRAME}",
            "pop {r4-r11, pc}",
        ]
        return function(self.name, body)

    def _gather(self) -> list[str]:
        """A tile; then r11 is the stage's end."""
        bases = ["r0", "r3"][: self.columns]
        out = [
            f"ldrd r0, r1, [sp, #{_DATA}]",
            f"ldr r5, [sp, #{_COLUMN}]",
            "add r3, r0, r5",
            "add r6, r3, r5" if self.columns == 2 else "mov r6, r3",
            f"str r6, [sp, #{_DATA}]",
            f"ldr r4, [sp, #{_STAGE}]",
            f"ldr lr, [sp, #{_ENTRIES}]",
            "lsr lr, lr, #4",
            "wls lr, lr, 2f",
            "1:",
            "vldrh.u16 q0, [r1], #16",
            "vldrh.u16 q1, [r1], #16",
        ]
        for base in bases:
            out += [
                f"vldrb.u16 q2, [{base}, q0]",
                f"vldrb.u16 q3, [{base}, q1]",
                "vstrb.16 q2, [r4], #8",
                "vstrb.16 q3, [r4], #8",
            ]
        return [*out, "le lr, 1b", "2:", "mov r11, r4"]

    def _multiply(self) -> list[str]:
        """All outputs of the block, a few at a time. r5: parts left, r9: sums."""
        n = self.outputs
        sums = ", ".join(_REGISTERS[: n * self.columns])
        parts = self.block // n
        step = self._step()
        out = [f"ldr r1, [sp, #{_VALUES}]"]
        if parts > 1:
            out += [f"movs r5, #{parts}", "3:", f"str r1, [sp, #{_PART}]"]
        out += [
            f"ldr r3, [sp, #{_STAGE}]",
            f"ldm sp, {{{sums}}}",
            f"ldr pc, [sp, #{_ENTRY}]",
            "4:",
            *step,
            "5:",
            *step,
            "cmp r3, r11",
            "bne.w 4b",
            "6:",
            f"stm r9!, {{{sums}}}",
        ]
        if parts > 1:
            out += [
                f"ldr r1, [sp, #{_PART}]",
                f"add r1, #{n * VECTOR_BYTES}",
                "subs r5, #1",
                "bne.w 3b",
            ]
        return out

    def _step(self) -> list[str]:
        """A group."""
        n, size = self.outputs, VECTOR_BYTES
        out = []
        if self.columns == 2:
            out.append(f"vldrb.u8 q1, [r3, #{size}]")
        out.append(f"vldrb.u8 q0, [r3], #{size * self.columns}")
        for c in range(n):
            weight = f"q{2 + c % 2}"
            out.append(f"vldrb.u8 {weight}, [r1, #{size * c}]")
            for p in range(self.columns):
                out.append(f"vmlava.s8 {_REGISTERS[p * n + c]}, {weight}, q{p}")
        return [*out, f"add r1, #{self.block * size}"]
