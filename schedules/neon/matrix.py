"""The register-tiled kernel of `../matrix.py` with NEON's instructions.

One load of data serves several steps of the reduction: by lanes (`LaneKernel`), by halves for the
rows of two positions (`TileKernel`), or whole (`PairsKernel`). Tiles are chosen for the fewest
instructions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tvm import ir, tirx

from ...targets import Target
from ..band import Source
from ..choice import Choice
from ..dot import Dot, FloatDot
from ..emit import dtype_bits, vector
from ..fused import FusedFunction
from ..layout import PackedLayout
from ..matrix import MatrixKernel, MatrixSpec, matrix_kernel_as, takes_weight
from ..spec import WeightedSpec, ceil_div
from ..tile import Tile
from .dot import LANES, PairsDot, TileDot, select_dot
from .epilogue import NeonEpilogue

_VECTOR_BYTES = 16
# Larger tiles are tried by tuning only.
_LARGEST_SIDE, _MOST_POSITIONS, _MOST_VECTORS = 10, 12, 8
# Instructions of a tile outside its reduction: loops and addresses, and for each accumulator.
_TILE, _EPILOGUE = 25, 8
# Registers that LLVM needs besides, or it spills (counted).
_SPARE = 6
# Loads of two registers are one instruction, most of the time.
_LOAD = 0.6
# Channels of a position that go through the epilogue together: a register of bytes.
_EPILOGUE_LANES = 16


def matrix_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> MatrixKernel | None:
    """The anchor as a register-tiled kernel; None: no form for it."""
    anchor = fused.anchor
    if anchor is None or not isinstance(anchor.spec, WeightedSpec):
        return None
    packed = anchor.spec.packed_layout
    if packed is None or packed.width != LANES:
        return None
    kernels: dict[int, type[NeonKernel]] = {PairsDot.group: PairsKernel, TileDot.group: TileKernel}
    kernel = kernels.get(packed.group, LaneKernel)
    return matrix_kernel_as(kernel, _takes, fused, target, choice)


def _takes(spec: MatrixSpec, dot: Dot, target: Target) -> bool:
    return spec.weight_dtype != "int4" and takes_weight(spec, dot, target)


class Turn(NamedTuple):
    """A turn of the innermost loop."""

    at: Any
    """Where the first position's data are."""
    block: Any
    """The first vector's block of channels."""
    step: Any
    """The first step of the reduction."""
    steps: int
    zero_points: list[Any]


