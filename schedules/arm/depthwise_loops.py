"""The inner loops of the depthwise kernel as assembly: sums of a strip of one or two output rows.

    void NAME(const int16_t *plane, const int32_t *weights, int32_t *sums)

`weights` are words of two and behind them the bias. A strip's sums are written column by column.
For 3x3 at stride 1 a tile of 2x2 outputs takes four `ldrd` of data, 24 products and one `stm`: six
words of weights, four sums, two words of data and two addresses are all fourteen registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from .assembly import add_constant, again, function

_REGISTERS = 14
_SUMS = ("r8", "r9", "r10", "r11")
_WEIGHTS = ("r1", "r3", "r4", "r5", "r6", "r7")
_DATA = ("r12", "lr")
_LDRD_REACH = 1020
_MOST_UNROLLED = 3  # tiles, about 30 instructions each
MOST_WEIGHTS = len(_WEIGHTS)


@dataclass(frozen=True)
class Product:
    """What a word of data adds to the sum of one output row: both halves with both of a word of
    weights, or one half with one."""

    weight: int
    """Which word."""
    halves: tuple[int, int] | None
    """(half of the data, half of the weights); None: both."""


@dataclass(frozen=True)
class DepthwiseLoops:
    """What the loops depend on."""

    products: tuple[tuple[tuple[tuple[Product, ...], ...], ...], ...]
    """By output row of a strip, word row, kernel column."""
    weights: int
    strips: int
    columns: int
    """Output columns."""
    tile: int
    """Of which so many at once."""
    stride: int
    """Columns between two outputs."""
    pitch: int
    """Words of a word row."""
    advance: int
    """Word rows between two strips."""

    @property
    def height(self) -> int:
        """Output rows of a strip."""
        return len(self.products)

    @property
    def is_possible(self) -> bool:
        """Whether all fits the registers and what an offset reaches."""
        reach = 4 * ((len(self.products[0]) - 1) * self.pitch + self._span(self.tile))
        reach += 4 * _MOST_UNROLLED * self.tile * self.stride
        return (
            self.weights <= MOST_WEIGHTS
            and self.height * self.tile <= len(_SUMS)
            and reach <= _LDRD_REACH
        )

    @property
    def name(self) -> str:
        """Unique among the kernels of a program, the same for equal ones."""
        code = "".join(
            f"{p.weight}{'x' if p.halves is None else 'bt'[p.halves[0]] + 'bt'[p.halves[1]]}"
            for row in self.products
            for words in row
            for column in words
            for p in column
        )
        facts = (
            self.height, len(self.products[0]), len(self.products[0][0]), code, self.columns,
            self.tile, self.stride, self.pitch, self.advance, self.strips,
        )  # fmt: skip
        return "tvmc_depthwise_" + "_".join(str(fact) for fact in facts)

    def _span(self, tile: int) -> int:
        """Columns of data that a tile reads."""
        return (tile - 1) * self.stride + len(self.products[0][0])

    @property
    def _has_bias(self) -> bool:
        """Whether a register is left for the bias."""
        return self.weights + self.height * self.tile + 4 < _REGISTERS

    def assembly(self) -> str:
        """The function."""
        full, narrow = divmod(self.columns, self.tile)
        unrolled = full if full <= _MOST_UNROLLED else max(
            n for n in range(1, _MOST_UNROLLED + 1) if full % n == 0
        )  # fmt: skip
        turns = full // unrolled
        step = 4 * self.tile * self.stride * unrolled
        used = _WEIGHTS[: self.weights]
        out = [
            "push {r4-r11, lr}", "sub sp, #12", f"movw r3, #{self.strips}", "str r3, [sp, #0]",
            "mov r12, r1", f"ldr lr, [r12, #{4 * self.weights}]", "str lr, [sp, #4]",
        ]  # fmt: skip
        if self._has_bias:
            out.append(f"mov {self._bias}, lr")
        out.append(f"ldm r12, {{{', '.join(used)}}}" if len(used) > 1 else f"ldr {used[0]}, [r12]")
        out += [f"subw r0, r0, #{step}", "1:"]
        if turns > 1:
            out += [f"movs r12, #{turns}", "str r12, [sp, #8]", "2:"]
        for tile in range(unrolled):
            out += self._tile(self.tile, 4 * self.tile * self.stride * tile, step * (tile == 0))
        if turns > 1:
            out += again(8, "2b", "r12")
        if narrow:
            out += self._tile(narrow, step, 0)
        out += add_constant("r0", "r0", 4 * self.advance * self.pitch - step * turns, "r12")
        out += [*again(0, "1b", "r12"), "add sp, #12", "pop {r4-r11, pc}"]
        return function(self.name, out)

    @property
    def _bias(self) -> str:
        return (*_WEIGHTS[self.weights :], *_SUMS[self.height * self.tile :])[0]

    def _tile(self, width: int, offset: int, moves: int) -> list[str]:
        """One tile, `offset` bytes behind the address; its first load moves that on by `moves`."""
        height = self.height
        sums = {(j, i): _SUMS[i * height + j] for i in range(width) for j in range(height)}
        begun: set[tuple[int, int]] = set()
        out: list[str] = []
        bias = self._bias if self._has_bias else sums[0, 0]
        if not self._has_bias:
            out.append(f"ldr {bias}, [sp, #4]")
        span = self._span(width)
        kernel_columns = len(self.products[0][0])
        is_first = True
        for row in range(len(self.products[0])):
            wanted = [
                c
                for c in range(span)
                if any(
                    0 <= c - i * self.stride < kernel_columns
                    and self.products[j][row][c - i * self.stride]
                    for j, i in sums
                )
            ]
            while wanted:
                column = wanted.pop(0)
                both = bool(wanted) and wanted[0] == column + 1
                if both:
                    wanted.pop(0)
                at = 4 * (row * self.pitch + column) + offset
                where = f"[r0, #{at}]"
                if is_first and moves:
                    assert at == 0
                    where = f"[r0, #{moves}]!"
                if both:
                    out.append(f"ldrd {_DATA[0]}, {_DATA[1]}, {where}")
                else:
                    out.append(f"ldr {_DATA[0]}, {where}")
                lines = [
                    (place, word, product)
                    for word in range(2 if both else 1)
                    for place in sums
                    if 0 <= column + word - place[1] * self.stride < kernel_columns
                    for product in self.products[place[0]][row][
                        column + word - place[1] * self.stride
                    ]
                ]
                if is_first and not self._has_bias:
                    # The first sum holds the bias until all others have begun.
                    lines.sort(key=lambda line: line[0] == (0, 0))
                    late = [p for p in sums if p not in {line[0] for line in lines}]
                    out += [f"mov {sums[place]}, {bias}" for place in late]
                    begun.update(late)
                for place, word, product in lines:
                    holds_bias = place == (0, 0) and not self._has_bias
                    acc = sums[place] if place in begun or holds_bias else bias
                    begun.add(place)
                    name, weight = "smlad", _WEIGHTS[product.weight]
                    if product.halves is not None:
                        name = "smla" + "".join("bt"[half] for half in product.halves)
                    out.append(f"{name} {sums[place]}, {_DATA[word]}, {weight}, {acc}")
                is_first = False
        order = [_SUMS[n] for n in range(width * height)]
        return [*out, f"stm r2!, {{{', '.join(order)}}}" if len(order) > 1 else
                f"str {order[0]}, [r2], #4"]  # fmt: skip
