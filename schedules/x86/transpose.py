"""Square blocks of 32-bit numbers turned over in registers, in LLVM's words: rows become columns.

Numbers change places inside lanes of 16 bytes first, then lanes do: every shuffle is one
instruction of AVX2 or AVX-512.
"""

from __future__ import annotations

from collections.abc import Sequence


def transpose(name: str, count: int) -> str:
    """A function `name`(in, n, out, m): `count` rows of as many elements, `n` elements apart, to
    rows `m` elements apart."""
    kind = f"<{count} x i32>"
    arguments = "ptr %in, i64 %n, ptr %out, i64 %m"
    lines = [f"define internal void @{name}({arguments}) alwaysinline nounwind {{"]
    for row in range(count):
        lines += [
            f"  %i{row} = mul i64 %n, {row}",
            f"  %p{row} = getelementptr i32, ptr %in, i64 %i{row}",
            f"  %x{row} = load {kind}, ptr %p{row}, align 4",
        ]
    block = _Block(kind, count, lines)
    rows = [f"%x{row}" for row in range(count)]
    columns = _columns(block, rows)
    for row, value in enumerate(columns):
        lines += [
            f"  %j{row} = mul i64 %m, {row}",
            f"  %q{row} = getelementptr i32, ptr %out, i64 %j{row}",
            f"  store {kind} {value}, ptr %q{row}, align 4",
        ]
    return "\n".join([*lines, "  ret void", "}\n"])


class _Block:
    """Vectors of one kind being shuffled."""

    def __init__(self, kind: str, count: int, lines: list[str]) -> None:
        self.kind, self.count, self.lines = kind, count, lines
        self._made = 0

    def shuffle(self, first: str, second: str, picks: Sequence[int]) -> str:
        """The elements `picks` of the two one behind the other."""
        self._made += 1
        mask = f"<{self.count} x i32> <" + ", ".join(f"i32 {pick}" for pick in picks) + ">"
        name = f"%s{self._made}"
        self.lines.append(
            f"  {name} = shufflevector {self.kind} {first}, {self.kind} {second}, {mask}"
        )
        return name


def _columns(block: _Block, rows: list[str]) -> list[str]:
    count, lanes = block.count, block.count // 4

    def in_lanes(first: str, second: str, elements: Sequence[int]) -> str:
        """Of each lane: elements 0-3 of the first, 4-7 of the second."""
        picks = [
            lane * 4 + element % 4 + element // 4 * count
            for lane in range(lanes)
            for element in elements
        ]
        return block.shuffle(first, second, picks)

    def of_lanes(first: str, second: str, which: Sequence[int]) -> str:
        """These lanes of the first, then those of the second."""
        picks = [
            source * count + lane * 4 + element
            for source in (0, 1)
            for lane in which
            for element in range(4)
        ]
        return block.shuffle(first, second, picks)

    low, high = (0, 4, 1, 5), (2, 6, 3, 7)
    first, last = (0, 1, 4, 5), (2, 3, 6, 7)
    # quads[i][g]: in lane l rows 4g .. 4g + 3 of column 4l + i
    quads: list[list[str]] = [[], [], [], []]
    for group in range(lanes):
        a, b, c, d = rows[4 * group : 4 * group + 4]
        for pair, half in enumerate((low, high)):
            top, bottom = in_lanes(a, b, half), in_lanes(c, d, half)
            quads[2 * pair].append(in_lanes(top, bottom, first))
            quads[2 * pair + 1].append(in_lanes(top, bottom, last))
    columns = [""] * count
    for i, parts in enumerate(quads):
        if lanes == 1:
            columns[i] = parts[0]
        elif lanes == 2:
            for lane in range(2):
                columns[4 * lane + i] = of_lanes(parts[0], parts[1], (lane,))
        else:
            for odd in (0, 1):
                picks = (odd, odd + 2)
                top = of_lanes(parts[0], parts[1], picks)
                bottom = of_lanes(parts[2], parts[3], picks)
                columns[4 * odd + i] = of_lanes(top, bottom, (0, 2))
                columns[4 * (odd + 2) + i] = of_lanes(top, bottom, (1, 3))
    return columns
