"""The inner loops of the Helium depthwise kernel as assembly.

Sixteen bytes hold a window of 4 x 4 of one channel: four words, one for each column, whose bytes
are four rows. `vmlav` multiplies them with a kernel's taps in the same places and adds up; a kernel
of 3 x 3 fits into the window at four places, so that one load serves 2 x 2 outputs.

    columns: rows of pixels of 16 channels  =>  [column][channel][4 rows], by `vst4`
    sums:    those and the taps [channel][kernel rows * columns]  =>  [row][column][channel], int32
"""

from __future__ import annotations

from dataclasses import dataclass

from .assembly import constant, function

GROUP = 16  # channels
WINDOW = 4  # rows and columns
_COLUMN_BYTES = GROUP * WINDOW
NEAR = 127  # bytes that a load reaches from its address


@dataclass(frozen=True)
class Columns:
    """void NAME(int8_t *columns, const int8_t *image, int32_t offset, int32_t row, int32_t count)

    `count` columns from `image + offset` on; its first row is number `row`. Rows outside the image
    are `pad_value`."""

    rows: int
    """Rows that are read; the others of the window are 0."""
    in_rows: int
    row_bytes: int
    pixel_bytes: int
    width: int
    """Channels that are read."""
    pad_value: int

    @property
    def name(self) -> str:
        """Unique among the kernels of a program, the same for equal ones."""
        facts = (
            self.rows, self.in_rows, self.row_bytes, self.pixel_bytes, self.width,
            self.pad_value & 0xFF,
        )  # fmt: skip
        return "tvmc_mve_columns_" + "_".join(str(fact) for fact in facts)

    def assembly(self) -> str:
        """The function. r4..r7 are the rows' addresses, r8..r11 what they move on by: nothing for
        those outside, which read a constant."""
        rows, step = range(self.rows), self.pixel_bytes
        out = ["push {r4-r11, lr}", "ldr r12, [sp, #36]", "add r4, r1, r2"]
        out += constant("lr", self.row_bytes)
        out += [f"add r{4 + row}, r{3 + row}, lr" for row in rows[1:]]
        out += [f"vmov.i32 q{row}, #0" for row in range(self.rows, WINDOW)]
        if self.width < GROUP:
            out += [f"movs r1, #{self.width}", "vctp.8 r1"]
        if step <= NEAR and self.rows <= self.in_rows:
            # All rows are inside: no negative number is that small without its sign.
            out += [*constant("lr", self.in_rows - self.rows), "cmp r3, lr", "bhi.w 2f"]
            out += ["dls lr, r12", "1:", *self.loads(f", #{step}")]
            out += [*self.stores(), "le lr, 1b", "pop {r4-r11, pc}", "2:"]
        out += ["adr r2, 9f", *constant("lr", self.in_rows)]
        for row in rows:
            out += constant(f"r{8 + row}", step)
            out += [f"add r1, r3, #{row}", "cmp r1, lr", "itt hs"]
            out += [f"movhs r{4 + row}, r2", f"movhs r{8 + row}, #0"]
        out += ["dls lr, r12", "3:", *self.loads("")]
        out += [f"add r{4 + row}, r{8 + row}" for row in rows]
        out += [*self.stores(), "le lr, 3b", "pop {r4-r11, pc}", ".balign 4", "9:"]
        out += [f".fill {GROUP}, 1, {self.pad_value & 0xFF}"]
        return function(self.name, out)

    def loads(self, step: str) -> list[str]:
        """Sixteen channels, or `width`, of each row."""
        is_part = self.width < GROUP
        load = "vldrbt.u8" if is_part else "vldrb.u8"
        loads = [f"{load} q{row}, [r{4 + row}]{step}" for row in range(self.rows)]
        return [f"vps{'t' * self.rows}", *loads] if is_part else loads

    def stores(self) -> list[str]:
        """The four registers with their bytes in turn."""
        ends = ("", "", "", "!")
        return [f"vst4{part}.8 {{q0, q1, q2, q3}}, [r0]{end}" for part, end in enumerate(ends)]


@dataclass(frozen=True)
class Taps:
    """void NAME(const int8_t *columns, const int8_t *weights, int32_t *sums)

    sums: [channel][band][window][place], places as in `places`."""

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
    def name(self) -> str:
        """Unique among the kernels of a program, the same for equal ones."""
        facts = (
            *self.kernel, *self.strides, *self.outputs, self.channels, self.bands, self.columns,
            self.windows,
        )  # fmt: skip
        return "tvmc_mve_taps_" + "_".join(str(fact) for fact in facts)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(column, row) of the outputs that a window serves, in the order of their sums."""
        rows, columns = self.outputs
        return [(x, y) for x in range(columns) for y in range(rows)]

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
        out.append("mov r9, r0")
        out += [f"movs r10, #{self.bands}", "2:"] if many else []
        out += ["vadd.i32 q1, q7, r9", *constant("r12", self.windows), "dls lr, r12", "3:"]
        out.append(f"vldrw.u32 q0, [q1, #{step}]!")
        totals = ["r4", "r6", "r8", "r12"][: rows * columns]
        for (x, y), total in zip(self.places, totals, strict=True):
            out.append(f"vmlav.s8 {total}, q0, q{2 + 2 * x + y}")
        if len(totals) == 1:
            out.append("str r4, [r2], #4")
        else:
            out.append(f"stm r2!, {{{', '.join(totals)}}}")
        out.append("le lr, 3b")
        if many:
            out += [*constant("r12", self.columns * _COLUMN_BYTES), "add r9, r12"]
            out += ["subs r10, #1", "bne.w 2b"]
        out += ["adds r0, #4", "subs r11, #1", "bne.w 1b"]
        out += ["vpop {d8-d15}", "pop {r4-r11, pc}", ".balign 4", "9:"]
        taps = [
            y * kw + x if x < kw and y < kh else 0 for x in range(WINDOW) for y in range(WINDOW)
        ]
        out += [f".byte {', '.join(map(str, taps))}"]
        # Loads go forward before they read.
        out += [f".word {', '.join(str(x * _COLUMN_BYTES - step) for x in range(WINDOW))}"]
        return function(self.name, out)
