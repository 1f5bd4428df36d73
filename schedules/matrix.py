"""Convolution, transposed convolution and linear layers: one register-tiled kernel.

Order of loops, from the outside: tasks (batch, bands of output rows, perhaps groups of output
channels; in parallel), the copy of the band's input with its border, groups of output channels,
tiles of positions, the reduction. One tile is `Tile.positions` outputs by `Tile.vectors` registers
of channels, held in registers over the whole reduction, then put through the epilogue. Ragged ends
are covered by moving the last tile back inside, so that there is one tile shape only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

from tvm import ir, tirx

from ..targets import Target
from .band import Band, BandReader, Source
from .choice import Choice, SearchSpace
from .dot import Dot, FloatDot
from .emit import Emitter, dtype_bits, vector, vector_parts
from .epilogue import Epilogue
from .fused import FusedFunction
from .layer_kernel import Layer, LayerKernel, read_layer
from .layout import PackedLayout
from .operands import Operands, find_operands
from .pitch import ALIASED_BYTES
from .spec import Conv2dSpec, Conv2dTransposeSpec, MatmulSpec, WeightedSpec, ceil_div
from .tile import Tile
from .window import window_of

# Handing work to the awake thread pool and waiting for it costs 1.5-2 us (measured): below this
# many multiply-adds (8 us of float; a byte dot does four times as many in the time) a layer stays
# on one thread.
PARALLEL_MACS = 400_000
# Weights from memory at 25 GB/s take as long: a second core reads with its own prefetchers.
_PARALLEL_BYTES = 200_000
# Bytes of input that a cycle copies.
_COPIED_BYTES = 32
# Operations of a whole tile's epilogue up to which it is written out: the accumulators then go
# through it in registers, otherwise through the stack. A matter of compile time.
_UNROLLED_EPILOGUE = 2000
# Input of one task: half of the second-level cache, or more where the weights do not fit there
# anyway, since they are read once for every task.
_BAND_SHARE_OF_L2 = 2
_BAND_SHARE_OF_WEIGHTS = 4
# Rows of a tile that may lie at a multiple of 2 KiB from one another: ways of a first-level cache.
_SAFE_ROWS = 6


# Longer chains gain little more and need more registers (measured).
_DEFAULT_CHAIN = 4
# Sides of a tile that tuning tries.
_LARGEST_SIDE = 14

MatrixSpec = Conv2dSpec | Conv2dTransposeSpec | MatmulSpec
MatrixLayer = Layer[MatrixSpec, Operands, Epilogue]
_Written = TypeVar("_Written", bound="MatrixKernel")


def matrix_kernel_as(
    kernel: type[_Written],
    takes: Callable[[MatrixSpec, Dot, Target], bool],
    fused: FusedFunction,
    target: Target,
    choice: Choice | None,
) -> _Written | None:
    """The function as a `kernel`, where it is an anchor whose weight that class `takes`; else
    None."""

    def dot_of(spec: MatrixSpec) -> Dot | None:
        packed, window = spec.packed_layout, window_of(spec)
        if packed is None or packed.axis == "K":
            return None
        if packed.axis == "R" and (window.groups > 1 or window.turned):
            return None
        dot = kernel.select_dot(spec, target, packed)
        if dot is None or dot.group != packed.group or not takes(spec, dot, target):
            return None
        return dot

    specs = (Conv2dSpec, Conv2dTransposeSpec, MatmulSpec)
    layer: MatrixLayer | None = read_layer(
        fused, target, choice, specs, dot_of, find_operands, kernel.epilogue_type
    )
    dot = None if layer is None else dot_of(layer.spec)
    return None if layer is None or dot is None else kernel(layer, dot)


def takes_weight(spec: MatrixSpec, dot: Dot, _target: Target) -> bool:
    """Whether the kernel can read the layer's codes: those in groups or of four bits only with
    floats, and where a step of the reduction follows the other."""
    if spec.table_channels or (spec.group_size and spec.is_integer):
        return False
    window = window_of(spec)
    row_terms = window.kernel[1] * window.channels
    if spec.group_size and not (
        window.kernel == (1, 1) and window.groups == 1 and not isinstance(spec, Conv2dTransposeSpec)
    ):
        return False
    return spec.weight_dtype != "int4" or (
        isinstance(dot, FloatDot)
        and row_terms == spec.reduction_size
        and window.groups == 1
        and not (spec.group_size and spec.group_size % 2 and spec.group_size < row_terms)
    )


class MatrixKernel(LayerKernel[MatrixSpec, Operands, Epilogue]):
    """One function being written; instruction sets say by which dots and in what tiles."""

    name: ClassVar[str] = ""
    epilogue_type: ClassVar[type[Epilogue]] = Epilogue
    """How the stages behind the anchor are written."""

    @staticmethod
    def select_dot(spec: WeightedSpec, target: Target, packed: PackedLayout) -> Dot | None:
        """The dot for a layer whose weight is packed so; None: no form is exact for it."""
        raise NotImplementedError

    def __init__(self, layer: MatrixLayer, dot: Dot) -> None:
        super().__init__(layer)
        spec, target, choice = layer.spec, layer.target, layer.choice
        self.window = window = window_of(spec)
        self.dot = dot
        packed = spec.packed_layout
        assert packed is not None
        self.packed = packed
        self.lanes = dot.lanes
        self.steps = packed.steps(spec.reduction)
        self.blocks = ceil_div(window.out_channels, self.lanes)
        # The correction for x + offset: known before the tiles, or summed beside them if there is
        # one only.
        self.corrected = dot.offset(spec.data_dtype) != 0
        self.acc_dtype = spec.acc_dtype
        weight_bytes = math.prod(spec.weight_shape) * dtype_bits(spec.weight_storage_dtype) // 8
        cache_bytes = max(
            target.l2_bytes // _BAND_SHARE_OF_L2, weight_bytes // _BAND_SHARE_OF_WEIGHTS
        )
        self.parallel = target.threads > 1 and (
            self._macs >= PARALLEL_MACS * dot.speed or weight_bytes >= _PARALLEL_BYTES
        )
        self.chain = max(chain for chain in self._chains() if chain <= _DEFAULT_CHAIN)
        self.tile, self.rows, self.parts = self._partition(cache_bytes)
        self.unroll = self._unrolling()
        # A tile of all channels is written while its input is in the nearest cache, if the weights
        # stay in the next one.
        self.data_outside = window.columns == 1 and weight_bytes <= target.l2_bytes // 2
        if choice is not None:
            self.chain = choice.get("chain", 1)
            self.tile = _tile_of(choice)
            self.rows = max(self.tile.rows, min(window.rows, choice["band"]))
            self.parts = min(choice.get("parts", 1), self.blocks)
            self.unroll = choice["unroll"]
            self.data_outside = bool(choice["data_outside"])
        self.band = self._choose_band(self.tile)
        self.e = Emitter()

    # Decisions

    def _spare_registers(self) -> int:
        """Registers besides those of accumulators and weights."""
        raise NotImplementedError

    def _unrolling(self) -> int:
        """Steps written out in a turn of the innermost loop."""
        raise NotImplementedError

    def _chains(self) -> tuple[int, ...]:
        """Lengths of a chain that tuning tries."""
        return tuple(range(1, self.dot.chain + 1))

    def _fastest_tile(self, rows: int, blocks: int) -> tuple[Tile, float]:
        """For that many output rows and registers of channels; and its cycles."""
        raise NotImplementedError

    def _registers(self, tile: Tile) -> int:
        """Registers that a tile needs."""
        return tile.positions * tile.vectors + tile.vectors + self._spare_registers()

    def _partition(self, cache_bytes: int) -> tuple[Tile, int, int]:
        """Tile, rows of a band and parts of the output channels, for the least cycles of the
        busiest thread.

        Threads take equal runs of tasks. Parts of the channels leave a thread part of the weights
        to read, and halve no ragged number of rows, but each copies the input.
        """
        window, threads = self.window, self.target.threads if self.parallel else 1
        outer = window.batch * window.groups
        least = ceil_div(window.rows, self._choose_band(Tile(1, 1, 1)).most_rows(cache_bytes))
        best: tuple[float, Tile, int, int] | None = None
        for parts in sorted({1, min(threads, self.blocks)}):
            for bands in range(least, min(window.rows, least + 2 * threads - 1) + 1):
                rows = ceil_div(window.rows, bands)
                tile, cycles = self._fastest_tile(rows, ceil_div(self.blocks, parts))
                band = self._choose_band(tile)
                if band.copied:
                    cycles += band.bytes(rows) / _COPIED_BYTES
                tasks = outer * ceil_div(window.rows, rows) * parts
                cycles *= ceil_div(tasks, threads)
                if best is None or cycles < best[0]:
                    best = cycles, tile, rows, parts
        assert best is not None
        return best[1:]

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        window, registers = self.window, self.target.vector_registers
        threads = self.target.threads if self.parallel else 1
        sides = tuple(range(1, _LARGEST_SIDE + 1))
        default = {
            "rows": self.tile.rows,
            "columns": self.tile.columns,
            "vectors": self.tile.vectors,
            "band": self.rows,
            "parts": self.parts,
            "unroll": self.unroll,
            "data_outside": int(self.data_outside and self.blocks > 1),
        }
        parameters: dict[str, tuple[int, ...]] = {}
        if self.dot.is_chained:
            default["chain"] = self.chain
            parameters["chain"] = self._chains()

        def is_valid(choice: Choice) -> bool:
            tile = _tile_of(choice)
            used = self._registers(tile)
            return (
                used <= registers
                and 2 * used >= registers  # fewer accumulators never pay
                and tile.rows <= choice["band"] <= window.rows
            )

        return SearchSpace(
            self.name,
            {
                "rows": tuple(side for side in sides if side <= window.rows),
                "columns": tuple(side for side in sides if side <= window.columns),
                "vectors": tuple(range(1, min(self.blocks, 6) + 1)),
                "band": self.band.choices(self.rows),
                "parts": tuple(sorted({1, self.parts, min(threads, self.blocks)})),
                "unroll": (1, 2, 4),
                "data_outside": (0, 1) if self.blocks > 1 else (0,),
                **parameters,
            },
            default,
            is_valid,
        )

    def _choose_band(self, tile: Tile) -> Band:
        """Copied when there is a border, a conversion, padded channels, skipped columns or a
        producer."""
        window, dot, spec = self.window, self.dot, self.spec
        direct = (
            not any(window.padding)
            and not window.turned
            and spec.data_dtype == dot.data_dtype
            and self.operands.data not in self.fused.producers
        )
        if window.columns == 1:
            # Few outputs a row repay no copy; many rows at an unlucky distance do.
            row_bytes = window.channels * window.groups * dtype_bits(dot.data_dtype) // 8
            direct &= row_bytes % (2 * ALIASED_BYTES) != 0 or tile.rows <= _SAFE_ROWS
        group_pitch = window.channels
        if self.packed.axis == "R":
            # Otherwise the last step of the last row would read behind the end of the input.
            direct &= window.kernel[1] * window.channels % dot.group == 0
        else:
            group_pitch = ceil_div(window.channels, dot.group) * dot.group
            direct &= group_pitch == window.channels
        pad_value = 0 if isinstance(spec, MatmulSpec) else spec.pad_value
        return Band(
            window,
            not direct,
            spec.data_dtype,
            dot.data_dtype,
            dot.convert,
            dot.convert_constant(pad_value, spec.data_dtype),
            group_pitch,
            slack=4 * dot.group,
        )

    @property
    def _macs(self) -> int:
        window = self.window
        return window.positions * window.out_channels * window.groups * self.spec.reduction_size

    # Writing

    def build(self) -> tirx.PrimFunc:
        e, window, tile = self.e, self.window, self.tile
        self.weight = e.flat(self.operands.weight)
        self.reader = BandReader(e, self.band, self.fused, self.operands, self.target)
        self.epilogue.declare(e)
        bands = ceil_div(window.rows, self.rows)
        channel_groups = ceil_div(self.blocks, tile.vectors)
        tiles_per_weight = ceil_div(window.rows, tile.rows) * ceil_div(window.columns, tile.columns)
        self.correct_inside = self._corrects_inside(window.batch * tiles_per_weight)
        if self.corrected and not self.correct_inside:
            self.correction = self._correction()
        tasks = window.batch * bands * window.groups
        share = ceil_div(channel_groups, self.parts)
        parts = ceil_div(channel_groups, share)
        kind = "parallel" if self.parallel else "serial"
        with e.loop("task", tasks * parts, kind) as task:
            rest = task % tasks
            first_group = tirx.min(task // tasks * share, channel_groups - share)
            group = rest % window.groups
            b = rest // window.groups // bands
            y = tirx.min(rest // window.groups % bands * self.rows, window.rows - self.rows)
            y = e.bind("y", y)
            source = self.reader.source(b, y, self.rows, group)
            self._tiles(e.bind("first_group", first_group), share, source, b, y, group)
        self.epilogue.emit_rest(e, self.lanes)
        return e.function(list(self.fused.func.params), {})

    def _corrects_inside(self, tiles: int) -> bool:
        """Whether the correction is summed beside the products of the `tiles` of each weight."""
        return self.corrected and tiles == 1

    def _correction(self) -> tirx.Buffer:
        """-offset * sum(w) for every output channel."""
        e, lanes = self.e, self.lanes
        blocks = self.window.groups * self.blocks
        buffer = e.alloc(blocks * lanes, "int32", "correction")
        per_loop = next(n for n in (8, 4, 3, 2, 1) if blocks % n == 0)
        with e.loop("block", blocks // per_loop) as outer:
            sums = e.alloc(per_loop * lanes, "int32", "sums", registers=True)
            for v in range(per_loop):
                e.store_vector(sums, self._zero(), v * lanes, lanes)
            size = lanes * self.dot.group
            with e.loop("step", self.steps) as step:
                for v in range(per_loop):
                    start = ((outer * per_loop + v) * self.steps + step) * size
                    weight = vector(self.weight, start, size)
                    old = vector(sums, v * lanes, lanes)
                    e.store_vector(
                        sums, self.dot.accumulate(old, self._offset(), weight), v * lanes, lanes
                    )
            for v in range(per_loop):
                value = self._zero() - vector(sums, v * lanes, lanes)
                e.store_vector(buffer, value, (outer * per_loop + v) * lanes, lanes)
        return buffer

    def _offset(self) -> ir.Expr:
        dot = self.dot
        offset = tirx.const(dot.offset(self.spec.data_dtype), dot.data_dtype)
        return tirx.Broadcast(offset, dot.group * self.lanes)

    def _zero(self) -> ir.Expr:
        return tirx.Broadcast(tirx.const(0, self.dot.acc_dtype), self.lanes)

    def _tiles(
        self, first: Any, channel_groups: int, source: Source, b: Any, y: Any, group: Any
    ) -> None:
        """All tiles of the band: for every group of output channels from `first` on (its weights
        stay in the cache), or every group for each tile (its input does)."""
        e, window, tile = self.e, self.window, self.tile

        def place(j: Any) -> Any:
            block = tirx.min((first + j) * tile.vectors, self.blocks - tile.vectors)
            return e.bind("block", block)

        def positions(write: Callable[[Any, Any], None]) -> None:
            with e.loop("tile_row", ceil_div(self.rows, tile.rows)) as ty:
                dy = e.bind("dy", tirx.min(ty * tile.rows, self.rows - tile.rows))
                with e.loop("tile_column", ceil_div(window.columns, tile.columns)) as tx:
                    limit = window.columns - tile.columns
                    write(dy, e.bind("x", tirx.min(tx * tile.columns, limit)))

        def one(block: Any, dy: Any, x: Any) -> None:
            self._tile(block, source, b, y, dy, x, group)

        if self.data_outside:

            def all_channels(dy: Any, x: Any) -> None:
                with e.loop("channel_group", channel_groups) as j:
                    one(place(j), dy, x)

            positions(all_channels)
        else:
            with e.loop("channel_group", channel_groups) as j:
                positions(partial(one, place(j)))

    def _tile(
        self, block: Any, source: Source, b: Any, y: Any, dy: Any, x: Any, group: Any
    ) -> None:
        e, tile = self.e, self.tile
        count = tile.positions * tile.vectors * self.lanes
        result = e.alloc(count, self.acc_dtype, "tile", registers=True)
        start = source.base + dy * source.step[0] + x * source.step[1]
        self._reduce(result, source, e.bind("start", start), group * self.blocks + block)
        self._finish(result, b, y + dy, x, group, block)

    def _reduce(self, result: tirx.Buffer, source: Source, start: Any, block: Any) -> None:
        """result[position, vector, lane] = sum over the reduction."""
        e, tile, lanes, dot = self.e, self.tile, self.lanes, self.dot
        count = tile.positions * tile.vectors
        acc = e.alloc(self._sums(), dot.acc_dtype, "acc", registers=True)
        inside = None
        if self.correct_inside:
            inside = e.alloc(tile.vectors * lanes, "int32", "correction", registers=True)
        chunk = self._chunk()
        nest = self._nest(source)
        flushes = chunk is not None
        if flushes:
            zero = tirx.Broadcast(tirx.const(0, self.acc_dtype), lanes)
            for i in range(count):
                e.store_vector(result, zero, i * lanes, lanes)
        else:
            self._start(acc, inside, block)

        def walk(level: int, data: Any, step: Any) -> None:
            extent, data_stride, step_stride = nest[level]
            if level < len(nest) - 1:
                with e.loop(f"k{level}", extent) as k:
                    walk(level + 1, data + k * data_stride, step + k * step_stride)
                return
            if not flushes:
                self._run(acc, inside, source, start, block, data, step, extent, data_stride)
                return
            assert chunk is not None
            full, ragged = extent // chunk, extent % chunk

            def one(index: Any, length: int) -> None:
                first = index * chunk
                self._start(acc, inside, block)
                self._run(
                    acc,
                    inside,
                    source,
                    start,
                    block,
                    data + first * data_stride,
                    step + first,
                    length,
                    data_stride,
                    index,
                )
                self._flush(result, acc, block, index)

            if full:
                with e.loop("chunk", full) as index:
                    one(index, chunk)
            if ragged:
                one(tirx.const(full, "int32"), ragged)

        walk(0, tirx.const(0, "int32"), tirx.const(0, "int32"))
        if flushes:
            return
        for i in range(count):
            value = self._sum(acc, i, block)
            if inside is not None:
                value = value - vector(inside, i % tile.vectors * lanes, lanes)
            if self.acc_dtype != dot.acc_dtype:
                value = value.astype(f"{self.acc_dtype}x{lanes}")
            e.store_vector(result, value, i * lanes, lanes)

    def _sums(self) -> int:
        """Numbers that the tile's accumulators hold during the reduction."""
        return self.tile.positions * self.tile.vectors * self.lanes

    def _sum(self, acc: tirx.Buffer, i: int, _block: Any) -> ir.Expr:
        """What the accumulators hold for position and vector `i` of the tile, by channel."""
        return vector(acc, i * self.lanes, self.lanes)

    def _chunk(self) -> int | None:
        """Steps after which the registers are added to the tile: a scale group, or before int32
        overflows."""
        if self.spec.group_size:
            return self.spec.group_size
        if self.spec.data_dtype == "int16":
            # A pair of products of 16-bit data and codes below 2**8 in magnitude stays below 2**24.
            safe = 127 if self.dot.zero_point else 255
            return safe if self.steps > safe else None
        return None

    def _nest(self, source: Source) -> list[tuple[int, int, int]]:
        """Loops of the reduction: extent, stride in the source, stride in steps. The last one is
        contiguous."""
        window, group = self.window, self.dot.group
        kh, kw = window.kernel
        row_pitch, column_pitch = (p // group for p in self.packed.pitches(self.spec.reduction))
        sign = -1 if window.turned else 1
        nest = [(kh, sign * window.dilation[0] * source.row_pitch, row_pitch)]
        if self.packed.axis == "R":
            inner = row_pitch
        else:
            nest.append((kw, sign * window.dilation[1] * source.column_pitch, column_pitch))
            inner = column_pitch
        return [*(n for n in nest if n[0] > 1), (inner, group, 1)]

    def _start(self, acc: tirx.Buffer, inside: tirx.Buffer | None, block: Any) -> None:
        e, tile, lanes = self.e, self.tile, self.lanes
        for v in range(tile.vectors):
            initial = self._zero()
            if self.corrected and inside is None:
                initial = e.bind("initial", vector(self.correction, (block + v) * lanes, lanes))
            for p in range(tile.positions):
                e.store_vector(acc, initial, (p * tile.vectors + v) * lanes, lanes)
            if inside is not None:
                e.store_vector(inside, self._zero(), v * lanes, lanes)

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
        """The innermost loop: `extent` steps from `step` on; int4 takes two steps a byte."""
        e, dot = self.e, self.dot
        zero_points = self._zero_points(block, scale_group)
        nibbles = self.spec.weight_dtype == "int4"
        stored_steps = ceil_div(self.steps, 2) if nibbles else self.steps
        size = self.lanes * dot.group
        first = e.bind("first", start + data + self._turn_around(source))

        def load(v: int, index: Any) -> ir.Expr:
            return vector(self.weight, ((block + v) * stored_steps + index) * size, size)

        def single(k: Any) -> None:
            weights = [
                e.bind(f"w{v}", dot.widen(load(v, step + k))) for v in range(self.tile.vectors)
            ]
            weights = self._centre(weights, zero_points)
            self._step(acc, inside, source, first + k * data_stride, weights)

        def chained(k: Any, count: int) -> None:
            weights = [
                [load(v, step + k + g) for v in range(self.tile.vectors)] for g in range(count)
            ]
            self._chain(acc, inside, source, first + k * data_stride, data_stride, weights)

        if dot.is_chained:
            full, ragged = extent // self.chain, extent % self.chain
            e.unrolled("k", full, self.unroll, lambda k: chained(k * self.chain, self.chain))
            if ragged:
                chained(tirx.const(full * self.chain, "int32"), ragged)
            return
        if not nibbles:
            e.unrolled("k", extent, self.unroll, single)
            return

        def pair(k: Any, count: int) -> None:
            both = [
                e.bind(f"both{v}", load(v, tirx.div(step, 2) + k).astype(f"int32x{self.lanes}"))
                for v in range(self.tile.vectors)
            ]
            for half in range(count):
                # Sign-extend one nibble: shift it to the top of 32 bits and back.
                up = self._int_vector(28 - 4 * half)
                down = self._int_vector(28)
                weights = [((w << up) >> down).astype(f"float32x{self.lanes}") for w in both]
                weights = [e.bind(f"w{v}", w) for v, w in enumerate(weights)]
                weights = self._centre(weights, zero_points)
                self._step(acc, inside, source, first + (2 * k + half) * data_stride, weights)

        if extent // 2:
            e.unrolled("k", extent // 2, self.unroll, lambda k: pair(k, 2))
        if extent % 2:
            pair(tirx.const(extent // 2, "int32"), 1)

    def _turn_around(self, source: Source) -> int:
        """How far behind a turned window's start its kernel begins."""
        if not self.window.turned:
            return 0
        (kh, kw), (dy, dx) = self.window.kernel, self.window.dilation
        return (kh - 1) * dy * source.row_pitch + (kw - 1) * dx * source.column_pitch

    def _int_vector(self, value: int) -> ir.Expr:
        return tirx.Broadcast(tirx.const(value, "int32"), self.lanes)

    def _step(
        self,
        acc: tirx.Buffer,
        inside: tirx.Buffer | None,
        source: Source,
        at: Any,
        weights: list[Any],
    ) -> None:
        """One step for every position and vector of the tile."""
        e, tile, lanes, dot = self.e, self.tile, self.lanes, self.dot
        for row in range(tile.rows):
            for column in range(tile.columns):
                offset = row * source.step[0] + column * source.step[1]
                value = dot.broadcast(vector(source.buffer, at + offset, dot.group))
                data = e.bind("x", value)
                for v, weight in enumerate(weights):
                    place = ((row * tile.columns + column) * tile.vectors + v) * lanes
                    updated = dot.accumulate(vector(acc, place, lanes), data, weight)
                    e.store_vector(acc, updated, place, lanes)
        if inside is not None:
            for v, weight in enumerate(weights):
                old = vector(inside, v * lanes, lanes)
                e.store_vector(
                    inside, dot.accumulate(old, self._offset(), weight), v * lanes, lanes
                )

    def _chain(
        self,
        acc: tirx.Buffer,
        inside: tirx.Buffer | None,
        source: Source,
        at: Any,
        data_stride: int,
        weights: list[list[Any]],
    ) -> None:
        """Some steps for every position and vector of the tile, added in 16 bits first."""
        e, tile, lanes, dot = self.e, self.tile, self.lanes, self.dot

        def add(buffer: tirx.Buffer, place: int, data: list[Any], v: int) -> None:
            pairs: Any = None
            for step, x in enumerate(data):
                product = dot.pairs(x, weights[step][v])
                pairs = product if pairs is None else pairs + product
            value = dot.add_pairs(vector(buffer, place, lanes), pairs)
            e.store_vector(buffer, value, place, lanes)

        for row in range(tile.rows):
            for column in range(tile.columns):
                offset = at + row * source.step[0] + column * source.step[1]
                data = [
                    e.bind(
                        "x",
                        dot.broadcast(
                            vector(source.buffer, offset + step * data_stride, dot.group)
                        ),
                    )
                    for step in range(len(weights))
                ]
                for v in range(tile.vectors):
                    place = ((row * tile.columns + column) * tile.vectors + v) * lanes
                    add(acc, place, data, v)
        if inside is not None:
            # offset * w: a step at a time, since the chain's proof is for data below 256.
            for step in weights:
                for v, weight in enumerate(step):
                    old = vector(inside, v * lanes, lanes)
                    value = dot.accumulate(old, self._offset(), weight)
                    e.store_vector(inside, value, v * lanes, lanes)

    # Group-wise codes

    def _scale_vector(self, buffer: tirx.Buffer, group_of_k: Any, block: Any, v: int) -> ir.Expr:
        """Row `group_of_k` of a [K/g, N] buffer, at the channels of block + v; ragged ends are
        clamped."""
        channels = self.window.out_channels
        first = (block + v) * self.lanes
        if channels % self.lanes == 0:
            return buffer[group_of_k, tirx.Ramp(first, 1, self.lanes)]
        # Lanes beyond the last channel are never stored; they only must not read outside.
        lanes = tirx.Ramp(first, 1, self.lanes)
        return buffer[group_of_k, tirx.min(lanes, tirx.Broadcast(channels - 1, self.lanes))]

    def _zero_points(self, block: Any, scale_group: Any) -> list[Any]:
        if self.operands.zero_points is None or scale_group is None:
            return []
        return [
            self.e.bind(
                f"zero{v}",
                self._scale_vector(self.operands.zero_points, scale_group, block, v)
                .astype(f"int32x{self.lanes}")
                .astype(f"float32x{self.lanes}"),
            )
            for v in range(self.tile.vectors)
        ]

    def _centre(self, weights: list[Any], zero_points: list[Any]) -> list[Any]:
        if not zero_points:
            return weights
        return [
            self.e.bind(f"c{v}", w - z)
            for v, (w, z) in enumerate(zip(weights, zero_points, strict=True))
        ]

    def _flush(self, result: tirx.Buffer, acc: tirx.Buffer, block: Any, index: Any) -> None:
        """result += registers, scaled group-wise or widened to 64 bits."""
        e, tile, lanes = self.e, self.tile, self.lanes
        scales: list[Any] = []
        if self.operands.scales is not None:
            scales = [
                e.bind(f"s{v}", self._scale_vector(self.operands.scales, index, block, v))
                for v in range(tile.vectors)
            ]
        for i in range(tile.positions * tile.vectors):
            value = self._sum(acc, i, block)
            if scales:
                value = value * scales[i % tile.vectors]
            elif self.acc_dtype != self.dot.acc_dtype:
                value = value.astype(f"{self.acc_dtype}x{lanes}")
            e.store_vector(result, vector(result, i * lanes, lanes) + value, i * lanes, lanes)

    # Epilogue

    def _epilogue_lanes(self) -> int:
        """The most channels of a position that go through the epilogue together."""
        return self.lanes

    def _finish(self, result: tirx.Buffer, b: Any, y: Any, x: Any, group: Any, block: Any) -> None:
        """Every position of the tile through the epilogue, channels in vectors, the last one
        perhaps partly."""
        e, window, tile, lanes = self.e, self.window, self.tile, self.lanes
        ragged = window.out_channels % lanes
        copies = tile.positions * tile.vectors * (2 if ragged and self.blocks > 1 else 1)
        unrolled = copies * self.epilogue.size <= _UNROLLED_EPILOGUE

        def positions(v: Any, parts: list[tuple[int, int]]) -> None:
            for r in e.each("r", tile.rows, unrolled):
                for c in e.each("c", tile.columns, unrolled):
                    position(
                        v, y + r, x + c, ((r * tile.columns + c) * tile.vectors + v) * lanes, parts
                    )

        def position(
            v: Any, row: Any, column: Any, place: Any, parts: list[tuple[int, int]]
        ) -> None:
            for start, width in parts:
                self.epilogue.emit(
                    e,
                    partial(window.indices, b, row, column),
                    (b * window.rows + row) * window.columns + column,
                    group * window.out_channels + (block + v) * lanes + start,
                    width,
                    partial(_element, result, place + start),
                )

        # A position's vectors lie side by side.
        width = self._epilogue_lanes()
        if width > lanes and tile.vectors > 1 and unrolled:
            joined = vector_parts(tile.vectors * lanes, width)
            last = (tile.vectors - 1) * lanes
            ends = vector_parts(last + ragged, width) if ragged else joined
            if ragged and self.blocks > tile.vectors:
                e.branch(
                    block == self.blocks - tile.vectors,
                    lambda: positions(tirx.const(0, "int32"), ends),
                    lambda: positions(tirx.const(0, "int32"), joined),
                )
            else:
                positions(tirx.const(0, "int32"), ends)
            return

        for v in e.each("v", tile.vectors, unrolled):
            e.ragged(block + v, self.blocks, ragged, lanes, partial(positions, v))


def _tile_of(choice: Choice) -> Tile:
    return Tile(choice["rows"], choice["columns"], choice["vectors"])


def _element(buffer: tirx.Buffer, start: Any, lane: Any) -> ir.Expr:
    return buffer[start + lane]
