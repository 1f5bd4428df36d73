"""Sparse convolution of bytes: inputs in groups of four, which one instruction multiplies and adds.

The four inputs of a group lie anywhere, so their bytes are brought together first, for one block of
outputs and a run of positions at a time:

    planes[c][position]                    the data, channels first
    quads[group][position][4]              four planes interleaved, a vector of positions at once
    sums[position][output] += quads[group][position] . values[group][output]

The last line is the inner loop of a dense kernel. A vector of quads has its positions in the order
in which unpacking leaves them (`_position`); only the epilogue has to know. Positions run on
through the columns of the padding, whose sums nobody stores.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import ir, tirx

from ..targets import Target
from .choice import Choice, SearchSpace
from .dot import Dot
from .emit import Emitter, splat, vector, vector_parts
from .epilogue import Epilogue
from .fused import FusedFunction
from .layer_kernel import LayerKernel, read_layer
from .matrix import PARALLEL_MACS
from .sparse import SparseLayer, SparseOperands, sparse_operands
from .sparse_conv2d import BYTES, GROUP, neighbours_read_neighbours
from .spec import SparseConv2dSpec, ceil_div
from .window import window_of

# Bytes that unpacking instructions keep together.
_LANE = 16
_INTERLEAVE, _TRANSPOSE = "tvmc_interleave", "tvmc_transpose"


def sparse_bytes_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None, dot: Dot | None
) -> SparseBytesKernel | None:
    """A sparse convolution of bytes with the four-byte products of `dot`; None: no form for it."""
    if dot is None:
        return None
    lanes = dot.lanes

    def takes(spec: SparseConv2dSpec) -> bool:
        return takes_bytes(spec) and spec.group == GROUP and spec.block % lanes == 0

    layer = read_layer(fused, target, choice, (SparseConv2dSpec,), takes, sparse_operands, Epilogue)
    return None if layer is None else SparseBytesKernel(layer, dot)


def takes_bytes(spec: SparseConv2dSpec) -> bool:
    """Whether positions that are neighbours read neighbours, and all is bytes."""
    dtypes = (spec.data_dtype, spec.weight_dtype, spec.acc_dtype)
    return neighbours_read_neighbours(spec) and dtypes == BYTES


class SparseBytesKernel(LayerKernel[SparseConv2dSpec, SparseOperands, Epilogue]):
    """One function being written."""

    def __init__(self, layer: SparseLayer, dot: Dot) -> None:
        super().__init__(layer)
        spec, target, choice = layer.spec, layer.target, layer.choice
        self.dot, self.window = dot, window_of(spec)
        self.is_pointwise = spec.kernel == (1, 1) and not any(spec.padding)
        self.run = target.vector_bits // 8
        """Positions that are interleaved at once."""
        self.vectors = spec.block // dot.lanes
        registers = target.vector_registers
        most = (registers - 1 - self.vectors) // self.vectors
        self.positions = next(n for n in (16, 8, 4, 2, 1) if n <= most)
        self.parallel = target.threads > 1 and spec.macs >= PARALLEL_MACS * dot.speed
        threads = target.threads if self.parallel else 1
        self.rows = self._rows_of_a_task(threads)
        if choice is not None:
            self.positions = choice["positions"]
            self.rows = min(self.window.rows, choice["band"])
        self.e = Emitter()

    # Geometry of a task's planes

    @property
    def row_pitch(self) -> int:
        """Positions from one row to the next."""
        return self.window.columns if self.is_pointwise else self.window.padded_columns

    def _plane_rows(self, rows: int) -> int:
        return rows if self.is_pointwise else self.window.input_rows(rows)

    def _plane(self, rows: int) -> int:
        """Bytes of one channel: its rows, and what the last vectors read behind them."""
        behind = self.run + (self.window.kernel[1] - 1) * self.window.dilation[1]
        return ceil_div(self._plane_rows(rows) * self.row_pitch + behind, 64) * 64

    def _rows_of_a_task(self, threads: int) -> int:
        rows = ceil_div(self.window.rows, threads)
        limit = self.target.l2_bytes // 2
        while rows > 1 and self._plane(rows) * self.window.channels > limit:
            rows = ceil_div(rows, 2)
        return rows

    def space(self) -> SearchSpace:
        """Positions of a register tile, rows of a task."""
        registers, rows = self.target.vector_registers, self.window.rows
        bands = {ceil_div(rows, parts) for parts in (1, 2, 3, 4, 6, 8, 16)} | {self.rows}

        def is_valid(choice: Choice) -> bool:
            return (choice["positions"] + 1) * self.vectors + 1 <= registers

        return SearchSpace(
            "sparse_bytes",
            {"positions": (4, 8, 16), "band": tuple(sorted(bands))},
            {"positions": self.positions, "band": self.rows},
            is_valid,
        )

    # Writing

    def build(self) -> tirx.PrimFunc:
        e, window, spec = self.e, self.window, self.spec
        self.values = e.flat(self.operands.weight)
        self.data = e.flat(self.operands.data)
        self.epilogue.declare(e)
        plane, run = self._plane(self.rows), self.run
        slots = (self.rows - 1) * self.row_pitch + window.columns
        bands = ceil_div(window.rows, self.rows)
        groups = max(1, spec.longest // GROUP)
        kind = "parallel" if self.parallel else "serial"
        with e.loop("task", window.batch * bands, kind) as task:
            b = task // bands
            y = e.bind("y", tirx.min(task % bands * self.rows, window.rows - self.rows))
            planes = e.alloc(window.channels * plane, "uint8", "planes")
            self._copy(planes, plane, b, y)
            where = e.alloc(groups * GROUP, "int32", "where")
            quads = e.alloc(groups * run * GROUP, "uint8", "quads")
            with e.loop("block", spec.blocks) as block:
                first = e.bind("first", self.operands.starts[block])
                count = e.bind("count", self.operands.starts[block + 1] - first)
                with e.loop("entry", count) as entry:
                    e.store(where, self._in_planes(first + entry, plane), entry)
                with e.loop("chunk", ceil_div(slots, run)) as chunk:
                    begin = e.bind("begin", chunk * run)
                    self._gather(quads, planes, where, begin, count)
                    with e.loop("tile", run // self.positions) as tile:
                        self._tile(quads, first, count, tile, block, b, y, begin)
        self.epilogue.emit_rest(e, self.dot.lanes)
        helpers = _interleave(run) + _transpose()
        return e.function(list(self.fused.func.params), {}, helpers)

    def _in_planes(self, entry: Any, plane: int) -> ir.Expr:
        """Where an entry's data begins: its offset in the layer's own order, channels first."""
        offset = self.operands.offsets[entry].astype("int32")
        if self.is_pointwise:
            return offset * plane
        row, column = self.spec.pitches
        rest = offset % row
        return rest % column * plane + offset // row * self.row_pitch + rest // column

    def _copy(self, planes: tirx.Buffer, plane: int, b: Any, y: Any) -> None:
        """The task's input, channels first."""
        e, window = self.e, self.window
        channels, pitch = window.channels, self.row_pitch
        if self.is_pointwise and window.columns == 1:
            # Rows are positions, one behind the other.
            self._copy_run(planes, plane, 0, (b * window.in_rows + y) * channels, self.rows, 1)
            return
        top, left, bottom, _ = window.padding
        if any(window.padding):
            border = splat(tirx.const(self.spec.pad_value, "uint8"), 64)
            with e.loop("i", channels * plane // 64) as i:
                e.store_vector(planes, border, i * 64, 64)
        step_y, step_x = window.strides if self.is_pointwise else (1, 1)
        columns = window.columns if self.is_pointwise else window.in_columns

        with e.loop("row", self._plane_rows(self.rows)) as row:
            iy = y * window.strides[0] - top + row * step_y
            origin = (b * window.in_rows + iy) * window.in_columns * channels

            def copy(row: Any = row, origin: Any = origin) -> None:
                at = e.bind("at", row * pitch + left)
                self._copy_run(planes, plane, at, origin, columns, step_x)

            if top or bottom:
                with e.when(tirx.all(iy >= 0, iy < window.in_rows)):
                    copy()
            else:
                copy()

    def _copy_run(
        self, planes: tirx.Buffer, plane: int, at: Any, origin: Any, count: int, step: int
    ) -> None:
        """`count` positions, `step` apart in the data, side by side from `at` on in every plane."""
        e, channels = self.e, self.window.channels
        if min(count, channels) < _LANE:
            with e.loop("x", count) as x:
                with e.loop("c", channels) as c:
                    value = self.data[origin + x * (step * channels) + c]
                    e.store(planes, value, c * plane + at + x)
            return
        with e.loop("x16", ceil_div(count, _LANE)) as outer:
            x = e.bind("x", tirx.min(outer * _LANE, count - _LANE))
            with e.loop("c16", ceil_div(channels, _LANE)) as inner:
                c = e.bind("c", tirx.min(inner * _LANE, channels - _LANE))
                e.evaluate(
                    tirx.call_extern(
                        "void", _TRANSPOSE,
                        tirx.address_of(self.data[origin + x * (step * channels) + c]),
                        tirx.const(step * channels, "int64"),
                        tirx.address_of(planes[c * plane + at + x]),
                        tirx.const(plane, "int64"),
                    )
                )  # fmt: skip

    def _gather(
        self, quads: tirx.Buffer, planes: tirx.Buffer, where: tirx.Buffer, begin: Any, count: Any
    ) -> None:
        e = self.e
        with e.loop("group", tirx.div(count, GROUP)) as group:
            sources = [
                tirx.address_of(planes[where[group * GROUP + i] + begin]) for i in range(GROUP)
            ]
            target = tirx.address_of(quads[group * (self.run * GROUP)])
            e.evaluate(tirx.call_extern("void", _INTERLEAVE, *sources, target))

    def _tile(
        self, quads: tirx.Buffer, first: Any, count: Any, tile: Any, block: Any, b: Any, y: Any,
        begin: Any,
    ) -> None:  # fmt: skip
        e, dot, lanes, vectors = self.e, self.dot, self.dot.lanes, self.vectors
        places = self.positions * vectors
        acc = e.alloc(places * lanes, "int32", "acc", registers=True)
        zero = splat(tirx.const(0, "int32"), lanes)
        for place in range(places):
            e.store_vector(acc, zero, place * lanes, lanes)
        slot = e.bind("slot", tile * self.positions)
        size = lanes * GROUP
        start = e.bind("start", tirx.div(first, GROUP))
        with e.loop("group", tirx.div(count, GROUP)) as group:
            number = e.bind("number", (start + group) * self.spec.block * GROUP)
            weights = [
                e.bind(f"w{v}", vector(self.values, number + v * size, size))
                for v in range(vectors)
            ]
            at = e.bind("at", (group * self.run + slot) * GROUP)
            for p in range(self.positions):
                data = e.bind("x", dot.broadcast(vector(quads, at + p * GROUP, GROUP)))
                for v, weight in enumerate(weights):
                    place = (p * vectors + v) * lanes
                    old = vector(acc, place, lanes)
                    e.store_vector(acc, dot.accumulate(old, data, weight), place, lanes)
        sums = e.alloc(places * lanes, "int32", "sums")
        for place in range(places):
            e.store_vector(sums, vector(acc, place * lanes, lanes), place * lanes, lanes)
        with e.loop("p", self.positions) as p:
            self._finish(sums, p, begin + self._position(slot + p), block, b, y)

    def _position(self, slot: Any) -> Any:
        """The position of a slot among the `run` that were interleaved: unpacking works on 16
        bytes at a time, and each of four vectors has four positions of every 16."""
        of_a_vector = self.run // GROUP
        lane = slot % of_a_vector // 4
        return lane * _LANE + slot // of_a_vector * 4 + slot % 4

    def _finish(self, sums: tirx.Buffer, p: Any, position: Any, block: Any, b: Any, y: Any) -> None:
        """One position through the epilogue, if there is such a position."""
        e, window, lanes = self.e, self.window, self.dot.lanes
        row = e.bind("row", position // self.row_pitch)
        column = e.bind("column", position % self.row_pitch)
        inside = row < self.rows
        if self.row_pitch != window.columns:
            inside = tirx.all(inside, column < window.columns)
        outputs, rest = self.spec.out_channels, self.spec.out_channels % lanes
        with e.when(inside):
            here = (b * window.rows + y + row) * window.columns + column
            for v in range(self.vectors):
                start = e.bind("channel", block * self.spec.block + v * lanes)

                def write(parts: list[tuple[int, int]], v: int = v, start: Any = start) -> None:
                    for inner, width in parts:
                        self.epilogue.emit(
                            e, partial(window.indices, b, y + row, column), here, start + inner,
                            width, partial(_element, sums, (p * self.vectors + v) * lanes + inner),
                        )  # fmt: skip

                if outputs % self.spec.block == 0:
                    write([(0, lanes)])
                    continue
                with e.when(start + lanes <= outputs):
                    write([(0, lanes)])
                if rest:
                    with e.when(start == outputs - rest):
                        write(vector_parts(rest, lanes))


def _element(buffer: tirx.Buffer, start: Any, lane: Any) -> ir.Expr:
    return buffer[start + lane]


def _mask(indices: list[int]) -> str:
    return f"<{len(indices)} x i32> <" + ", ".join(f"i32 {i}" for i in indices) + ">"


def _unpack(count: int, of_a_lane: int, high: bool) -> list[int]:
    """The shuffle of an unpacking instruction on two vectors of `count` elements: elements of both
    in turn, from the low or the high half of every 16 bytes."""
    half = of_a_lane // 2
    return [
        lane * of_a_lane + high * half + element + which * count
        for lane in range(count // of_a_lane)
        for element in range(half)
        for which in (0, 1)
    ]


def _interleave(run: int) -> str:
    """LLVM's form of: `run` bytes of each of four planes as four vectors of quads."""
    bytes_, words = f"<{run} x i8>", f"<{run // 2} x i16>"
    arguments = "ptr %a, ptr %b, ptr %c, ptr %d, ptr %o"
    lines = [f"define internal void @{_INTERLEAVE}({arguments}) alwaysinline nounwind {{"]
    lines += [f"  %v{x} = load {bytes_}, ptr %{x}, align 1" for x in "abcd"]
    for name, first, second in (("p", "a", "b"), ("q", "c", "d")):
        for high in (0, 1):
            mask = _mask(_unpack(run, 16, bool(high)))
            lines.append(
                f"  %{name}{high} = shufflevector {bytes_} %v{first}, {bytes_} %v{second}, {mask}"
            )
            lines.append(f"  %{name}{high}w = bitcast {bytes_} %{name}{high} to {words}")
    for half in (0, 1):
        for high in (0, 1):
            number = 2 * half + high
            mask = _mask(_unpack(run // 2, 8, bool(high)))
            lines += [
                f"  %r{number} = shufflevector {words} %p{half}w, {words} %q{half}w, {mask}",
                f"  %o{number} = getelementptr i8, ptr %o, i64 {number * run}",
                f"  store {words} %r{number}, ptr %o{number}, align 1",
            ]
    return "\n".join([*lines, "  ret void", "}\n"])


def _transpose() -> str:
    """LLVM's form of: 16 x 16 bytes turned over, rows `%n` apart to rows `%m` apart."""
    kind = "<16 x i8>"
    arguments = "ptr %a, i64 %n, ptr %o, i64 %m"
    lines = [f"define internal void @{_TRANSPOSE}({arguments}) alwaysinline nounwind {{"]
    for row in range(16):
        lines += [
            f"  %i{row} = mul i64 %n, {row}",
            f"  %p{row} = getelementptr i8, ptr %a, i64 %i{row}",
            f"  %x0_{row} = load {kind}, ptr %p{row}, align 1",
        ]
    # Four rounds: row r with row r + 8, elements in turn, is a quarter of the way to columns.
    low = _mask([element + which * 16 for element in range(8) for which in (0, 1)])
    high = _mask([8 + element + which * 16 for element in range(8) for which in (0, 1)])
    for step in range(4):
        for row in range(8):
            pair = f"{kind} %x{step}_{row}, {kind} %x{step}_{row + 8}"
            lines += [
                f"  %x{step + 1}_{2 * row} = shufflevector {pair}, {low}",
                f"  %x{step + 1}_{2 * row + 1} = shufflevector {pair}, {high}",
            ]
    for row in range(16):
        lines += [
            f"  %j{row} = mul i64 %m, {row}",
            f"  %q{row} = getelementptr i8, ptr %o, i64 %j{row}",
            f"  store {kind} %x4_{row}, ptr %q{row}, align 1",
        ]
    return "\n".join([*lines, "  ret void", "}\n"])
