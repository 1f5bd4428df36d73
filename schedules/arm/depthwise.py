"""Depthwise convolution with `smlad`: channel by channel, its plane widened and bordered first.

In NHWC the taps of a channel lie apart; in its own plane of 16-bit integers two neighbouring taps
are a word. The weights of a channel stay in registers as pairs, its constants of requantisation are
loaded once, and two neighbouring outputs share the words of a row: out 0 takes (x0, x1) with
(w0, w1) and x2 with w2, out 1 takes x1 with w0 and (x2, x3) with (w1, w2).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..choice import Choice, SearchSpace
from ..emit import Emitter
from ..fused import FusedFunction, Stage
from ..operands import Operands, find_operands
from ..spec import Conv2dSpec, ceil_div
from ..window import window_of
from .dsp import join_low, multiply_add, multiply_add_halves, word
from .epilogue import DspEpilogue
from .rounding import finisher, llvm_helpers

_PLANE_BYTES = 4096
"""A larger plane goes in bands of rows."""
_MOST_TAPS = 49
_OUTPUTS = (1, 2, 4)


def takes(spec: Conv2dSpec) -> bool:
    """Whether the kernel has a form for the layer's numbers."""
    return (
        spec.is_depthwise
        and spec.data_dtype in ("int8", "uint8")
        and spec.weight_dtype == "int8"
        and not spec.weight_zero_point
        and not spec.group_size
        and spec.acc_dtype == "int32"
        and spec.weight_layout == spec.plain_layout
        and spec.dilation[1] == 1
        and spec.reduction_size <= _MOST_TAPS
    )


def depthwise_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> _DepthwiseKernel | None:
    """The depthwise convolution with what follows it; None: no form for it."""
    anchor = fused.anchor
    if anchor is None or not isinstance(anchor.spec, Conv2dSpec) or not takes(anchor.spec):
        return None
    operands = find_operands(fused, anchor, anchor.spec)
    if operands is None:
        return None
    epilogue = DspEpilogue(fused, anchor, target)
    if any(not stage.is_map for stage in epilogue.rest):
        return None
    return _DepthwiseKernel(fused, anchor, anchor.spec, operands, target, epilogue, choice)


