"""Depthwise convolution with `smlad`: channel by channel, its plane widened and bordered first.

In NHWC the taps of a channel lie apart. In a plane of 16-bit integers of its own, rows in twos,
two taps of a kernel column are a word. The weights of a channel stay in registers as pairs, its
constants of requantisation are loaded once. Two neighbouring output rows share all words: of rows
(0, 1) the upper output takes both with (w0, w1), the lower one takes row 1 with w0; of rows (2, 3)
the lower one takes both with (w1, w2) and the upper one row 2 with w2.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..choice import Choice, SearchSpace
from ..emit import Emitter
from ..fused import FusedFunction
from ..layer_kernel import Layer, LayerKernel, read_layer
from ..operands import Operands, find_operands
from ..spec import Conv2dSpec, ceil_div
from ..window import window_of
from .assembly import as_llvm
from .depthwise_loops import DepthwiseLoops, Product
from .dsp import join_low, multiply_add, multiply_add_halves, word
from .epilogue import DspEpilogue
from .rounding import finisher, llvm_helpers

_PLANE_BYTES = 4096
"""A larger plane goes in bands of rows."""
_MOST_TAPS = 49
_SUMS = 4
"""Outputs of a tile."""
_MOST_COLUMNS = 4
_SUM_BYTES = 1024
"""Of sums that wait for their requantisation."""
_UNROLLED_CODES = 4
_UNROLLED_COPIES = 12
"""Elements copied in one turn of a loop."""


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
    layer = read_layer(fused, target, choice, (Conv2dSpec,), takes, find_operands, DspEpilogue)
    return None if layer is None else _DepthwiseKernel(layer)


class _DepthwiseKernel(LayerKernel[Conv2dSpec, Operands, DspEpilogue]):
    """One function being written."""

    def __init__(self, layer: Layer[Conv2dSpec, Operands, DspEpilogue]) -> None:
        super().__init__(layer)
        spec, choice = layer.spec, layer.choice
        self.window = window_of(spec)
        stride = spec.strides[0]
        # A tile begins at an even row, so that words lie the same in all of them.
        self.height = 1 if stride % 2 == 0 or self.window.rows == 1 else 2
        self.pitch = self.window.padded_columns
        self.rows = self.window.rows
        while self.rows > 1 and self._plane(self.rows) * 2 > _PLANE_BYTES:
            self.rows = ceil_div(self.rows, 2)
        self.columns = _SUMS // self.height if choice is None else choice["columns"]
        self.columns = min(self.columns, self.window.columns)
        self.bands = ceil_div(self.window.rows, self.rows)
        self.plan = self._plan()
        self.strips = ceil_div(self.rows, self.height)
        size = 4 * self.height * self.window.columns
        groups = [n for n in range(1, self.strips + 1) if self.strips % n == 0]
        self.group = max(n for n in groups if n == 1 or n * size <= _SUM_BYTES)
        self.loops = self._assembly()
        self.e = Emitter(finisher(self.target))

    def _plane(self, rows: int) -> int:
        """Elements of a plane for so many output rows."""
        strips = ceil_div(rows, self.height) * self.height
        return ceil_div(self.window.input_rows(strips), 2) * 2 * self.pitch

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        return SearchSpace(
            "arm.depthwise",
            {"columns": tuple(range(1, min(_MOST_COLUMNS, self.window.columns) + 1))},
            {"columns": self.columns},
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
        if self.loops is not None:
            self.words = e.alloc(self.loops.weights + 1, "int32", "words", registers=False)
            count = self.group * self.height * window.columns
            self.sums = e.alloc(count, "int32", "sums")
            # Or lowering would cut both where the last row, which is none of the output's, ends.
            e.store(self.sums, tirx.const(0, "int32"), count - 1)
            e.store(self.plane, tirx.const(0, "int16"), self._plane(self.rows) - 1)
        self._fill_border()
        with e.loop("b", window.batch) as b, e.loop("c", spec.in_channels) as c:
            with e.loop("band", self.bands) as band:
                first = band * self.rows
                if window.rows % self.rows:
                    first = tirx.min(first, window.rows - self.rows)
                y = e.bind("y", first)
                self._fill(b, y, c)
                with e.loop("m", spec.columns) as m:
                    self._channel(b, y, e.bind("o", c * spec.columns + m))
        self.epilogue.emit_rest(e, 1)
        code = llvm_helpers()
        if self.loops is not None:
            code += as_llvm(self.loops.name, self.loops.assembly(), 3)
        return e.function(list(self.fused.func.params), {}, code)

    def _row(self, row: Any) -> Any:
        """Where a row of the plane starts; its elements are two apart."""
        return (row // 2) * (2 * self.pitch) + row % 2

    def _constant(self, row: Any, first: int, count: int) -> None:
        """`count` columns of a row of the plane are border."""
        e = self.e
        start = e.bind("start", self._row(row) + 2 * first)
        with e.loop("i", count) as i:
            e.store(self.plane, tirx.const(self.spec.pad_value, "int16"), start + 2 * i)

    def _fill_border(self) -> None:
        """What is border for every channel, and for every band."""
        e, window = self.e, self.window
        top, left, bottom, right = window.padding
        rows = window.input_rows(self.rows)
        if left or right:
            with e.loop("row", rows) as row:
                self._constant(row, 0, left)
                self._constant(row, left + window.in_columns, right)
        if self.bands == 1:
            bottom = max(0, rows - top - window.in_rows)
            with e.loop("row", min(top, rows)) as row:
                self._constant(row, left, window.in_columns)
            with e.loop("row", bottom) as row:
                self._constant(row + top + window.in_rows, left, window.in_columns)

    def _fill(self, b: Any, y: Any, c: Any) -> None:
        """The input rows of one channel for output rows y.. of a band."""
        e, window = self.e, self.window
        top, left, _, _ = window.padding
        rows = window.input_rows(self.rows)

        def copy(iy: Any, row: Any) -> None:
            start = e.bind("start", self._row(row) + 2 * left)
            e.unrolled(
                "x", window.in_columns, min(window.in_columns, _UNROLLED_COPIES),
                lambda x: e.store(self.plane, self._input(b, iy, x, c), start + 2 * x),
            )  # fmt: skip

        if self.bands == 1:
            count = min(window.in_rows, rows - top)
            at_once = max(1, _UNROLLED_COPIES // window.in_columns)
            e.unrolled("row", count, min(at_once, count), lambda row: copy(row, row + top))
            return
        with e.loop("row", rows) as row:
            iy = e.bind("iy", y * window.strides[0] + row - top)
            e.branch(
                tirx.all(iy >= 0, iy < window.in_rows),
                partial(copy, iy, row),
                lambda: self._constant(row, left, window.in_columns),
            )

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
        words = [e.bind("pair", pair) for pair in self._pairs(o)]
        if self.loops is not None:
            self._strips(b, y, o, words, initial)
            return
        whole, rest = divmod(self.rows, self.height)

        def tiles(row: Any, height: int) -> None:
            """All tiles of `height` output rows."""
            start = e.bind("start", row * window.strides[0] * self.pitch)
            full, narrow = divmod(window.columns, self.columns)
            with e.loop("tile", full) as tile:
                self._tile(b, y + row, tile * self.columns, start, o, words, initial,
                           (height, self.columns))  # fmt: skip
            if narrow:
                x = tirx.const(full * self.columns, "int32")
                self._tile(b, y + row, x, start, o, words, initial, (height, narrow))

        with e.loop("pair", whole) as pair:
            tiles(pair * self.height, self.height)
        if rest:
            tiles(tirx.const(whole * self.height, "int32"), rest)

    def _strips(self, b: Any, y: Any, o: Any, words: list[Any], initial: Any) -> None:
        """All outputs of a band: sums of some strips by the loops in assembly, then their codes."""
        e, loops = self.e, self.loops
        assert loops is not None
        for index, value in enumerate([*words, initial]):
            e.store(self.words, value, index)
        self.epilogue.sums = self.sums
        with e.loop("group", self.strips // self.group) as group:
            first = e.bind("first", group * self.group)
            start = first * (loops.advance * self.pitch * 2)
            e.evaluate(
                tirx.call_extern(
                    "void", f"{loops.name}_call", tirx.address_of(self.plane[start]),
                    tirx.address_of(self.words[0]), tirx.address_of(self.sums[0]),
                )
            )  # fmt: skip
            with e.loop("strip", self.group) as strip:
                for j in range(self.height):
                    row = (first + strip) * self.height + j
                    if self.rows % self.height and j == self.height - 1:
                        with e.when(row < self.rows):
                            self._finish(b, y + row, o, strip, j)
                    else:
                        self._finish(b, y + row, o, strip, j)

    def _finish(self, b: Any, y: Any, o: Any, strip: Any, j: int) -> None:
        """The codes of one output row."""
        window = self.window

        def one(x: Any) -> None:
            place = (strip * window.columns + x) * self.height + j
            self.epilogue.emit(
                self.e,
                partial(window.indices, b, y, x),
                (b * window.rows + y) * window.columns + x,
                o,
                1,
                partial(_element, self.sums, place),
            )

        self.e.unrolled("x", window.columns, min(_UNROLLED_CODES, window.columns), one)

    def _taps(self, height: int) -> list[dict[int, list[tuple[int, int]]]]:
        """For every output row of a tile: word row => its (half, kernel row)."""
        stride, dilation = self.spec.strides[0], self.window.dilation[0]
        uses: list[dict[int, list[tuple[int, int]]]] = []
        for j in range(height):
            found: dict[int, list[tuple[int, int]]] = {}
            for ky in range(self.spec.kernel[0]):
                word_row, half = divmod(j * stride + ky * dilation, 2)
                found.setdefault(word_row, []).append((half, ky))
            uses.append(found)
        return uses

    def _plan(self) -> _Words:
        """Which two taps of a kernel column share a word of weights."""
        kh, kw = self.spec.kernel
        pairs = {
            used[0][1]: used[1][1]
            for row in self._taps(self.height)
            for used in row.values()
            if len(used) == 2
        }
        plan = _Words([], {}, {})
        for low, high in pairs.items():
            for kx in range(kw):
                plan.pairs[low, kx] = len(plan.taps)
                plan.halves[low, kx] = len(plan.taps), 0
                plan.halves[high, kx] = len(plan.taps), 1
                plan.taps.append(((low, kx), (high, kx)))
        places = [(ky, kx) for ky in range(kh) for kx in range(kw)]
        alone = [place for place in places if place not in plan.halves]
        for first, second in itertools.zip_longest(alone[::2], alone[1::2]):
            plan.halves[first] = len(plan.taps), 0
            if second is not None:
                plan.halves[second] = len(plan.taps), 1
            plan.taps.append((first, second))
        return plan

    def _assembly(self) -> DepthwiseLoops | None:
        """The inner loops by hand; None: they want more registers."""
        window = self.window
        taps = self._taps(self.height)
        rows = range(max(row for used in taps for row in used) + 1)
        columns = range(self.spec.kernel[1])
        products = tuple(
            tuple(
                tuple(self.plan.products(used.get(row, []), kx) for kx in columns) for row in rows
            )
            for used in taps
        )
        loops = DepthwiseLoops(
            products, len(self.plan.taps), self.group, window.columns, self.columns,
            window.strides[1], self.pitch, max(1, self.height * window.strides[0] // 2),
        )  # fmt: skip
        return loops if loops.is_possible else None

    def _pairs(self, o: Any) -> list[ir.Expr]:
        """The words of weights of a channel."""
        e, kw = self.e, self.spec.kernel[1]

        def tap(place: tuple[int, int]) -> Any:
            ky, kx = place
            index = (ky * kw + kx) * self.spec.out_channels + o
            return self.weight[index].astype("int32")

        used = {place for taps in self.plan.taps for place in taps if place is not None}
        values = {place: e.bind("w", tap(place)) for place in sorted(used)}
        return [
            values[low] if high is None else join_low(values[low], values[high])
            for low, high in self.plan.taps
        ]

    def _tile(
        self,
        b: Any,
        y: Any,
        x: Any,
        start: Any,
        o: Any,
        words: list[Any],
        initial: Any,
        size: tuple[int, int],
    ) -> None:
        """Outputs of neighbouring rows and columns; the first one's window is at `start`."""
        e, window, spec = self.e, self.window, self.spec
        height, width = size
        stride, kw = spec.strides[1], spec.kernel[1]
        uses = self._taps(height)
        sums: dict[tuple[int, int], Any] = {
            (j, i): initial for j in range(height) for i in range(width)
        }
        first = e.bind("first", start + x * (2 * stride))
        for word_row in sorted({row for used in uses for row in used}):
            for column in range((width - 1) * stride + kw):
                reached = [
                    (j, i) for j, i in sums if word_row in uses[j] and 0 <= column - i * stride < kw
                ]
                if not reached:
                    continue
                offset = 2 * (word_row * self.pitch + column)
                data = e.bind("x", word(self.plane, first + offset, 2))
                for j, i in reached:
                    for product in self.plan.products(uses[j][word_row], column - i * stride):
                        total = _product(sums[j, i], data, product, words)
                        sums[j, i] = e.bind("sum", total)
        for (j, i), total in sums.items():
            registers = e.alloc(1, "int32", "sums", registers=True)
            e.store(registers, total, 0)
            self.epilogue.sums = registers
            self.epilogue.emit(
                e,
                partial(window.indices, b, y + j, x + i),
                (b * window.rows + y + j) * window.columns + x + i,
                o,
                1,
                partial(_element, registers, 0),
            )


@dataclass(frozen=True)
class _Words:
    """Taps (kernel row, kernel column) that share a word of weights, and where they are: pairs by
    the upper tap, and for every tap some word with its half."""

    taps: list[tuple[tuple[int, int], tuple[int, int] | None]]
    pairs: dict[tuple[int, int], int]
    halves: dict[tuple[int, int], tuple[int, int]]

    def products(self, used: list[tuple[int, int]], kx: int) -> tuple[Product, ...]:
        """What a word of data is multiplied by, whose halves are kernel rows (half, row)."""
        if len(used) == 2 and (used[0][1], kx) in self.pairs:
            return (Product(self.pairs[used[0][1], kx], None),)
        found = []
        for half, ky in used:
            index, which = self.halves[ky, kx]
            found.append(Product(index, (half, which)))
        return tuple(found)


def _product(acc: Any, data: Any, product: Product, words: list[Any]) -> ir.Expr:
    """acc + a product."""
    weight = words[product.weight]
    if product.halves is None:
        return multiply_add(acc, data, weight)
    return multiply_add_halves(acc, data, product.halves[0], weight, product.halves[1])


def _element(buffer: tirx.Buffer, place: Any, _lane: Any) -> ir.Expr:
    return buffer[place]
