"""Sparse convolution on vectors of output channels: an entry is a vector of weights (or a few) and
one number of the data for each position of the tile.

The data's numbers are broadcast from memory by the multiply-add itself; the offset and the weights
of an entry are read once for all positions. Blocks of at least four channels. What multiplies is an
instruction set's `Dot` of group 1: floats everywhere, bytes with RISC-V's vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from tvm import ir, tirx

from ..targets import Target
from .band import Band, BandReader, Source, even_rows
from .choice import Choice, SearchSpace
from .dot import Dot, FloatDot
from .emit import Emitter, splat, vector, vector_parts
from .epilogue import Epilogue
from .fused import FusedFunction, Stage
from .layer_kernel import Layer, LayerKernel, read_layer
from .matrix import PARALLEL_MACS
from .operands import Operands
from .spec import SparseConv2dSpec, ceil_div
from .tile import Tile
from .window import window_of

# Registers besides accumulators and weights: one number of the data.
_SPARE = 1
# More positions than these do not pay: what they share is small by then, and code is not.
_MOST_POSITIONS = 14


def sparse_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> SparseKernel | None:
    """A sparse convolution with float data; None: no form for it."""
    return sparse_kernel_as(SparseKernel, float_dot, fused, target, choice)


def sparse_kernel_as(
    kernel: type[SparseKernel],
    select_dot: Callable[[SparseConv2dSpec, Target], Dot | None],
    fused: FusedFunction,
    target: Target,
    choice: Choice | None,
) -> SparseKernel | None:
    """The anchor as a kernel of an instruction set; None: no form for it."""

    def takes(spec: SparseConv2dSpec) -> Dot | None:
        return select_dot(spec, target)

    layer = read_layer(
        fused, target, choice, (SparseConv2dSpec,), takes, sparse_operands, kernel.epilogue_type
    )
    dot = None if layer is None else takes(layer.spec)
    return None if layer is None or dot is None else kernel(layer, dot)


def float_dot(spec: SparseConv2dSpec, target: Target) -> Dot | None:
    """Registers of the block's channels, or a part of them; None: not floats, or no such part."""
    if spec.is_integer or spec.by_channel or spec.weight_dtype != "float32":
        return None
    widest = min(16, target.lanes(32))
    lanes = next((n for n in (16, 8, 4) if n <= widest and spec.block % n == 0), None)
    fused = target.has("fma") or not target.is_x86
    return None if lanes is None else FloatDot(lanes, "float32", fused)


@dataclass(frozen=True, kw_only=True)
class SparseOperands(Operands):
    """Buffers of a sparse anchor; `weight` are the values."""

    offsets: tirx.Buffer
    starts: tirx.Buffer


SparseLayer = Layer[SparseConv2dSpec, SparseOperands, Epilogue]


def sparse_operands(
    fused: FusedFunction, anchor: Stage, spec: SparseConv2dSpec
) -> SparseOperands | None:
    """None where the block reads something else."""
    found: dict[str, tirx.Buffer] = {}
    window: tirx.Buffer | None = None
    expected = {
        "weight": (spec.values_shape, spec.weight_dtype),
        "offsets": ((spec.entries,), spec.offsets_dtype),
        "starts": ((spec.blocks + 1,), "int32"),
    }
    for buffer in anchor.reads:
        form = (tuple(int(n) for n in buffer.shape), str(buffer.dtype))
        name = next((n for n, wanted in expected.items() if wanted == form), None)
        if name is not None and buffer not in fused.producers:
            found[name] = buffer
        elif not buffer.same_as(anchor.buffer):
            window = buffer
    if len(found) < len(expected) or window is None:
        return None
    data = window
    if any(spec.padding):
        stage = fused.producers.get(window)
        if stage is None or len(stage.reads) != 1:
            return None
        data = stage.reads[0]
    if tuple(int(n) for n in data.shape) != spec.data_shape or data in fused.producers:
        return None
    return SparseOperands(window, data, **found)


