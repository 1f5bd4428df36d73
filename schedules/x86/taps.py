"""Neighbouring columns of a channel in one 32-bit word: several taps of a kernel row at once.

    word j of a row, channel c = columns 2j, 2j + 1[, 2j + 2, 2j + 3] of channel c, lowest first

Four bytes meet four weights in vpdpbusd, two 16-bit numbers two weights in vpmaddwd. An output
that starts at an even column takes its first taps from the word there with the weights (w0, w1,
w2, 0), its right neighbour from the same word with (0, w0, w1, w2): one word serves two outputs,
and is written once for all kernel rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...targets import Target
from ..dot import Dot
from ..emit import Emitter, vector
from ..spec import Conv2dSpec, ceil_div
from .dot import ByteDot, WordDot, has_byte_dot

if TYPE_CHECKING:
    from tvm import ir, tirx

_COLUMNS = 2  # from one word to the next


@dataclass(frozen=True)
class TapWords:
    """How the taps of a depthwise layer are laid out in words; `dot` multiplies and adds."""

    spec: Conv2dSpec
    dot: Dot

    @property
    def taps(self) -> int:
        """Columns in a word."""
        return self.dot.group

    @property
    def bits(self) -> int:
        """Bits of a column."""
        return 32 // self.taps

    @property
    def per_row(self) -> int:
        """Words of weights of one kernel row, for the phase that needs more."""
        return ceil_div(self.spec.kernel[1] + _COLUMNS - 1, self.taps)

    def words(self, columns: int) -> int:
        """Words of a row that hold everything that outputs of `columns` input columns read."""
        last = columns - self.spec.kernel[1]
        return last // _COLUMNS + self.taps // _COLUMNS * (self.per_row - 1) + 1

    def uses(self, output: int) -> list[tuple[int, int, int]]:
        """(word, phase, index among the words of a weight row) of one output column."""
        first = output * self.spec.strides[1]
        phase = first % _COLUMNS
        count = ceil_div(self.spec.kernel[1] + phase, self.taps)
        step = self.taps // _COLUMNS
        return [((first - phase) // _COLUMNS + step * g, phase, g) for g in range(count)]

    @property
    def signed(self) -> bool:
        """Whether data bytes are flipped to unsigned, and 128 * sum(w) is subtracted."""
        return isinstance(self.dot, ByteDot) and self.spec.data_dtype == "int8"

    def weight_words(
        self, e: Emitter, weight: tirx.Buffer, channel: Any
    ) -> dict[tuple[int, int, int], Any]:
        """(kernel row, phase, index) => the weights of `lanes` channels, as words."""
        kh, kw = self.spec.kernel
        found: dict[tuple[int, int, int], Any] = {}
        for ky in range(kh):
            places = [(ky * kw + kx) * self.spec.out_channels + channel for kx in range(kw)]
            columns = [
                e.bind("w", self._wide(vector(weight, place, self.dot.lanes))) for place in places
            ]
            for phase in range(1 if self.spec.strides[1] % 2 == 0 else _COLUMNS):
                for g in range(ceil_div(kw + phase, self.taps)):
                    taps = [self.taps * g + t - phase for t in range(self.taps)]
                    parts = [columns[tap] if 0 <= tap < kw else None for tap in taps]
                    found[ky, phase, g] = e.bind("words", self._word(parts))
        return found

    def data_word(self, data: tirx.Buffer, start: Any, pitch: int, columns: int) -> ir.Expr:
        """The word at a column; only the first `columns` of it exist."""
        from tvm import tirx

        parts: list[Any] = [
            self._wide(vector(data, start + t * pitch, self.dot.lanes)) if t < columns else None
            for t in range(self.taps)
        ]
        word = self._word(parts)
        return tirx.bitwise_xor(word, self.constant(-0x7F7F7F80)) if self.signed else word

    def constant(self, value: int) -> ir.Expr:
        """A word in every lane."""
        from tvm import tirx

        return tirx.Broadcast(tirx.const(value, "int32"), self.dot.lanes)

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        """acc + the products of one word."""
        from tvm import tirx

        lanes = self.dot.lanes
        if isinstance(self.dot, ByteDot):
            data = tirx.reinterpret(f"uint8x{4 * lanes}", data)
            weight = tirx.reinterpret(f"int8x{4 * lanes}", weight)
        else:
            data = tirx.reinterpret(f"int16x{2 * lanes}", data)
            weight = tirx.reinterpret(f"int16x{2 * lanes}", weight)
        return self.dot.accumulate(acc, data, weight)

    def _wide(self, value: ir.Expr) -> ir.Expr:
        return value.astype(f"int32x{self.dot.lanes}")

    def _word(self, parts: list[Any]) -> ir.Expr:
        """Numbers that fit `bits` bits, one above the other."""
        from tvm import tirx

        word: Any = None
        for place, part in enumerate(parts):
            if part is None:
                continue
            if place < self.taps - 1:  # what the sign fills above is cut, or shifted out
                part = tirx.bitwise_and(part, self.constant((1 << self.bits) - 1))
            if place:
                part = part << self.constant(place * self.bits)
            word = part if word is None else tirx.bitwise_or(word, part)
        return self.constant(0) if word is None else word


def tap_words(spec: Conv2dSpec, target: Target, lanes: int) -> TapWords | None:
    """The layout for a layer; None: its taps are multiplied one by one."""
    usable = (
        spec.data_dtype in ("int8", "uint8")
        and spec.weight_dtype == "int8"
        and not spec.weight_zero_point
        and spec.acc_dtype == "int32"
        and (spec.kernel[1] > 3 or (spec.kernel[1] > 1 and spec.strides[1] == 1))  # measured
        and spec.dilation[1] == 1
        and spec.columns == 1
    )
    if not usable:
        return None
    if has_byte_dot(target, lanes):
        return TapWords(spec, ByteDot(lanes, "int8", True))
    if target.has("avx2" if lanes == 8 else "avx512bw") and lanes in (8, 16):
        return TapWords(spec, WordDot(lanes, "int8", False))
    return None
