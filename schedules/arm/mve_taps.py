"""The inner loops of the Helium depthwise kernel as assembly.

Sixteen bytes hold a window of 4 x 4 of one channel: four words, one for each column, whose bytes
are four rows. `vmlav` multiplies them with a kernel's taps in the same places and adds up; a kernel
of 3 x 3 fits into the window at four places, so that one load serves 2 x 2 outputs.

    columns: rows of pixels of 16 channels  =>  [column][channel][4 rows], by `vst4`
    sums:    those and the taps [channel][kernel rows * columns]  =>  [row][column][channel], int32
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 16  # channels
WINDOW = 4  # rows and columns
_COLUMN_BYTES = GROUP * WINDOW
_SUM_BYTES = 4 * GROUP


@dataclass(frozen=True)
class Columns:
    """void NAME(int8_t *columns, const int8_t *rows)"""

    count: int
    rows: int
    """Rows that are read; the others of the window are 0."""
    row_bytes: int

    @property
    def name(self) -> str:
        """Unique among the kernels of a program, the same for equal ones."""
        return f"tvmc_mve_columns_{self.count}_{self.rows}_{self.row_bytes}"

    def assembly(self) -> str:
        """The function."""
        registers = ["r1", "r2", "r3", "r4"]
        out = ["push {r4, lr}"]
        out += [f"vmov.i32 q{row}, #0" for row in range(self.rows, WINDOW)]
        for row in range(1, self.rows):
            out += [f"movw r4, #{self.row_bytes}"] if row == 1 else []
            out += [f"add {registers[row]}, {registers[row - 1]}, r4"]
        out += [f"movw r12, #{self.count}", "dls lr, r12", "1:"]
        out += [f"vldrb.u8 q{row}, [{registers[row]}], #16" for row in range(self.rows)]
        for part in range(4):
            end = "!" if part == 3 else ""
            out.append(f"vst4{part}.8 {{q0, q1, q2, q3}}, [r0]{end}")
        out += ["le lr, 1b", "pop {r4, pc}"]
        return function(self.name, out)


@dataclass(frozen=True)
class Taps:
    """void NAME(const int8_t *columns, const int8_t *weights, int32_t *sums)"""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    outputs: tuple[int, int]
    """Rows and columns of outputs that a window serves."""
    channels: int
    bands: int
    """Windows one below the other, `columns` columns each."""
    columns: int
    windows: int
    """Windows side by side."""

    @property
    def row_bytes(self) -> int:
        """Of a row of sums."""
        return self.windows * self.outputs[1] * _SUM_BYTES

    @property
    def name(self) -> str:
        """Unique among the kernels of a program, the same for equal ones."""
        facts = (
            *self.kernel, *self.strides, *self.outputs, self.channels, self.bands, self.columns,
            self.windows,
        )  # fmt: skip
        return "tvmc_mve_taps_" + "_".join(str(fact) for fact in facts)

    def assembly(self) -> str:
        """The function. q2 and up: the taps in their places; q6: where they lie; q7: where a
        window's columns do; r0, r1, r2: this channel's columns, weights, sums."""
        (kh, kw), (down, along), (rows, columns) = self.kernel, self.strides, self.outputs
        step = columns * along * _COLUMN_BYTES
        out = ["push {r4-r11, lr}", "vpush {d8-d15}"]
        out += ["adr r4, 9f", "vldrb.u8 q6, [r4]", "vldrw.u32 q7, [r4, #16]"]
        mask = sum(1 << (WINDOW * x + y) for x in range(kw) for y in range(kh))
        out += [f"movw r4, #{mask}", "vmsr p0, r4", f"movs r11, #{self.channels}", "1:"]
        out += ["vpst", "vldrbt.u8 q2, [r1, q6]", f"adds r1, #{kh * kw}"]
        if columns == 2:
            out += ["vmov q4, q2"]
            for _ in range(along):
                out += ["mov.w r12, #0", "vshlc q4, r12, #32"]
        if rows == 2:
            out += [f"vshl.i32 q3, q2, #{8 * down}"]
            out += [f"vshl.i32 q5, q4, #{8 * down}"] if columns == 2 else []
        many = self.bands > 1
        out += ["mov r9, r0", "mov r3, r2"]
        out += [f"movs r10, #{self.bands}", "2:"] if many else []
        out += ["vadd.i32 q1, q7, r9", f"movw r12, #{self.windows}", "dls lr, r12", "3:"]
        out += [f"vldrw.u32 q0, [q1, #{step}]!"]
        places = [(x, y, f"q{2 + 2 * x + y}") for x in range(columns) for y in range(rows)]
        totals = ["r4", "r6", "r8", "r12"]
        for (_, _, taps), total in zip(places, totals, strict=False):
            out.append(f"vmlav.s8 {total}, q0, {taps}")
        for (x, y, _), total in list(zip(places, totals, strict=False))[:0:-1]:
            out.append(f"str {total}, [r3, #{y * self.row_bytes + x * _SUM_BYTES}]")
        out += [f"str r4, [r3], #{columns * _SUM_BYTES}", "le lr, 3b"]
        if many:
            rest = (rows - 1) * self.row_bytes
            out += [f"addw r3, r3, #{rest}"] if rest else []
            out += [f"addw r9, r9, #{self.columns * _COLUMN_BYTES}"]
            out += ["subs r10, #1", "bne.w 2b"]
        out += ["adds r0, #4", "adds r2, #4", "subs r11, #1", "bne.w 1b"]
        out += ["vpop {d8-d15}", "pop {r4-r11, pc}", ".balign 4", "9:"]
        taps = [y * kw + x if x < kw and y < kh else 0 for x in range(WINDOW) for y in range(WINDOW)]
        out += [f".byte {', '.join(map(str, taps))}"]
        # Loads go forward before they read.
        out += [f".word {', '.join(str(x * _COLUMN_BYTES - step) for x in range(WINDOW))}"]
        return function(self.name, out)


def function(name: str, body: list[str]) -> str:
    """A function in a section of its own."""
    head = [
        ".syntax unified",
        ".thumb",
        f'.section .text.{name},"ax",%progbits',
        ".balign 4",
        ".thumb_func",
        f".type {name}, %function",
        f"{name}:",
    ]
    return "\n".join([*head, *body, f".size {name}, . - {name}"])
