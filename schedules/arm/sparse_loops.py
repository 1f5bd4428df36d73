"""The loops of sparse layers with `smlad` (`sparse_staged.py`).

A group is four entries: values [group][output][4], and of each position two words, (x0, x2) and
(x1, x3), since `sxtb16` opens a word of weights [w0, w1, w2, w3] into (w0, w2) and (w1, w3). Three
positions by two outputs take 20 instructions a group for 24 multiply-adds, one position by four
outputs 19 for 16; gathering 27 for three positions and all outputs of the block.
"""

from __future__ import annotations

from .sparse_thumb import Thumb2Loops


class SmladLoops(Thumb2Loops):
    """Of up to three positions; blocks of an even number of outputs."""

    prefix = "sparse_smlad"
    call_cost, part_cost, output_cost = 38, 25, 9.5
    group = 4
    stage_bytes = 2

    def _outputs(self) -> tuple[int, ...]:
        return (4, 2) if self.columns == 1 else (2,)

    @property
    def entry_cost(self) -> float:
        group = 19 if self.outputs == 4 else 5 + 5 * self.columns
        return (6 + 7 * self.columns + self.block // self.outputs * (group + 1)) / self.group

    def _gather_group(self, bases: list[str]) -> list[str]:
        load, size = self._load, self.offset_bytes
        out = [f"{self._load_offset} r{5 + i}, [r1], #{size}" for i in range(4)]
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
        return out

    @property
    def _limit(self) -> str:
        if self.outputs == 4:
            return "r3"
        return "r8" if self.columns < 3 else ""

    def _step(self, sums: list[str]) -> list[str]:
        return self._four(sums) if self.outputs == 4 else self._two(sums)

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
