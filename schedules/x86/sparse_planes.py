"""Sparse convolution on vectors of positions, for weights whose zeros lie anywhere:

    planes[c][tap's phase][row][column]    a task's input, channels first
    sums[o][position] += planes[where the entry reads + position] * value
    rows[position][o]                      sums of some outputs turned over, for the epilogue

An entry is one number of the weight (or one for each output of a small block) and vectors of the
data as they lie in memory: as many multiply-adds as in a dense kernel, each with a load.
A stride takes the planes apart: positions that are neighbours read neighbours of one phase.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..band import even_rows
from ..byte_shuffles import LANE as BYTE_CHANNELS
from ..byte_shuffles import transpose as transpose_bytes
from ..byte_shuffles import transpose_name
from ..choice import Choice, SearchSpace
from ..dot import FloatDot
from ..emit import Emitter, splat, vector, vector_parts
from ..epilogue import Epilogue
from ..fused import FusedFunction
from ..layer_kernel import LayerKernel, read_layer
from ..matrix import PARALLEL_MACS
from ..pitch import unaliased_row
from ..sparse import SparseLayer, SparseOperands, sparse_operands
from ..spec import SparseConv2dSpec, ceil_div
from ..window import window_of
from .transpose import transpose

_LINE_BYTES = 64
# What an entry costs beside its multiply-adds, in vectors.
_ENTRY = 1.5


def sparse_planes_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> SparsePlanesKernel | None:
    """A sparse convolution whose offsets name channels and taps; None: another one."""

    def takes(spec: SparseConv2dSpec) -> bool:
        is_float = not spec.is_integer and spec.weight_dtype == "float32"
        return spec.by_channel and is_float and fits_planes(spec.out_channels, spec.block, target)

    layer = read_layer(fused, target, choice, (SparseConv2dSpec,), takes, sparse_operands, Epilogue)
    return None if layer is None else FloatPlanesKernel(layer)


def fits_planes(out_channels: int, block: int, target: Target) -> bool:
    """Whether there is a whole group of outputs to turn over: layers with fewer gain nothing."""
    together = _outputs(target)
    return out_channels >= together and together % block == 0


def _outputs(target: Target) -> int:
    """Outputs that are turned over together."""
    return min(16, target.lanes(32))


class SparsePlanesKernel(LayerKernel[SparseConv2dSpec, SparseOperands, Epilogue]):
    """One function being written; what multiplies is the subclass's."""

    element_bytes: int
    lanes: int
    """Sums of a register, and positions of a turned block."""
    columns: int
    """Positions of a tile in a row; `rows` of them, of the whole width where there are several."""
    rows: int
    unroll: int

    def __init__(self, layer: SparseLayer) -> None:
        super().__init__(layer)
        spec, target = layer.spec, layer.target
        self.window = window_of(spec)
        self.is_pointwise = spec.kernel == (1, 1) and not any(spec.padding)
        self.step = (1, 1) if self.is_pointwise else self.window.strides
        # Positions of all rows one behind the other, in the data too.
        self.is_line = self.is_pointwise and self.window.shape != () and self.window.columns == 1
        self.channels = self.window.channels
        self.outputs = _outputs(target)
        self.parallel = target.threads > 1 and spec.macs >= PARALLEL_MACS
        self.band, self.parts = self._share()
        self.e = Emitter()

    def _share(self) -> tuple[int, int]:
        """Output rows of a task, and parts of the outputs: rows whose planes fit the second-level
        cache; outputs where rows are too few for the threads."""
        threads = self.target.threads if self.parallel else 1
        window = self.window
        across = 1 if self.is_pointwise else window.padded_columns
        inputs = window.columns if self.is_pointwise else across * self.step[0]
        row = inputs * self.channels * self.element_bytes
        limit = max(1, self.target.l2_bytes // 2 // row - window.input_rows(1) + 1)
        least = 64 if self.is_line else 4
        if threads > 1 and window.rows * window.batch < threads * least:
            return min(window.rows, max(limit, least)), threads
        return even_rows(window.rows, max(limit, least), window.batch, threads), 1

    # Geometry of a task's planes

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of a task's positions: all in one row where rows do not matter."""
        if self.is_pointwise:
            return 1, self.band * self.window.columns
        return self.band, self.window.columns

    @property
    def phase_rows(self) -> int:
        """Rows of one phase of a channel."""
        if self.is_pointwise:
            return 1
        return ceil_div(self.window.input_rows(self.band), self.step[0])

    @property
    @abstractmethod
    def pitch(self) -> int:
        """Elements from one row of a plane to the next."""

    @property
    def plane(self) -> int:
        """Elements from one channel to the next."""
        size = self.step[0] * self.step[1] * self.phase_rows * self.pitch
        line = _LINE_BYTES // self.element_bytes
        return unaliased_row(ceil_div(size, line) * line, self.element_bytes)

    @property
    @abstractmethod
    def run(self) -> int:
        """Sums of an output in a tile, positions that do not exist included."""

    @abstractmethod
    def slot(self, row: Any, column: Any) -> Any:
        """Where a position of the tile is among them."""

    def taps(self) -> list[int]:
        """Where each tap reads in a plane."""
        spec, places = self.spec, []
        for ky in range(spec.kernel[0]):
            for kx in range(spec.kernel[1]):
                y, x = ky * spec.dilation[0], kx * spec.dilation[1]
                phase = y % self.step[0] * self.step[1] + x % self.step[1]
                row = phase * self.phase_rows + y // self.step[0]
                places.append(row * self.pitch + x // self.step[1])
        return places

    # Writing

    @abstractmethod
    def space(self) -> SearchSpace | None:
        """What the form leaves open."""

    @abstractmethod
    def multiply(
        self, planes: tirx.Buffer, sums: tirx.Buffer, at: Any, output: Any, entries: tuple[Any, Any]
    ) -> None:
        """The sums of one block of outputs, from `output` on in `sums`, for the tile at `at`."""

    def build(self) -> tirx.PrimFunc:
        e, window, spec = self.e, self.window, self.spec
        self.values = e.flat(self.operands.weight)
        self.data = e.flat(self.operands.data)
        self.epilogue.declare(e)
        bands = ceil_div(window.rows, self.band)
        groups = ceil_div(spec.out_channels, self.outputs)
        of_a_part = ceil_div(groups, self.parts)
        kind = "parallel" if self.parallel else "serial"
        with e.loop("task", window.batch * bands * self.parts, kind) as task:
            b = e.bind("b", task // (bands * self.parts))
            band = task // self.parts % bands
            y = e.bind("y", tirx.min(band * self.band, window.rows - self.band))
            planes = self._planes(b, y)
            self._declare_taps()
            size = self.outputs * self.run
            sums = e.opaque(size, spec.acc_dtype, "sums")
            turned = e.opaque(size, spec.acc_dtype, "turned")
            begin = e.bind("begin", task % self.parts * of_a_part)
            for dy, x, group in self._nest(begin, of_a_part):
                at = e.bind("at", dy * self.pitch + x)
                if groups % self.parts:
                    with e.when(group < groups):
                        self._group(planes, sums, turned, group, at, (b, y, dy, x))
                else:
                    self._group(planes, sums, turned, group, at, (b, y, dy, x))
        self.epilogue.emit_rest(e, self.outputs)
        return e.function(list(self.fused.func.params), {}, self.helpers())

    def _nest(self, begin: Any, count: int) -> Iterator[tuple[Any, Any, Any]]:
        """Loops over a task: row and column of a tile, and `count` groups of outputs for it."""
        for dy, x in self._each_tile():
            with self.e.loop("group", count) as i:
                yield dy, x, self.e.bind("group", begin + i)

    def _each_tile(self) -> Iterator[tuple[Any, Any]]:
        e, (rows, columns) = self.e, self.extent
        with e.loop("tile_row", ceil_div(rows, self.rows)) as ty:
            dy = e.bind("dy", tirx.min(ty * self.rows, rows - self.rows))
            with e.loop("tile_column", ceil_div(columns, self.columns)) as tx:
                yield dy, e.bind("x", tx * self.columns)

    def helpers(self) -> str:
        """Functions of LLVM's that the kernel calls."""
        copied = {side for side in self._copied_sides() if side}
        if self.element_bytes == 1:
            turns = [transpose_bytes(side) for side in sorted(copied)]
            return "".join([*turns, transpose(_turn(self.lanes), self.lanes)])
        return "".join(transpose(_turn(side), side) for side in sorted(copied | {self.lanes}))

    def _declare_taps(self) -> None:
        e, taps = self.e, self.taps()
        if self.spec.tap_bits:
            self.tap_table = e.alloc(len(taps), "int32", "taps")
            for tap, place in enumerate(taps):
                e.store(self.tap_table, tirx.const(place, "int32"), tap)

    def place(self, entry: Any) -> Any:
        """Where an entry reads, from the tile's beginning."""
        code = self.e.bind("code", self.operands.offsets[entry].astype("int32"))
        if not self.spec.tap_bits:
            return code * self.plane
        bits = tirx.const(self.spec.tap_bits, "int32")
        tap = tirx.bitwise_and(code, tirx.const(2**self.spec.tap_bits - 1, "int32"))
        return tirx.shift_right(code, bits) * self.plane + self.tap_table[tap]

    # The copy

    def _planes(self, b: Any, y: Any) -> tirx.Buffer:
        """A task's input, channels first."""
        e, window, channels = self.e, self.window, self.channels
        behind = self.run + self.pitch  # what the last tile reads too far
        planes = e.opaque(channels * self.plane + behind, self.spec.data_dtype, "planes")
        row_elements = window.in_columns * channels
        if self.is_pointwise:
            step_y, step_x = window.strides
            first = (b * window.in_rows + y * step_y) * row_elements
            if self.is_line:
                self._copy_run(planes, 0, first, self.band, 1)
                return planes
            with e.loop("row", self.band) as row:
                origin = first + row * (step_y * row_elements)
                self._copy_run(planes, row * window.columns, origin, window.columns, step_x)
            return planes
        top, left, bottom, _ = window.padding
        rows = window.input_rows(self.band)
        with e.loop("row", rows) as row:
            source = e.bind("source", y * self.step[0] - top + row)
            phase, place = row % self.step[0] * self.step[1], row // self.step[0]
            starts = [
                e.bind("start", ((phase + p) * self.phase_rows + place) * self.pitch)
                for p in range(self.step[1])
            ]

            def copy(source: Any = source, starts: list[Any] = starts) -> None:
                origin = e.bind("origin", (b * window.in_rows + source) * row_elements)
                for p, start in enumerate(starts):
                    ahead = (p - left) % self.step[1]
                    count = ceil_div(window.in_columns - ahead, self.step[1])
                    skip = (ahead + left) // self.step[1]
                    across = ceil_div(window.padded_columns - p, self.step[1])
                    self._border(planes, start, 0, skip)
                    self._border(planes, start, skip + count, across)
                    if count > 0:
                        self._copy_run(
                            planes, start + skip, origin + ahead * channels, count, self.step[1]
                        )

            def fill(starts: list[Any] = starts) -> None:
                for p, start in enumerate(starts):
                    across = ceil_div(window.padded_columns - p, self.step[1])
                    self._border(planes, start, 0, across)

            if top or bottom:
                e.branch(tirx.all(source >= 0, source < window.in_rows), copy, fill)
            else:
                copy()
        return planes

    def _border(self, planes: tirx.Buffer, start: Any, begin: int, end: int) -> None:
        """Columns `begin` .. `end` of a row, in every channel."""
        e, dtype = self.e, self.spec.data_dtype
        if begin >= end:
            return
        with e.loop("c", self.channels) as c:
            for offset, width in vector_parts(end - begin, self.lanes):
                value = splat(tirx.const(self.spec.pad_value, dtype), width)
                e.store_vector(planes, value, start + c * self.plane + begin + offset, width)

    def _copied_sides(self) -> set[int]:
        """Positions of the blocks that the copy turns over; 0: it goes number by number."""
        window = self.window
        if self.is_pointwise:
            return {self._side(self.band if self.is_line else window.columns)}
        return {
            self._side(ceil_div(window.in_columns - ahead, self.step[1]))
            for ahead in range(self.step[1])
        }

    def _side(self, count: int) -> int:
        """Of the blocks for `count` columns; they have as many channels, of bytes always 16."""
        if self.element_bytes == 1:
            most = count if self.channels >= BYTE_CHANNELS else 0
        else:
            most = min(self.outputs, count, self.channels)
        return next((n for n in (16, 8, 4) if n <= most), 0)

    def _copy_run(self, planes: tirx.Buffer, at: Any, origin: Any, count: int, step: int) -> None:
        """`count` positions, `step` apart in the data, side by side from `at` on in every plane."""
        e, channels, plane, side = self.e, self.channels, self.plane, self._side(count)
        if not side:
            with e.loop("x", count) as x:
                with e.loop("c", channels) as c:
                    e.store(
                        planes, self.data[origin + x * (step * channels) + c], c * plane + at + x
                    )
            return
        is_bytes = self.element_bytes == 1
        name = transpose_name(side) if is_bytes else _turn(side)
        deep = BYTE_CHANNELS if is_bytes else side
        with e.loop("xs", ceil_div(count, side)) as outer:
            x = e.bind("x", tirx.min(outer * side, count - side))
            with e.loop("cs", ceil_div(channels, deep)) as inner:
                c = e.bind("c", tirx.min(inner * deep, channels - deep))
                source = self.data, origin + x * (step * channels) + c, step * channels
                self._turn(name, source, (planes, c * plane + at + x, plane))

    def _turn(
        self, name: str, source: tuple[tirx.Buffer, Any, int], target: tuple[tirx.Buffer, Any, int]
    ) -> None:
        """A block turned over; source and target with their rows' distance."""
        arguments: list[Any] = []
        for buffer, place, pitch in (source, target):
            arguments += [tirx.address_of(buffer[place]), tirx.const(pitch, "int64")]
        self.e.evaluate(tirx.call_extern("void", name, *arguments))

    # The products and what follows them

    def _group(
        self, planes: tirx.Buffer, sums: tirx.Buffer, turned: tirx.Buffer, group: Any, at: Any,
        where: tuple[Any, Any, Any, Any],
    ) -> None:  # fmt: skip
        """All outputs that are turned over together, in one tile."""
        e, run = self.e, self.run
        self._products(planes, sums, group, at)
        with e.loop("turn", run // self.lanes) as i:
            for start in range(0, self.outputs, self.lanes):
                target = turned, i * (self.lanes * self.outputs) + start, self.outputs
                self._turn(_turn(self.lanes), (sums, start * run + i * self.lanes, run), target)
        self._finish(turned, group, *where)

    def _products(self, planes: tirx.Buffer, sums: tirx.Buffer, group: Any, at: Any) -> None:
        """The sums of a group of outputs for the tile at `at`."""
        e, spec = self.e, self.spec
        of_a_group = self.outputs // spec.block
        count: Any = of_a_group
        if spec.blocks % of_a_group:
            count = e.bind("blocks", tirx.min(spec.blocks - group * of_a_group, of_a_group))
        with e.loop("block", count) as i:
            block = e.bind("number", group * of_a_group + i)
            first = e.bind("first", self.operands.starts[block])
            entries = first, e.bind("count", self.operands.starts[block + 1] - first)
            self.multiply(planes, sums, at, i * spec.block, entries)

    def _finish(self, turned: tirx.Buffer, group: Any, b: Any, y: Any, dy: Any, x: Any) -> None:
        """The positions of a tile that exist through the epilogue."""
        e, window, outputs = self.e, self.window, self.outputs
        channels = self.spec.out_channels
        columns = self.extent[1]
        across: Any = self.columns
        if columns % self.columns:
            across = e.bind("across", tirx.min(columns - x, self.columns))

        def write(parts: list[tuple[int, int]]) -> None:
            with e.loop("r", self.rows) as r:
                with e.loop("p", across) as p:
                    slot = e.bind("slot", self.slot(r, p) * outputs)
                    row, column = y + dy + r, x + p
                    if self.is_pointwise:
                        row, column = y + (x + p) // window.columns, (x + p) % window.columns
                    here = (b * window.rows + y + dy + r) * window.columns + x + p
                    for inner, width in parts:
                        self.epilogue.emit(
                            e, partial(window.indices, b, row, column), here,
                            group * outputs + inner, width,
                            partial(_element, turned, slot + inner),
                        )  # fmt: skip

        e.ragged(group, ceil_div(channels, outputs), channels % outputs, outputs, write)


class FloatPlanesKernel(SparsePlanesKernel):
    """Of float32, by fused multiply-adds."""

    element_bytes = 4

    def __init__(self, layer: SparseLayer) -> None:
        super().__init__(layer)
        self.lanes, self.rows, self.columns = self._tile()
        self.unroll = 1
        if layer.choice is not None:
            self._choose(layer.choice)

    def _choose(self, choice: Choice) -> None:
        self.band, self.parts = choice["band"], choice["parts"]
        self.lanes, self.unroll = choice["lanes"], choice["unroll"]
        self.rows, self.columns = choice["rows"], choice["columns"]

    @property
    def pitch(self) -> int:
        if self.is_pointwise:
            return ceil_div(self.extent[1], self.columns) * self.columns
        across = ceil_div(self.window.padded_columns, self.step[1])
        return ceil_div(across, self.lanes) * self.lanes

    @property
    def across(self) -> int:
        """Vectors of a row of the tile."""
        return ceil_div(self.columns, self.lanes)

    @property
    def run(self) -> int:
        return self.rows * self.across * self.lanes

    def slot(self, row: Any, column: Any) -> Any:
        return row * (self.across * self.lanes) + column

    def _most_vectors(self) -> int:
        """Vectors of a tile that registers hold."""
        block = self.spec.block
        return (self.target.vector_registers - 2 - block) // block

    def _tiles(self) -> list[tuple[int, int, int]]:
        """(lanes, rows, columns) that fit the registers."""
        rows, columns = self.extent
        most, widest = self._most_vectors(), self.outputs
        found = []
        for lanes in (16, 8, 4):
            if lanes > widest or (lanes < 8 and widest > 4):
                continue
            for vectors in range(1, min(most, ceil_div(columns, lanes)) + 1):
                found.append((lanes, 1, min(vectors * lanes, columns)))
            across = ceil_div(columns, lanes)
            found += [(lanes, n, columns) for n in range(2, min(rows, most // across) + 1)]
        return found

    def _tile(self) -> tuple[int, int, int]:
        rows, columns = self.extent
        widest = min(16, self.target.lanes(32))

        def cost(tile: tuple[int, int, int]) -> float:
            lanes, high, wide = tile
            tiles = ceil_div(rows, high) * ceil_div(columns, wide)
            vectors = high * ceil_div(wide, lanes)
            return tiles * (vectors * lanes / widest + _ENTRY)

        return min(self._tiles(), key=cost)

    def space(self) -> SearchSpace | None:
        """Tiles, rows of a task, parts of the outputs, unrolling."""
        window, tiles, most = self.window, self._tiles(), self._most_vectors()
        default = {
            "lanes": self.lanes, "rows": self.rows, "columns": self.columns, "band": self.band,
            "parts": self.parts, "unroll": self.unroll,
        }  # fmt: skip
        bands = {ceil_div(window.rows, parts) for parts in (1, 2, 3, 4, 6, 8, 16)} | {self.band}

        def is_valid(choice: Choice) -> bool:
            band, columns = choice["band"], window.columns
            if self.is_pointwise:
                band, columns = 1, band * columns
            vectors = choice["rows"] * ceil_div(choice["columns"], choice["lanes"])
            whole = choice["columns"] == columns
            return (
                most // 3 <= vectors <= most
                and choice["rows"] <= band
                and (whole or (choice["rows"] == 1 and choice["columns"] < columns))
                and (whole or choice["columns"] % choice["lanes"] == 0)
            )

        return SearchSpace(
            "x86.sparse_planes",
            {
                "lanes": tuple(sorted({tile[0] for tile in tiles})),
                "rows": tuple(sorted({tile[1] for tile in tiles})),
                "columns": tuple(sorted({tile[2] for tile in tiles})),
                "band": tuple(sorted(bands)),
                "parts": tuple(sorted({1, self.target.threads if self.parallel else 1})),
                "unroll": (1, 2, 4),
            },
            default,
            is_valid,
        )

    def multiply(
        self, planes: tirx.Buffer, sums: tirx.Buffer, at: Any, output: Any, entries: tuple[Any, Any]
    ) -> None:
        e, lanes, block, unroll = self.e, self.lanes, self.spec.block, self.unroll
        vectors = self.rows * self.across
        dot = FloatDot(lanes, "float32", self.target.has("fma"))
        acc = e.alloc(vectors * block * lanes, "float32", "acc", registers=True)
        for number in range(vectors * block):
            e.store_vector(acc, splat(tirx.const(0.0, "float32"), lanes), number * lanes, lanes)
        first, count = entries

        def entry(index: Any) -> None:
            number = e.bind("entry", first + index)
            start = e.bind("start", at + self.place(number))
            weights = [
                e.bind(f"w{j}", dot.broadcast(self.values[number * block + j]))
                for j in range(block)
            ]
            for row in range(self.rows):
                for v in range(self.across):
                    place = row * self.pitch + v * lanes
                    data = vector(planes, start + place, lanes)
                    if block > 1:
                        data = e.bind("x", data)
                    for j, weight in enumerate(weights):
                        which = (j * vectors + row * self.across + v) * lanes
                        old = vector(acc, which, lanes)
                        e.store_vector(acc, dot.accumulate(old, data, weight), which, lanes)

        if unroll == 1:
            with e.loop("e", count) as index:
                entry(index)
        else:
            with e.loop("es", tirx.div(count, unroll)) as turn:
                for index in range(unroll):
                    entry(turn * unroll + index)
            whole = tirx.div(count, unroll) * unroll
            with e.loop("e", count - whole) as index:
                entry(whole + index)
        for j in range(block):
            for v in range(vectors):
                value = vector(acc, (j * vectors + v) * lanes, lanes)
                e.store_vector(sums, value, (output + j) * self.run + v * lanes, lanes)


def _turn(side: int) -> str:
    return f"tvmc_turn_{side}"


def _element(buffer: tirx.Buffer, start: Any, lane: Any) -> ir.Expr:
    return buffer[start + lane]