class _DepthwiseKernel:
    """One function being written."""

    def __init__(
        self,
        fused: FusedFunction,
        anchor: Stage,
        spec: Conv2dSpec,
        operands: Operands,
        target: Target,
        epilogue: DspEpilogue,
        choice: Choice | None,
    ) -> None:
        self.fused, self.anchor, self.spec, self.operands = fused, anchor, spec, operands
        self.target, self.epilogue = target, epilogue
        self.window = window_of(spec)
        # Words are read where columns are even: a row has an even number, and one word to spare.
        self.pitch = ceil_div(self.window.padded_columns, 2) * 2 + 2
        self.rows = self.window.rows
        while self.rows > 1 and self._plane(self.rows) * 2 > _PLANE_BYTES:
            self.rows = ceil_div(self.rows, 2)
        self.outputs = 1 if spec.strides[1] % 2 == 0 else 2
        if choice is not None:
            self.outputs = choice["outputs"]
        self.outputs = min(self.outputs, self.window.columns)
        self.e = Emitter(finisher(target))

    def _plane(self, rows: int) -> int:
        return self.window.input_rows(rows) * self.pitch

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        odd = self.spec.strides[1] % 2
        outputs = [n for n in _OUTPUTS if n <= self.window.columns and (n > 1 or not odd)]
        return SearchSpace(
            "arm.depthwise",
            {"outputs": tuple(sorted({*outputs, self.outputs}))},
            {"outputs": self.outputs},
            lambda choice: True,
        )

    def build(self) -> tirx.PrimFunc:
        e, window, spec = self.e, self.window, self.spec
        self.weight = e.flat(self.operands.weight)
        self.data = None
        if self.operands.data not in self.fused.producers:
            self.data = e.flat(self.operands.data)
        self.epilogue.declare(e)
        self.plane = e.alloc(self._plane(self.rows), "int16", "plane")
        bands = ceil_div(window.rows, self.rows)
        with e.loop("b", window.batch) as b, e.loop("c", spec.in_channels) as c:
            with e.loop("band", bands) as band:
                first = band * self.rows
                if window.rows % self.rows:
                    first = tirx.min(first, window.rows - self.rows)
                y = e.bind("y", first)
                self._fill(b, y, c)
                with e.loop("m", spec.columns) as m:
                    self._channel(b, y, e.bind("o", c * spec.columns + m))
        self.epilogue.emit_rest(e, 1)
        return e.function(list(self.fused.func.params), {}, llvm_helpers())

    def _fill(self, b: Any, y: Any, c: Any) -> None:
        """The input rows of one channel for output rows y.., with their border."""
        e, window = self.e, self.window
        top, left, bottom, _ = window.padding
        border = tirx.const(self.spec.pad_value, "int16")

        def fill(start: Any, count: int) -> None:
            with e.loop("i", count) as i:
                e.store(self.plane, border, start + i)

        with e.loop("row", window.input_rows(self.rows)) as row:
            iy = e.bind("iy", y * window.strides[0] + row - top)
            start = e.bind("start", row * self.pitch)

            def copy(iy: Any = iy, start: Any = start) -> None:
                fill(start, left)
                e.unrolled(
                    "x", window.in_columns, 4,
                    lambda x: e.store(
                        self.plane, self._input(b, iy, x, c), start + left + x
                    ),
                )  # fmt: skip
                inside = left + window.in_columns
                fill(start + inside, self.pitch - inside)

            if top or bottom:
                e.branch(
                    tirx.all(iy >= 0, iy < window.in_rows),
                    copy,
                    partial(fill, start, self.pitch),
                )
            else:
                copy()

    def _input(self, b: Any, iy: Any, ix: Any, c: Any) -> ir.Expr:
        window = self.window
        if self.data is not None:
            place = ((b * window.in_rows + iy) * window.in_columns + ix) * self.spec.in_channels + c
            return self.data[place].astype("int16")
        value = self.fused.inline(self.operands.data, (b, iy, ix, c), lambda _b, _i: None)
        return value.astype("int16")

    def _channel(self, b: Any, y: Any, o: Any) -> None:
        """All outputs of a band for one output channel."""
        e, window = self.e, self.window
        zero = tirx.const(0, "int32")
        self.epilogue.start_channel(e, window.indices(zero, zero, zero, o))
        initial = e.bind("initial", self.epilogue.initial(window.indices(zero, zero, zero, o)))
        weights = self._weights(o)
        full, rest = divmod(window.columns, self.outputs)
        with e.loop("row", self.rows) as row:
            base = e.bind("base", row * (window.strides[0] * self.pitch))
            with e.loop("tile", full) as tile:
                self._tile(b, y + row, tile * self.outputs, base, o, weights, initial, self.outputs)
            if rest:
                x = tirx.const(full * self.outputs, "int32")
                self._tile(b, y + row, x, base, o, weights, initial, rest)

    def _weights(self, o: Any) -> list[dict[int, Any]]:
        """For every kernel row the words (w[k], w[k + 1]) by k, from -1: what is outside is 0."""
        e, (kh, kw) = self.e, self.spec.kernel
        found: list[dict[int, Any]] = []
        for ky in range(kh):
            taps = [
                e.bind(
                    "w", self.weight[(ky * kw + kx) * self.spec.out_channels + o].astype("int32")
                )
                for kx in range(kw)
            ]
            pairs = {}
            for k in self._pairs():
                high = taps[k + 1] if k + 1 < kw else tirx.const(0, "int32")
                pairs[k] = e.bind("pair", join_low(taps[k], high))
            found.append(pairs)
        return found

    def _pairs(self) -> list[int]:
        """Which taps begin a word: the even ones, and the odd ones where an output may lie at an
        odd column. Every tap is in one of them."""
        kw = self.spec.kernel[1]
        if self.spec.strides[1] % 2 == 0 or kw == 1:
            return list(range(0, kw, 2))
        return sorted({0, *range(0, kw - 1, 2), *range(1, kw - 1, 2)})

    def _tile(
        self,
        b: Any,
        y: Any,
        x: Any,
        base: Any,
        o: Any,
        weights: list[dict[int, Any]],
        initial: Any,
        count: int,
    ) -> None:
        """`count` neighbouring outputs, the first at an even column."""
        e, window, spec = self.e, self.window, self.spec
        sums: list[Any] = [initial] * count
        first = e.bind("first", base + x * spec.strides[1])
        for ky, pairs in enumerate(weights):
            start = first + ky * (window.dilation[0] * self.pitch)
            words: dict[int, Any] = {}
            for c in range(count):
                for index, taps in self._uses(c * spec.strides[1]):
                    if index not in words:
                        words[index] = e.bind("x", word(self.plane, start + 2 * index, 2))
                    sums[c] = e.bind("sum", _product(sums[c], words[index], taps, pairs))
        for c, total in enumerate(sums):
            registers = e.alloc(1, "int32", "sums", registers=True)
            e.store(registers, total, 0)
            self.epilogue.sums = registers
            self.epilogue.emit(
                e,
                partial(window.indices, b, y, x + c),
                (b * window.rows + y) * window.columns + x + c,
                o,
                1,
                partial(_element, registers),
            )

    def _uses(self, column: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """Words of a row that the output at `column` reads, with (half, tap) of each."""
        uses: dict[int, list[tuple[int, int]]] = {}
        for kx in range(self.spec.kernel[1]):
            index, half = divmod(column + kx, 2)
            uses.setdefault(index, []).append((half, kx))
        return sorted(uses.items())


def _product(acc: Any, data: Any, taps: list[tuple[int, int]], pairs: dict[int, Any]) -> ir.Expr:
    """acc + the products of one word's taps."""
    (half, k) = taps[0]
    if len(taps) == 2 and k in pairs:
        return multiply_add(acc, data, pairs[k])
    for half, k in taps:
        weight, which = (pairs[k], 0) if k in pairs else (pairs[k - 1], 1)
        acc = multiply_add_halves(acc, data, half, weight, which)
    return acc


def _element(buffer: tirx.Buffer, _lane: Any) -> ir.Expr:
    return buffer[0]