class NeonKernel(MatrixKernel):
    """What the three forms share: a turn of the innermost loop is the steps of one load of data."""

    name = "neon.matrix"
    epilogue_type = NeonEpilogue

    @staticmethod
    def select_dot(spec: WeightedSpec, target: Target, packed: PackedLayout) -> Dot | None:
        return select_dot(spec, target, packed.group)

    @property
    def turn(self) -> int:
        """Steps of the reduction that a turn takes."""
        raise NotImplementedError

    def needs(self, positions: int, vectors: int) -> int:
        """Registers of a tile."""
        raise NotImplementedError

    def instructions(self, positions: int, vectors: int) -> float:
        """Of one turn."""
        raise NotImplementedError

    def _unrolling(self) -> int:
        return 1

    def _registers(self, tile: Tile) -> int:
        return self.needs(tile.positions, tile.vectors)

    def _epilogue_lanes(self) -> int:
        return _EPILOGUE_LANES

    def _fastest_tile(self, rows: int, blocks: int) -> tuple[Tile, float]:
        turns = ceil_div(self.steps, self.turn)
        best, least = Tile(1, 1, 1), float("inf")
        for vectors in range(1, min(blocks, _MOST_VECTORS) + 1):
            for positions in range(1, _MOST_POSITIONS + 1):
                if self.needs(positions, vectors) > self.target.vector_registers:
                    break
                step = self.instructions(positions, vectors)
                one = step * turns + _TILE + _EPILOGUE * positions * vectors
                for tile_columns in range(1, min(self.window.columns, positions) + 1):
                    tile_rows, odd = divmod(positions, tile_columns)
                    if odd or tile_rows > min(rows, _LARGEST_SIDE):
                        continue
                    count = ceil_div(rows, tile_rows) * ceil_div(self.window.columns, tile_columns)
                    cost = count * ceil_div(blocks, vectors) * one
                    if cost < least:
                        best, least = Tile(tile_rows, tile_columns, vectors), cost
        return best, least

    def _corrects_inside(self, tiles: int) -> bool:
        return False

    def _run(
        self,
        acc: tirx.Buffer,
        inside: tirx.Buffer | None,
        source: Source,
        start: Any,
        block: Any,
        data: Any,
        step: Any,
        extent: int,
        data_stride: int,
        scale_group: Any = None,
    ) -> None:
        e, group = self.e, self.dot.group
        first = e.bind("first", start + data + self._turn_around(source))
        zero_points = self._zero_points(block, scale_group)

        def write(k: Any, steps: int) -> None:
            turn = Turn(first + k * group, block, step + k, steps, zero_points)
            self._turn(acc, source, turn)

        full, rest = divmod(extent, self.turn)
        e.unrolled("k", full, self.unroll, lambda k: write(k * self.turn, self.turn))
        if rest:
            write(tirx.const(full * self.turn, "int32"), rest)

    def _turn(self, acc: tirx.Buffer, source: Source, turn: Turn) -> None:
        """For every position and vector of the tile."""
        raise NotImplementedError

    def _places(self, source: Source) -> list[int]:
        """Offsets of the tile's positions in the source."""
        rows, columns = source.step
        return [
            r * rows + c * columns for r in range(self.tile.rows) for c in range(self.tile.columns)
        ]

    def _add(self, acc: tirx.Buffer, number: int, *operands: Any) -> None:
        """One instruction on accumulator `number`."""
        at = number * LANES
        value = self.dot.accumulate(vector(acc, at, LANES), *operands)
        self.e.store_vector(acc, value, at, LANES)

    def _clear(self, acc: tirx.Buffer) -> None:
        for number in range(self._sums() // LANES):
            self.e.store_vector(acc, self._zero(), number * LANES, LANES)

    def _corrected(self, value: ir.Expr, i: int, block: Any) -> ir.Expr:
        """A sum and the correction of its channels."""
        if not self.corrected:
            return value
        channel = (block + i % self.tile.vectors) * LANES
        return value + vector(self.correction, channel, LANES)

    def _weight_at(self, block: Any, step: Any) -> Any:
        """Where a block's codes of one step begin."""
        return (block * self.steps + step) * (LANES * self.dot.group)


class LaneKernel(NeonKernel):
    """Data are operands by lanes: one register holds `turn` steps of a position."""

    @property
    def turn(self) -> int:
        return _VECTOR_BYTES * 8 // self._word_bits

    @property
    def _word_bits(self) -> int:
        return self.dot.group * dtype_bits(self.dot.data_dtype)

    @property
    def _extra(self) -> float:
        """Instructions that convert a register of weights."""
        stored = dtype_bits(self.spec.weight_dtype)
        return 0 if stored * self.dot.group == self._word_bits else 1 + bool(self.dot.zero_point)

    def needs(self, positions: int, vectors: int) -> int:
        return positions * vectors + vectors + positions + (1 if self._extra else 0)

    def instructions(self, positions: int, vectors: int) -> float:
        return self.turn * vectors * (positions + _LOAD + self._extra) + positions

    def _turn(self, acc: tirx.Buffer, source: Source, turn: Turn) -> None:
        at, block, step, steps, zero_points = turn
        e, dot, group, vectors = self.e, self.dot, self.dot.group, self.tile.vectors
        places, size = self._places(source), LANES * self.dot.group
        whole = steps == self.turn
        words: list[Any] = []
        if whole:
            kind = f"{'float' if isinstance(dot, FloatDot) else 'int'}{self._word_bits}x{steps}"
            loaded = (vector(source.buffer, at + place, steps * group) for place in places)
            words = [e.bind("x", _as(kind, value)) for value in loaded]
        for g in range(steps):
            codes = (
                vector(self.weight, self._weight_at(block + v, step + g), size)
                for v in range(vectors)
            )
            weights = [e.bind(f"w{v}", dot.widen(code)) for v, code in enumerate(codes)]
            weights = self._centre(weights, zero_points)
            for p, place in enumerate(places):
                if whole:
                    lanes = tirx.Shuffle([words[p]], [tirx.const(g, "int32")] * LANES)
                    x = _as(f"{dot.data_dtype}x{size}", lanes)
                else:
                    x = dot.broadcast(vector(source.buffer, at + (place + g * group), group))
                for v, weight in enumerate(weights):
                    self._add(acc, p * vectors + v, x, weight)


class TileKernel(NeonKernel):
    """Data of two positions in a register, eight bytes of each; an accumulator holds the sums of
    two positions by two channels."""

    turn = 2

    def _pairs(self) -> int:
        return ceil_div(self.tile.positions, 2)

    def needs(self, positions: int, vectors: int) -> int:
        pairs = ceil_div(positions, 2)
        return 2 * pairs * vectors + 2 * pairs + _SPARE

    def instructions(self, positions: int, vectors: int) -> float:
        pairs = ceil_div(positions, 2)
        return 4 * pairs * vectors + 4 * pairs + 4 * vectors * _LOAD

    def _sums(self) -> int:
        return self._pairs() * self.tile.vectors * 2 * LANES

    def _start(self, acc: tirx.Buffer, inside: tirx.Buffer | None, block: Any) -> None:
        self._clear(acc)

    def _turn(self, acc: tirx.Buffer, source: Source, turn: Turn) -> None:
        at, block, step, steps, _ = turn
        e, vectors, group = self.e, self.tile.vectors, self.dot.group
        places = self._places(source)
        places += places[-1:] * (len(places) % 2)  # the last of an odd number is its own partner
        loaded = {
            place: e.bind("x", vector(source.buffer, at + place, steps * group))
            for place in dict.fromkeys(places)
        }
        for g in range(steps):
            half = [g * group + i for i in range(group)]
            both = [*half, *(steps * group + i for i in half)]
            indices = [tirx.const(i, "int32") for i in both]
            data = [
                e.bind("rows", tirx.Shuffle([loaded[a], loaded[b]], indices))
                for a, b in zip(places[::2], places[1::2], strict=True)
            ]
            for v in range(vectors):
                codes = self._weight_at(block + v, step + g)
                for half_of_block in range(2):
                    start = codes + half_of_block * _VECTOR_BYTES
                    weight = e.bind("w", vector(self.weight, start, _VECTOR_BYTES))
                    for pair, x in enumerate(data):
                        self._add(acc, (pair * vectors + v) * 2 + half_of_block, x, weight)

    def _sum(self, acc: tirx.Buffer, i: int, block: Any) -> ir.Expr:
        position, v = divmod(i, self.tile.vectors)
        first = (position // 2 * self.tile.vectors + v) * 2
        parts = [vector(acc, (first + half) * LANES, LANES) for half in range(2)]
        at = position % 2 * 2
        indices = [tirx.const(n, "int32") for n in (at, at + 1, LANES + at, LANES + at + 1)]
        return tirx.Shuffle(parts, indices)


class PairsKernel(NeonKernel):
    """Sixteen bytes of a position by those of one channel: an accumulator holds four parts of one
    sum."""

    @property
    def turn(self) -> int:
        return max(1, self.chain // 2)

    def _chains(self) -> tuple[int, ...]:
        return tuple(n for n in (1, 2, 4) if n <= self.dot.chain)

    def needs(self, positions: int, vectors: int) -> int:
        # LLVM starts several products, and loads their weights, before it adds the first.
        operands = (positions + 5 * vectors) * self.turn
        return LANES * positions * vectors + operands + _SPARE

    def instructions(self, positions: int, vectors: int) -> float:
        turn, sums = self.turn, LANES * positions * vectors
        products = sums * (2 * turn + 2 * turn / self.chain)
        return products + (positions + LANES * vectors) * turn * _LOAD

    def _sums(self) -> int:
        return super()._sums() * LANES

    def _start(self, acc: tirx.Buffer, inside: tirx.Buffer | None, block: Any) -> None:
        self._clear(acc)

    def _turn(self, acc: tirx.Buffer, source: Source, turn: Turn) -> None:
        at, block, step, steps, _ = turn
        e, vectors, group = self.e, self.tile.vectors, self.dot.group
        data = [
            [
                e.bind("x", vector(source.buffer, at + (place + s * group), group))
                for s in range(steps)
            ]
            for place in self._places(source)
        ]
        for v in range(vectors):
            for lane in range(LANES):
                starts = [self._weight_at(block + v, step + s) + lane * group for s in range(steps)]
                weights = [e.bind("w", vector(self.weight, start, group)) for start in starts]
                for p, x in enumerate(data):
                    self._multiply(acc, (p * vectors + v) * LANES + lane, x, weights)

    def _multiply(self, acc: tirx.Buffer, number: int, data: list[Any], weights: list[Any]) -> None:
        """Some steps of one position and one channel, a chain at a time."""
        dot = self.dot
        assert isinstance(dot, PairsDot)
        at, halves = number * LANES, 2 * len(data)
        for begin in range(0, halves, self.chain):
            pairs: Any = None
            for h in range(begin, min(begin + self.chain, halves)):
                product = dot.pairs(_half(data[h // 2], h % 2), _half(weights[h // 2], h % 2))
                pairs = product if pairs is None else pairs + product
            value = dot.add_pairs(vector(acc, at, LANES), pairs)
            self.e.store_vector(acc, value, at, LANES)

    def _correction(self) -> tirx.Buffer:
        e, group = self.e, self.dot.group
        blocks = self.window.groups * self.blocks
        buffer = e.alloc(blocks * LANES, "int32", "correction")
        offset = [tirx.Broadcast(tirx.const(self.dot.offset(self.spec.data_dtype), "int8"), group)]
        with e.loop("block", blocks) as block:
            acc = e.alloc(LANES * LANES, "int32", "sums", registers=True)
            for lane in range(LANES):
                e.store_vector(acc, self._zero(), lane * LANES, LANES)
            with e.loop("step", self.steps) as step:
                for lane in range(LANES):
                    start = self._weight_at(block, step) + lane * group
                    weight = e.bind("w", vector(self.weight, start, group))
                    self._multiply(acc, lane, offset, [weight])
            e.store_vector(buffer, self._zero() - self._joined(acc, 0), block * LANES, LANES)
        return buffer

    def _joined(self, acc: tirx.Buffer, first: int) -> ir.Expr:
        """The sums of four accumulators from number `first` on."""
        dot = self.dot
        assert isinstance(dot, PairsDot)
        return dot.sum_lanes([vector(acc, (first + i) * LANES, LANES) for i in range(LANES)])

    def _sum(self, acc: tirx.Buffer, i: int, block: Any) -> ir.Expr:
        return self._corrected(self._joined(acc, i * LANES), i, block)


def _half(value: Any, which: int) -> ir.Expr:
    """Eight of sixteen bytes."""
    indices = [tirx.const(PairsDot.HALF * which + i, "int32") for i in range(PairsDot.HALF)]
    return tirx.Shuffle([value], indices)


def _as(dtype: str, value: ir.Expr) -> ir.Expr:
    return value if str(value.ty.dtype) == dtype else tirx.reinterpret(dtype, value)