class SparseKernel(LayerKernel[SparseConv2dSpec, SparseOperands, Epilogue]):
    """One function being written."""

    epilogue_type: ClassVar[type[Epilogue]] = Epilogue
    unrolling: ClassVar[int] = 1
    """Entries that a turn of the loop takes by default."""

    def __init__(self, layer: SparseLayer, dot: Dot) -> None:
        super().__init__(layer)
        spec, target, choice = layer.spec, layer.target, layer.choice
        self.dot, self.lanes, self.window = dot, dot.lanes, window_of(spec)
        vectors = spec.block // self.lanes
        # A block wider than the registers is read in parts, each with all of its entries.
        self.vectors = next(n for n in (4, 2, 1) if vectors % n == 0)
        most = max(n for n in range(1, _MOST_POSITIONS + 1) if n == 1 or self._fits(n))
        self.tile = self._tile_of_positions(most)
        self.unroll = self.unrolling
        self.parallel = target.threads > 1 and spec.macs >= PARALLEL_MACS * dot.speed
        self.band = Band(
            self.window, any(spec.padding), spec.data_dtype, spec.data_dtype, lambda value: value,
            spec.pad_value, self.window.channels,
        )  # fmt: skip
        self.rows = self._rows_of_a_task()
        if choice is not None:
            self.vectors = choice["vectors"]
            self.tile = Tile(choice["rows"], choice["columns"], self.vectors)
            self.rows = max(self.tile.rows, min(self.window.rows, choice["band"]))
            self.unroll = choice["unroll"]
        self.e = Emitter()

    @property
    def finishes_singly(self) -> bool:
        """Whether the epilogue takes one position after the other, sums in memory: otherwise LLVM
        takes all at once, for which wide registers do not suffice."""
        return False

    def _registers(self, positions: int, vectors: int) -> int:
        """Registers that a tile needs."""
        return (positions + 1) * vectors + _SPARE

    def _fits(self, positions: int) -> bool:
        return self._registers(positions, self.vectors) <= self.target.vector_registers

    def _tile_of_positions(self, most: int) -> Tile:
        """Columns first: they are neighbours. The fewest positions of the last tile are wasted."""
        window = self.window

        def cost(rows: int, columns: int) -> float:
            tiles = ceil_div(window.rows, rows) * ceil_div(window.columns, columns)
            # An entry costs a multiply-add a position and vector, and about three instructions.
            return tiles * (rows * columns * self.vectors + 3)

        rows, columns = min(
            (
                (rows, columns)
                for columns in range(1, min(window.columns, most) + 1)
                for rows in range(1, min(window.rows, most // columns) + 1)
            ),
            key=lambda sides: cost(*sides),
        )
        return Tile(rows, columns, self.vectors)

    def _rows_of_a_task(self) -> int:
        """Output rows whose input stays in the second-level cache, at least one for each thread."""
        threads = self.target.threads if self.parallel else 1
        most = min(self.band.most_rows(self.target.l2_bytes // 2), self.window.rows)
        rows = even_rows(self.window.rows, most, self.window.batch, threads, self.tile.rows)
        return max(self.tile.rows, rows)

    def space(self) -> SearchSpace:
        """Tiles, rows of a task, unrolling."""
        window, registers = self.window, self.target.vector_registers
        vectors = self.spec.block // self.lanes
        default = {
            "rows": self.tile.rows, "columns": self.tile.columns, "vectors": self.vectors,
            "band": self.rows, "unroll": self.unroll,
        }  # fmt: skip

        def is_valid(choice: Choice) -> bool:
            used = self._registers(choice["rows"] * choice["columns"], choice["vectors"])
            return registers <= 2 * used <= 2 * registers and choice["rows"] <= choice["band"]

        sides = range(1, registers)
        return SearchSpace(
            "sparse",
            {
                "rows": tuple(n for n in sides if n <= window.rows),
                "columns": tuple(n for n in sides if n <= window.columns),
                "vectors": tuple(n for n in (1, 2, 4) if vectors % n == 0),
                "band": self.band.choices(self.rows),
                "unroll": (1, 2, 4),
            },
            default,
            is_valid,
        )

    def build(self) -> tirx.PrimFunc:
        e, window, tile = self.e, self.window, self.tile
        self.values = e.flat(self.operands.weight)
        reader = BandReader(e, self.band, self.fused, self.operands, self.target)
        self.epilogue.declare(e)
        bands = ceil_div(window.rows, self.rows)
        kind = "parallel" if self.parallel else "serial"
        parts = self.spec.block // (self.lanes * tile.vectors)
        with e.loop("task", window.batch * bands, kind) as task:
            b = task // bands
            y = e.bind("y", tirx.min(task % bands * self.rows, window.rows - self.rows))
            source = reader.source(b, y, self.rows, 0)
            with e.loop("block", self.spec.blocks) as block:
                first = e.bind("first", self.operands.starts[block])
                count = e.bind("count", self.operands.starts[block + 1] - first)
                with e.loop("tile_row", ceil_div(self.rows, tile.rows)) as ty:
                    dy = e.bind("dy", tirx.min(ty * tile.rows, self.rows - tile.rows))
                    with e.loop("tile_column", ceil_div(window.columns, tile.columns)) as tx:
                        limit = window.columns - tile.columns
                        x = e.bind("x", tirx.min(tx * tile.columns, limit))
                        for part in e.each("part", parts, unrolled=False):
                            self._tile(source, (first, count), block, part, b, y, dy, x)
        self.epilogue.emit_rest(e, self.lanes)
        return e.function(list(self.fused.func.params), {})

    def _tile(
        self, source: Source, entries: tuple[Any, Any], block: Any, part: Any,
        b: Any, y: Any, dy: Any, x: Any,
    ) -> None:  # fmt: skip
        e, tile, lanes, vectors = self.e, self.tile, self.lanes, self.vectors
        dtype = self.dot.acc_dtype
        acc = e.alloc(tile.positions * vectors * lanes, dtype, "acc", registers=True)
        for place in range(tile.positions * vectors):
            e.store_vector(acc, splat(tirx.const(0, dtype), lanes), place * lanes, lanes)
        start = e.bind("start", source.base + dy * source.step[0] + x * source.step[1])
        first, count = entries
        channel = e.bind("channel", part * (vectors * lanes))

        def entry(index: Any) -> None:
            number = e.bind("number", first + index)
            at = e.bind("at", start + self.operands.offsets[number].astype("int32"))
            codes = e.bind("codes", number * self.spec.block + channel)
            weights = [
                e.bind(f"w{v}", self.dot.widen(vector(self.values, codes + v * lanes, lanes)))
                for v in range(vectors)
            ]
            for row in range(tile.rows):
                for column in range(tile.columns):
                    offset = row * source.step[0] + column * source.step[1]
                    value = source.buffer[at + offset]
                    data = e.bind("data", self.dot.broadcast(value))
                    for v, weight in enumerate(weights):
                        place = ((row * tile.columns + column) * vectors + v) * lanes
                        old = vector(acc, place, lanes)
                        e.store_vector(acc, self.dot.accumulate(old, data, weight), place, lanes)

        if self.unroll == 1:
            with e.loop("entry", count) as index:
                entry(index)
        else:
            with e.loop("entries", tirx.div(count, self.unroll)) as turn:
                for index in range(self.unroll):
                    entry(turn * self.unroll + index)
            whole = tirx.div(count, self.unroll) * self.unroll
            with e.loop("entry", count - whole) as index:
                entry(whole + index)
        self._finish(acc, block, channel, b, y + dy, x)

    def _finish(self, acc: tirx.Buffer, block: Any, channel: Any, b: Any, y: Any, x: Any) -> None:
        """Every position through the epilogue; of the last block only channels that exist."""
        e, window, tile, lanes = self.e, self.window, self.tile, self.lanes
        outputs = self.spec.out_channels
        places = tile.positions * self.vectors
        unrolled = not self.finishes_singly and places * self.epilogue.size <= 400
        if self.finishes_singly:
            sums = e.alloc(places * lanes, self.dot.acc_dtype, "sums")
            for place in range(places):
                e.store_vector(sums, vector(acc, place * lanes, lanes), place * lanes, lanes)
            acc = sums

        def position(v: Any, start: Any, parts: list[tuple[int, int]], r: Any, c: Any) -> None:
            place = ((r * tile.columns + c) * self.vectors + v) * lanes
            for inner, width in parts:
                self.epilogue.emit(
                    e,
                    partial(window.indices, b, y + r, x + c),
                    (b * window.rows + y + r) * window.columns + x + c,
                    start + inner,
                    width,
                    partial(_element, acc, place + inner),
                )

        def positions(v: Any, start: Any, parts: list[tuple[int, int]]) -> None:
            if self.finishes_singly:
                # The first start is 0, but LLVM does not know: it writes loops of known length out.
                with e.loop("p", tile.positions + self.operands.starts[0]) as p:
                    position(v, start, parts, p // tile.columns, p % tile.columns)
                return
            for r in e.each("r", tile.rows, unrolled):
                for c in e.each("c", tile.columns, unrolled):
                    position(v, start, parts, r, c)

        rest = outputs % lanes
        for v in e.each("v", self.vectors, unrolled):
            start = e.bind("start", block * self.spec.block + channel + v * lanes)
            if outputs % self.spec.block == 0:
                positions(v, start, [(0, lanes)])
                continue
            with e.when(start + lanes <= outputs):
                positions(v, start, [(0, lanes)])
            if rest:
                with e.when(start == outputs - rest):
                    positions(v, start, vector_parts(rest, lanes))


def _element(buffer: tirx.Buffer, start: Any, lane: Any) -> ir.Expr:
    return buffer[start + lane]
