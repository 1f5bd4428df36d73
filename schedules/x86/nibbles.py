"""Matrix kernel for 4-bit weights and bytes of data: two codes in a byte, opened in registers.

A byte shuffle looks sixteen (or 32, 64) codes up in a table of sixteen int8 values: the table of a
codebook, or the signed numbers -8..7 in their own order. Each 128 bits of a register have their own
table, so that a table may serve as few as four output channels.

Sums of groups with whole-number scales stay integers: with vpdpbusd a group's sum is multiplied
and added; without, the scale takes the place of the ones in the vpmaddwd that widens a chain of
16-bit sums, and costs nothing. (Two-level scales: Dai et al. 2021, "VS-Quant", section 4.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..band import Source
from ..choice import Choice
from ..dot import Dot
from ..emit import vector
from ..fused import FusedFunction
from ..matrix import MatrixLayer, matrix_kernel_as
from ..spec import TABLE_SIZE, Conv2dSpec, MatmulSpec, WeightedSpec
from ..tile import Tile
from .dot import ByteDot, ChainDot, has_pairs
from .matrix import X86MatrixKernel
from .tile import choose_tile

NAME = "x86.nibbles"

_SHUFFLE = {
    4: "llvm.x86.ssse3.pshuf.b.128",
    8: "llvm.x86.avx2.pshuf.b",
    16: "llvm.x86.avx512.pshuf.b.512",
}
# Channels of a 128-bit lane, which has one table: four reduction positions of each lie side by
# side.
LANE_CHANNELS = 4
# The values of signed codes, as a table: 0..7, -8..-1.
_SIGNED_CODES = (*range(8), *range(-8, 0))
# Instructions that open two steps of weights, and registers besides accumulators and weights: the
# mask of a nibble, the table, a product.
_OPENING = 3
_SPARE = 3


def nibble_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> NibbleKernel | None:
    """A layer with 4-bit weights; None: no form for it."""
    return matrix_kernel_as(NibbleKernel, takes_weight, fused, target, choice)


def takes_weight(spec: WeightedSpec, dot: Dot, target: Target) -> bool:
    """Whether the kernel reads the layer's codes: two steps share a byte, so a run of steps that
    another one follows must be even, and so must be groups."""
    if spec.weight_dtype != "int4" or spec.data_dtype != "uint8" or spec.acc_dtype != "int32":
        return False
    if not isinstance(spec, (Conv2dSpec, MatmulSpec)) or spec.groups_of_channels > 1:
        return False
    if not isinstance(dot, ByteDot) or not has_pairs(target, dot.lanes):
        return False
    packed = spec.packed_layout
    if packed is None or packed.axis != "R":
        return False
    rows, columns, channels = spec.reduction
    row_terms = columns * channels
    pair = 2 * dot.group
    if rows > 1 and packed.pitches(spec.reduction)[0] % pair:
        return False
    if spec.table_channels and not spec.has_one_table and spec.table_channels != LANE_CHANNELS:
        return False
    if not spec.group_size or spec.group_size >= spec.reduction_size:
        return True
    return spec.group_size % pair == 0 and (rows == 1 or row_terms % spec.group_size == 0)


class NibbleKernel(X86MatrixKernel):
    """One function being written."""

    name = NAME

    def __init__(self, layer: MatrixLayer, dot: Dot) -> None:
        super().__init__(layer, dot)
        if layer.choice is None and self.tile.positions == 1:
            self.chain = dot.chain

    def build(self) -> tirx.PrimFunc:
        operands = self.operands
        self.tables = None if operands.tables is None else self.e.flat(operands.tables)
        self.scales = None if operands.scales is None else self.e.flat(operands.scales)
        return super().build()

    @property
    def is_chain(self) -> bool:
        """Whether products are added in 16 bits first."""
        return isinstance(self.dot, ChainDot)

    @property
    def size(self) -> int:
        """Bytes of a register."""
        return self.lanes * self.dot.group

    def _fastest_tile(self, rows: int, blocks: int) -> tuple[Tile, float]:
        window, registers = self.window, self.target.vector_registers
        if self.spec.group_size and not self.is_chain:
            registers //= 2  # sums of a group, and of all
        cycles, _, spare = self._tile_costs()
        return choose_tile(
            rows, window.columns, blocks, self.steps, registers,
            cycles, _OPENING, max(spare, _SPARE),
        )  # fmt: skip

    def _reduce(self, result: tirx.Buffer, source: Source, start: Any, block: Any) -> None:
        e, tile, lanes = self.e, self.tile, self.lanes
        for i in range(tile.positions * tile.vectors):
            e.store_vector(result, self._zero(), i * lanes, lanes)
        tables = self._tables(block)
        nest = self._nest(source)

        def walk(level: int, data: Any, step: Any) -> None:
            extent, data_stride, step_stride = nest[level]
            if level < len(nest) - 1:
                with e.loop(f"k{level}", extent) as k:
                    walk(level + 1, data + k * data_stride, step + k * step_stride)
                return
            length = min(extent, self.spec.group_size // self.dot.group or extent)

            def group(index: Any, steps: int) -> None:
                first = index * length
                at = e.bind("first", start + data + first * data_stride)
                number = tirx.div(step, length) + index
                self._group(result, source, tables, at, block, step + first, steps, number)

            if extent // length:
                with e.loop("group", extent // length) as index:
                    group(index, length)
            if extent % length:
                group(tirx.const(extent // length, "int32"), extent % length)

        walk(0, tirx.const(0, "int32"), tirx.const(0, "int32"))

    def _group(
        self,
        result: tirx.Buffer,
        source: Source,
        tables: list[Any],
        first: Any,
        block: Any,
        step: Any,
        steps: int,
        number: Any,
    ) -> None:
        """result += (sum over `steps` steps from `step` on) * the scales of group `number`."""
        e, tile, lanes, spec = self.e, self.tile, self.lanes, self.spec
        factors = [self._factor(block + v, number) for v in range(tile.vectors)]
        sums = result
        if spec.group_size and not self.is_chain:
            count = tile.positions * tile.vectors
            sums = e.alloc(count * lanes, "int32", "sums", registers=True)
            for i in range(count):
                e.store_vector(sums, self._zero(), i * lanes, lanes)
        rows = tirx.div(step, 2)

        def body(k: Any, per_turn: int, count: int) -> None:
            """`count` steps from byte row k * per_turn of the group on."""
            write = self._add_chain if self.is_chain else self._add_products
            at = first + k * (2 * per_turn * self.dot.group)
            write(sums, source, at, block, rows + k * per_turn, count, tables, factors)

        per_turn = max(1, self.chain // 2) if self.is_chain else 1
        turns, rest = divmod(steps, 2 * per_turn)
        e.unrolled("k", turns, self.unroll, lambda k: body(k, per_turn, 2 * per_turn))
        if rest:
            # Whole byte rows behind the turns: the last step alone may have half of one.
            body(tirx.const(turns, "int32"), per_turn, rest)
        if sums is not result:
            for i in range(tile.positions * tile.vectors):
                scaled = vector(sums, i * lanes, lanes) * factors[i % tile.vectors]
                e.store_vector(result, vector(result, i * lanes, lanes) + scaled, i * lanes, lanes)

    def _add_products(
        self,
        sums: tirx.Buffer,
        source: Source,
        at: Any,
        block: Any,
        row: Any,
        count: int,
        tables: list[Any],
        _factors: list[Any],
    ) -> None:
        """Two steps (or one) with vpdpbusd."""
        opened = [self._open(block + v, row, count, tables[v]) for v in range(self.tile.vectors)]
        for half in range(count):
            weights = [codes[half] for codes in opened]
            self._step(sums, None, source, at + half * self.dot.group, weights)

    def _add_chain(
        self,
        sums: tirx.Buffer,
        source: Source,
        at: Any,
        block: Any,
        row: Any,
        count: int,
        tables: list[Any],
        factors: list[Any],
    ) -> None:
        """`count` steps in 16 bits, a proven chain at a time, widened with the group's scales."""
        e, tile, lanes, dot = self.e, self.tile, self.lanes, self.dot
        assert isinstance(dot, ChainDot)

        def products(position: Callable[[int], Any], v: int, place: int, codes: list[Any]) -> None:
            for begin in range(0, count, self.chain):
                pairs: Any = None
                for step in range(begin, min(begin + self.chain, count)):
                    product = dot.pairs(position(step), codes[step])
                    pairs = product if pairs is None else pairs + product
                old = vector(sums, place * lanes, lanes)
                added = dot.add_scaled_pairs(old, pairs, factors[v])
                e.store_vector(sums, added, place * lanes, lanes)

        def data(row_offset: int, column: int) -> list[Any]:
            offset = at + row_offset * source.step[0] + column * source.step[1]
            return [
                e.bind("x", dot.broadcast(vector(source.buffer, offset + s * dot.group, dot.group)))
                for s in range(count)
            ]

        def opened(v: int) -> list[Any]:
            codes: list[Any] = []
            for pair in range(0, count, 2):
                codes += self._open(block + v, row + pair // 2, min(2, count - pair), tables[v])
            return codes

        places = [(r, c) for r in range(tile.rows) for c in range(tile.columns)]
        if len(places) == 1:
            # The data stay in registers, one vector's weights after the other are opened.
            values = data(0, 0)
            for v in range(tile.vectors):
                products(partial(_item, values), v, v, opened(v))
            return
        weights = [opened(v) for v in range(tile.vectors)]
        for p, (r, c) in enumerate(places):
            values = data(r, c)
            for v in range(tile.vectors):
                products(partial(_item, values), v, p * tile.vectors + v, weights[v])

    # Weights

    def _open(self, block: Any, row: Any, count: int, table: Any) -> list[Any]:
        """The values of byte row `row` of a block: of `count` steps, two or one."""
        e, size = self.e, self.size
        stored_rows = -(-self.steps // 2)
        both = e.bind("both", vector(self.weight, (block * stored_rows + row) * size, size))
        halves = [both, both >> self._bytes(4)][:count]
        opened = []
        for half in halves:
            index = tirx.reinterpret(f"int8x{size}", tirx.bitwise_and(half, self._bytes(15)))
            value = tirx.call_llvm_pure_intrin(f"int8x{size}", _SHUFFLE[self.lanes], table, index)
            opened.append(e.bind("w", value))
        return opened

    def _tables(self, block: Any) -> list[Any]:
        """A register of tables for every vector of the tile, one table for each 128 bits."""
        e, size, vectors = self.e, self.size, self.tile.vectors
        if self.tables is None:
            return [e.bind("table", _repeated_bytes(_SIGNED_CODES, size))] * vectors
        if self.spec.has_one_table:
            table = vector(self.tables, 0, TABLE_SIZE)
            repeated = tirx.Shuffle([table] * (size // TABLE_SIZE), list(range(size)))
            return [e.bind("table", repeated)] * vectors
        return [
            e.bind("table", vector(self.tables, (block + v) * size, size)) for v in range(vectors)
        ]

    def _factor(self, block: Any, number: Any) -> Any:
        """The scales of a block's channels in group `number`: int32, or 16-bit pairs for a chain;
        ones where there are no groups."""
        e, lanes = self.e, self.lanes
        if self.scales is None:
            return tirx.Broadcast(tirx.const(1, "int16"), 2 * lanes) if self.is_chain else None
        groups = self.spec.scales_shape[1]
        stored = vector(self.scales, (block * groups + number) * lanes, lanes)
        scale = e.bind("scale", stored.astype(f"int32x{lanes}"))
        if not self.is_chain:
            return scale
        upper = scale << tirx.Broadcast(tirx.const(16, "int32"), lanes)
        pair = tirx.bitwise_or(scale, upper)
        return e.bind("scales", tirx.reinterpret(f"int16x{2 * lanes}", pair))

    def _bytes(self, value: int) -> ir.Expr:
        return tirx.Broadcast(tirx.const(value, "uint8"), self.size)


def _item(values: list[Any], index: int) -> Any:
    return values[index]


def _repeated_bytes(values: tuple[int, ...], size: int) -> ir.Expr:
    """A constant register of `size` bytes that repeats `values`."""
    words = [
        int.from_bytes(bytes(v & 0xFF for v in values[i : i + 4]), "little", signed=True)
        for i in range(0, len(values), 4)
    ]
    numbers = [tirx.const(word, "int32") for word in words] * (size // len(values))
    packed = tirx.Shuffle(numbers, list(range(len(numbers))))
    return tirx.reinterpret(f"int8x{size}", packed)
