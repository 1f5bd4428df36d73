"""3x3 convolutions of float32 by Winograd's filtering: a half to a quarter of the products.

Order of loops, from the outside: tasks (batch, bands of rows of tiles, perhaps parts of the output
channels; in parallel), the copy of the band's input with its border, its transform, groups of
output channels. For a group: the transform of its weights (before all tasks, where several need
it), then every place of the transform as a small matrix product over the channels, in register
tiles, then each tile goes back and through the epilogue in registers. The last tiles are moved back
inside the image, so that all are whole.

The weight is stored as the direct kernel's, and transformed in every call: stored transformed it
would be four times as large, and read that much more slowly from memory than nine taps are
transformed in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tvm import ir, tirx

from ...targets import Target
from ..band import Band, BandReader, Source
from ..choice import Choice, SearchSpace
from ..dot import Dot
from ..emit import Emitter, vector, vector_parts
from ..epilogue import Epilogue
from ..fused import FusedFunction
from ..layer_kernel import Layer, LayerKernel, read_layer
from ..matrix import PARALLEL_MACS
from ..operands import Operands, find_operands
from ..pitch import ALIASED_BYTES
from ..spec import Conv2dSpec, ceil_div
from ..window import window_of
from ..winograd import POINTS, data_matrix, output_matrix, side, weight_matrix
from .dot import select_dot

_LINE = 16  # float32 values of a cache line
# Operations of a tile's epilogue up to which it is written out for every position.
_UNROLLED_EPILOGUE = 2000

# What `_cycles` estimates with, in cycles of a core that starts one multiply-add of 16 float32 a
# cycle (measured on Zen 4).
_LANES = 16
_TRANSFORM = 6  # for each place of a tile and 16 channels, each way
_TRANSFORM_WEIGHT = 4  # for each place, channel and 16 output channels
_STREAM = 0.25  # for each row of data or weights that a step reads
_LATENCY = 5  # of a multiply-add, and a little
_TILE = 30  # what a register tile costs outside its reduction loop
_FETCHED_BYTES = 16  # a cycle from the second-level cache between multiply-adds
_SHARED_BYTES = 10  # a cycle from the third-level cache
_UNHIDDEN = 0.5  # of the time for that, what multiply-adds do not hide
# Every thread transforms weights or reads what another one has transformed: below this many
# multiply-adds of the direct form two threads take up to twice as long as one (8x8x64: 58, 24 us).
_PARALLEL_MACS = 12_000_000
_LAUNCH = 7_000  # cycles of handing work to threads, which the direct form needs
# What the direct kernel has to lose by.
_MARGIN = 0.9
# Positions of a register tile; more read too many rows at once.
_LARGEST_SIDE = 14
_LARGEST_DEFAULT = 8


def winograd_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> _WinogradKernel | None:
    """A 3x3 convolution; None: not applicable, or it would be slower than the direct kernel."""
    if choice is not None and "outputs" not in choice:
        return None  # one of the direct kernel
    dot_of = partial(_dot_of, target=target)
    layer = read_layer(fused, target, choice, (Conv2dSpec,), dot_of, find_operands, Epilogue)
    dot = None if layer is None else dot_of(layer.spec)
    if layer is None or dot is None:
        return None
    kernel = _WinogradKernel(layer, dot)
    return kernel if choice is not None or kernel.pays else None


def _dot_of(spec: Conv2dSpec, target: Target) -> Dot | None:
    packed = spec.packed_layout
    if packed is None or packed.axis != "R" or packed.group != 1 or not is_applicable(spec):
        return None
    return select_dot(spec, target, packed.width)


def is_applicable(spec: Conv2dSpec) -> bool:
    """Whether the sum is of float32 weights over 3x3 neighbours."""
    return (
        spec.data_dtype == spec.weight_dtype == "float32"
        and (spec.kernel, spec.strides, spec.dilation) == ((3, 3), (1, 1), (1, 1))
        and spec.groups == 1
        and min(spec.out_height, spec.out_width) >= min(POINTS)
    )


@dataclass(frozen=True)
class _Blocking:
    """How the work is cut."""

    outputs: int
    """Outputs along one side of a tile."""
    band: int
    """Rows of tiles of a task."""
    parts: int
    """Tasks that share a band; each transforms it and computes its part of the channels."""
    positions: int
    """Tiles of a register tile."""
    vectors: int
    """Registers of output channels of a register tile."""
    early: int
    """1: weights are transformed before all tasks; 0: by each, one group of channels at a time."""
    unroll: int = 1

    @property
    def side(self) -> int:
        """Inputs, and places of the transform, along one side of a tile."""
        return side(self.outputs)

    @property
    def places(self) -> int:
        """Places of a transformed tile."""
        return self.side**2

    @staticmethod
    def of(choice: Choice) -> _Blocking:
        """What a choice says."""
        return _Blocking(**choice)


class _WinogradKernel(LayerKernel[Conv2dSpec, Operands, Epilogue]):
    """One function being written."""

    def __init__(self, layer: Layer[Conv2dSpec, Operands, Epilogue], dot: Dot) -> None:
        super().__init__(layer)
        spec, target, choice = layer.spec, layer.target, layer.choice
        self.dot, self.lanes = dot, dot.lanes
        self.window = window_of(spec)
        self.blocks = ceil_div(self.window.out_channels, self.lanes)
        # Places of the transformed data lie at such distances (in values).
        self.place_pitch = _unaliased(self.window.channels)
        self.parallel = target.threads > 1 and spec.macs >= _PARALLEL_MACS
        self.threads = target.threads if self.parallel else 1
        self.blocking = self._choose_blocking() if choice is None else _Blocking.of(choice)
        direct = not any(self.window.padding) and layer.operands.data not in layer.fused.producers
        self.band = Band(
            self.window,
            not direct,
            spec.data_dtype,
            dot.data_dtype,
            dot.convert,
            dot.convert_constant(spec.pad_value, spec.data_dtype),
            self.window.channels,
        )
        self.e = Emitter()

    # Decisions

    @property
    def pays(self) -> bool:
        """Whether the direct kernel is estimated to be slower by more than a margin."""
        window, width = self.window, self.lanes / _LANES
        threads = self.target.threads if self.spec.macs >= PARALLEL_MACS else 1
        products = window.positions * 9 * window.channels * self.blocks * width / threads
        launch = _LAUNCH if threads > self.threads else 0
        return self._cycles(self.blocking) < _MARGIN * (products + launch)

    def _tile_rows(self, outputs: int) -> int:
        return ceil_div(self.window.rows, outputs)

    def _tile_columns(self, outputs: int) -> int:
        return ceil_div(self.window.columns, outputs)

    def _tile_pitch(self, blocking: _Blocking) -> int:
        """Distance of two tiles of the transformed data (in values)."""
        return _unaliased(blocking.places * self.place_pitch)

    def _blockings(self) -> Iterator[_Blocking]:
        """Candidates of the default, none of which computes a band's rows twice."""
        for outputs in self._sizes():
            rows = self._tile_rows(outputs)
            for band in {ceil_div(rows, count) for count in range(1, rows + 1)}:
                for parts in {1, self.threads}:
                    yield from self._register_tiles(outputs, band, parts)

    def _register_tiles(self, outputs: int, band: int, parts: int) -> Iterator[_Blocking]:
        tiles = band * self._tile_columns(outputs)
        most = _LARGEST_DEFAULT if self.blocks > 1 else _LARGEST_SIDE
        for vectors in range(1, min(self.blocks, 4) + 1):
            if parts > 1 and parts > ceil_div(self.blocks, vectors):
                continue
            for positions in range(1, min(tiles, most) + 1):
                for early in (0, 1):
                    blocking = _Blocking(outputs, band, parts, positions, vectors, early)
                    if self._used(blocking) <= self.target.vector_registers:
                        yield blocking

    def _sizes(self) -> tuple[int, ...]:
        """Outputs along one side of a tile that fit into the image."""
        shorter = min(self.window.rows, self.window.columns)
        return tuple(outputs for outputs in sorted(POINTS) if outputs <= shorter)

    def _choose_blocking(self) -> _Blocking:
        return min(self._blockings(), key=self._cycles)

    def _used(self, blocking: _Blocking) -> int:
        """Registers of a register tile."""
        spare = 1 if self.dot.fused else 2
        return blocking.positions * blocking.vectors + blocking.vectors + spare

    def _cycles(self, blocking: _Blocking) -> float:
        """What the last thread to finish needs, roughly."""
        window, target, places = self.window, self.target, blocking.places
        width, vectors = self.lanes / _LANES, blocking.vectors
        tiles = blocking.band * self._tile_columns(blocking.outputs)
        groups = ceil_div(ceil_div(self.blocks, vectors), blocking.parts)
        bands = window.batch * ceil_div(self._tile_rows(blocking.outputs), blocking.band)
        # The products of a place. Its weights stay in the first-level cache for all tiles of the
        # task, or come from the next one for every register tile.
        weight = 4 * window.channels * vectors * self.lanes
        fetch = 0.0
        if weight > target.l1_bytes * 3 // 4:
            fetch = 4 * vectors * self.lanes / _FETCHED_BYTES
        accumulators = blocking.positions * vectors
        step = max(accumulators * width, _LATENCY, fetch)
        step += _STREAM * (blocking.positions + vectors)
        products = ceil_div(tiles, blocking.positions) * (
            window.channels * step + _TILE + accumulators
        )
        # Transforms, and what the second-level cache does not hold of their results.
        parts_of_channels = len(vector_parts(window.channels, self.lanes))
        transforms = _TRANSFORM * tiles * width * (parts_of_channels + groups * vectors)
        filters = _TRANSFORM_WEIGHT * window.channels * width * vectors
        data = 4 * tiles * self._tile_pitch(blocking)
        held = 4 * tiles * places * vectors * self.lanes + (
            0 if blocking.early else weight * places
        )
        room = target.l2_bytes * 3 // 4
        moved = groups * max(0, min(data, data + held - room))
        whole = 4 * places * window.channels * self.blocks * self.lanes
        if blocking.early:
            once = places * filters * ceil_div(self.blocks, vectors) / self.threads
            from_cache = whole <= room - min(data, room // 2)
            moved += 0 if from_cache else groups * places * weight
            once += 0 if from_cache else whole / _SHARED_BYTES / self.threads
        else:
            once = 0.0
            transforms += groups * filters
            moved += 2 * groups * max(0, places * weight - room)
        task = places * (groups * products + transforms) + _UNHIDDEN * moved / _SHARED_BYTES
        return once + ceil_div(bands * blocking.parts, self.threads) * task

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        default = {name: getattr(self.blocking, name) for name in _Blocking.__dataclass_fields__}
        registers = self.target.vector_registers
        rows = self._tile_rows(self.blocking.outputs)
        bands = {ceil_div(rows, count) for count in (1, 2, 3, 4, 6, 8, 16)}

        def is_valid(choice: Choice) -> bool:
            blocking = _Blocking.of(choice)
            used = self._used(blocking)
            return (
                used <= registers
                and 2 * used >= registers  # fewer accumulators never pay
                and blocking.band <= self._tile_rows(blocking.outputs)
                and blocking.positions <= blocking.band * self._tile_columns(blocking.outputs)
                and blocking.parts <= ceil_div(self.blocks, blocking.vectors)
            )

        return SearchSpace(
            "x86.winograd",
            {
                "outputs": self._sizes(),
                "band": tuple(sorted({*bands, self.blocking.band})),
                "parts": tuple(sorted({1, self.threads})),
                "positions": tuple(range(1, _LARGEST_SIDE + 1)),
                "vectors": tuple(range(1, min(self.blocks, 6) + 1)),
                "early": (0, 1),
                "unroll": (1, 2),
            },
            default,
            is_valid,
        )

    # Writing

    def build(self) -> tirx.PrimFunc:
        e, window, blocking = self.e, self.window, self.blocking
        band, parts, vectors = blocking.band, blocking.parts, blocking.vectors
        self.tile_rows = self._tile_rows(blocking.outputs)
        self.tile_columns = self._tile_columns(blocking.outputs)
        self.tile_pitch = self._tile_pitch(blocking)
        self.weight = e.flat(self.operands.weight)
        self.reader = BandReader(e, self.band, self.fused, self.operands, self.target)
        self.epilogue.declare(e)
        kind = "parallel" if self.parallel else "serial"
        self.filter_pitch = _unaliased(window.channels * self.lanes)
        per_block = blocking.places * self.filter_pitch
        if blocking.early:
            weights = e.alloc(self.blocks * per_block, "float32", "filters")
            with e.loop("filter_block", self.blocks, kind) as number:
                self._transform_weight(weights, number * per_block, number)
        bands = ceil_div(self.tile_rows, band)
        rows = min(band * blocking.outputs, window.rows)
        groups = ceil_div(self.blocks, vectors)
        each = ceil_div(groups, parts)
        tiles = band * self.tile_columns
        with e.loop("task", window.batch * bands * parts, kind) as task:
            part, rest = task % parts, task // parts
            b = rest // bands
            # Bands and parts that overlap compute the same tiles, so the same values.
            first = e.bind("first", tirx.min(rest % bands * band, self.tile_rows - band))
            y = e.bind("y", tirx.min(first * blocking.outputs, window.rows - rows))
            source = self.reader.source(b, y, rows, 0)
            data = e.alloc(tiles * self.tile_pitch, "float32", "transformed")
            self._transform(data, source, first, y)
            size = tiles * blocking.places * vectors * self.lanes
            products = e.alloc(size, "float32", "products")
            if not blocking.early:
                weights = e.alloc(vectors * per_block, "float32", "filters")
            with e.loop("channel_group", each) as j:
                group = tirx.min(part * each, groups - each) + j
                block = e.bind("block", tirx.min(group * vectors, self.blocks - vectors))
                if not blocking.early:
                    with e.loop("filter_block", vectors) as v:
                        self._transform_weight(weights, v * per_block, block + v)
                self._multiply(products, data, weights, block if blocking.early else 0)
                self._finish(products, b, first, block)
        self.epilogue.emit_rest(e, self.lanes)
        return e.function(list(self.fused.func.params), {})

    def _transform_weight(self, weights: tirx.Buffer, to: Any, block: Any) -> None:
        """weights[to..][place, channel, lane] = G g G', for one register of output channels."""
        e, lanes, channels, n = self.e, self.lanes, self.window.channels, self.blocking.side
        matrix = weight_matrix(self.blocking.outputs)
        with e.loop("c", channels) as c:
            start = e.bind("start", (block * 9 * channels + c) * lanes)
            target = e.bind("to", to + c * lanes)
            columns = []
            for kx in range(3):
                taps = []
                for ky in range(3):
                    at = start + (ky * 3 + kx) * channels * lanes
                    taps.append(e.bind("g", vector(self.weight, at, lanes)))
                columns.append(self._apply(matrix, taps, lanes))
            for i in range(n):
                row = self._apply(matrix, [column[i] for column in columns], lanes)
                for j, value in enumerate(row):
                    at = target + (i * n + j) * self.filter_pitch
                    e.store_vector(weights, value, at, lanes)

    def _tiles(self, first: Any, write: Callable[[Any, Any, Any, Any], None]) -> None:
        """write(number in the band, row of tiles, y, x) for all tiles of the band."""
        e, window, outputs = self.e, self.window, self.blocking.outputs
        with e.loop("tile_row", self.blocking.band) as ty:
            y = e.bind("tile_y", tirx.min((first + ty) * outputs, window.rows - outputs))
            with e.loop("tile_column", self.tile_columns) as tx:
                x = e.bind("tile_x", tirx.min(tx * outputs, window.columns - outputs))
                write(e.bind("tile", ty * self.tile_columns + tx), first + ty, y, x)

    def _transform(self, data: tirx.Buffer, source: Source, first: Any, y: Any) -> None:
        """data[tile, place, channel] = B' d B"""
        e, side = self.e, self.blocking.side
        matrix = data_matrix(self.blocking.outputs)

        def tile(number: Any, _row: Any, tile_y: Any, tile_x: Any) -> None:
            start = source.base + (tile_y - y) * source.row_pitch + tile_x * source.column_pitch
            start = e.bind("start", start)
            to = e.bind("to", number * self.tile_pitch)
            for c, width in e.chunks(self.window.channels, self.lanes):
                columns = []
                for j in range(side):
                    at = start + j * source.column_pitch + c
                    loaded = [
                        e.bind("d", vector(source.buffer, at + i * source.row_pitch, width))
                        for i in range(side)
                    ]
                    columns.append(self._apply(matrix, loaded, width))
                for i in range(side):
                    row = self._apply(matrix, [column[i] for column in columns], width)
                    for j, value in enumerate(row):
                        place = to + (i * side + j) * self.place_pitch + c
                        e.store_vector(data, value, place, width)

        self._tiles(first, tile)

    def _multiply(
        self, products: tirx.Buffer, data: tirx.Buffer, weights: tirx.Buffer, block: Any
    ) -> None:
        """products[tile, place, vector, lane] = sum over the channels of data * weight"""
        e, lanes, channels, dot = self.e, self.lanes, self.window.channels, self.dot
        places, vectors = self.blocking.places, self.blocking.vectors
        positions = self.blocking.positions
        count = self.blocking.band * self.tile_columns
        with (
            e.loop("place", places) as place,
            e.loop("tile_group", ceil_div(count, positions)) as group,
        ):
            tile = e.bind("tile", tirx.min(group * positions, count - positions))
            start = e.bind("start", tile * self.tile_pitch + place * self.place_pitch)
            acc = e.alloc(positions * vectors * lanes, "float32", "acc", registers=True)
            for i in range(positions * vectors):
                e.store_vector(acc, _constant(0, lanes), i * lanes, lanes)

            def step(k: Any) -> None:
                loaded = []
                for v in range(vectors):
                    at = ((block + v) * places + place) * self.filter_pitch + k * lanes
                    loaded.append(e.bind(f"w{v}", vector(weights, at, lanes)))
                for p in range(positions):
                    x = e.bind("x", dot.broadcast(data[start + p * self.tile_pitch + k]))
                    for v, weight in enumerate(loaded):
                        at = (p * vectors + v) * lanes
                        value = dot.accumulate(vector(acc, at, lanes), x, weight)
                        e.store_vector(acc, value, at, lanes)

            e.unrolled("k", channels, self.blocking.unroll, step)
            for p in range(positions):
                for v in range(vectors):
                    to = (((tile + p) * places + place) * vectors + v) * lanes
                    value = vector(acc, (p * vectors + v) * lanes, lanes)
                    e.store_vector(products, value, to, lanes)

    def _finish(self, products: tirx.Buffer, b: Any, first: Any, block: Any) -> None:
        """Every tile through A' M A, in registers, and the epilogue."""
        e, window, lanes, blocking = self.e, self.window, self.lanes, self.blocking
        outputs, side, vectors = blocking.outputs, blocking.side, blocking.vectors
        matrix = output_matrix(outputs)
        ragged = window.out_channels % lanes
        copies = outputs**2 * (2 if ragged and self.blocks > 1 else 1)
        unrolled = copies * self.epilogue.size <= _UNROLLED_EPILOGUE

        def tile(number: Any, tile_row: Any, y: Any, x: Any) -> None:
            with e.loop("v", vectors) as v:
                start = e.bind("start", (number * blocking.places * vectors + v) * lanes)
                columns = []
                for j in range(side):
                    loaded = []
                    for i in range(side):
                        at = start + (i * side + j) * vectors * lanes
                        loaded.append(e.bind("m", vector(products, at, lanes)))
                    columns.append(self._gather(matrix, loaded))
                result = e.alloc(outputs**2 * lanes, "float32", "result", registers=True)
                for i in range(outputs):
                    row = self._gather(matrix, [column[i] for column in columns])
                    for j, value in enumerate(row):
                        e.store_vector(result, value, (i * outputs + j) * lanes, lanes)

                def positions(parts: list[tuple[int, int]]) -> None:
                    for i in e.each("i", outputs, unrolled):
                        if window.rows % outputs == 0:
                            one_row(i, parts)
                            continue
                        # What the tiles above have written, perhaps in another task, stays: the
                        # same sums, other roundings.
                        with e.when(y + i >= tile_row * outputs):
                            one_row(i, parts)

                def one_row(i: Any, parts: list[tuple[int, int]]) -> None:
                    for j in e.each("j", outputs, unrolled):
                        for offset, width in parts:
                            self.epilogue.emit(
                                e,
                                partial(window.indices, b, y + i, x + j),
                                (b * window.rows + y + i) * window.columns + x + j,
                                (block + v) * lanes + offset,
                                width,
                                partial(_element, result, (i * outputs + j) * lanes + offset),
                            )

                e.ragged(block + v, self.blocks, ragged, lanes, positions)

        self._tiles(first, tile)

    # Transforms of a row of vectors

    def _apply(self, matrix: np.ndarray, values: Sequence[Any], lanes: int) -> list[Any]:
        """B' @ values, or G @ values. The rows of the points p and -p are the sum and the
        difference of what their even columns and their odd columns give."""
        results = [self._sum(_terms(matrix[0], values), lanes)]
        for row in matrix[1:-1:2]:
            even, odd = _terms(row[::2], values[::2]), _terms(row[1::2], values[1::2])
            leading = odd[-1][0]
            total = self._sum(even, lanes)
            rest = self._sum([(factor / leading, value) for factor, value in odd], lanes)
            results += [self._sum([(1.0, total), (s * leading, rest)], lanes) for s in (1, -1)]
        return [*results, self._sum(_terms(matrix[-1], values), lanes)]

    def _gather(self, matrix: np.ndarray, values: Sequence[Any]) -> list[Any]:
        """A' @ values: sums and differences of the pairs of points first."""
        lanes = self.lanes
        pairs = list(zip(values[1:-1:2], values[2:-1:2], strict=True))
        sums = [self._sum([(1.0, a), (1.0, b)], lanes) for a, b in pairs]
        differences = [self._sum([(1.0, a), (-1.0, b)], lanes) for a, b in pairs]
        results = []
        for i, row in enumerate(matrix):
            folded = [row[0], *row[1:-1:2], row[-1]]
            halves = differences if i % 2 else sums
            results.append(self._sum(_terms(folded, [values[0], *halves, values[-1]]), lanes))
        return results

    def _sum(self, terms: Sequence[tuple[float, Any]], lanes: int) -> Any:
        """The sum of factor * value."""
        # Those of factor 1 first, so that each other one is a single multiply-add.
        ordered = sorted(terms, key=lambda term: (term[0] != 1, term[0] != -1))
        factor, total = ordered[0]
        if factor != 1:
            total = total * _constant(factor, lanes)
        for factor, value in ordered[1:]:
            if factor == 1:
                total = total + value
            elif factor == -1:
                total = total - value
            elif self.dot.fused and lanes > 1:
                total = tirx.call_llvm_pure_intrin(
                    f"float32x{lanes}",
                    f"llvm.fma.v{lanes}f32",
                    value,
                    _constant(factor, lanes),
                    total,
                )
            else:
                total = total + value * _constant(factor, lanes)
        return self.e.bind("t", total)


def _terms(row: Sequence[float], values: Sequence[Any]) -> list[tuple[float, Any]]:
    """The factors other than 0, with their values."""
    return [(float(factor), value) for factor, value in zip(row, values, strict=True) if factor]


def _constant(value: float, lanes: int) -> ir.Expr:
    constant = tirx.const(value, "float32")
    return constant if lanes == 1 else tirx.Broadcast(constant, lanes)


def _unaliased(pitch: int) -> int:
    """`pitch` float32 values, or a cache line more where values at such distances share few sets of
    the first-level cache."""
    return pitch + (_LINE if 4 * pitch % ALIASED_BYTES == 0 else 0)


def _element(buffer: tirx.Buffer, start: Any, lane: Any) -> ir.Expr:
    return buffer[start + lane]
