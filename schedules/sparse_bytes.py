"""Sparse convolution of bytes: inputs in groups, which one instruction multiplies and adds.

The inputs of a group lie anywhere, so their bytes are brought together first, for one block of
outputs and a run of positions at a time:

    planes[c][tap's phase][position]       the data, channels first; a stride takes them apart
    woven[group][position][i]              the planes of a group interleaved, a vector at once
    sums[position][output] += woven[group][position] . values[group][output]

The last line is the inner loop of a dense kernel, with an instruction set's `Dot`. Positions run on
through the columns of the padding, whose sums nobody stores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from tvm import ir, tirx

from ..targets import Target
from .byte_shuffles import LANE, interleave, interleave_name, transpose, transpose_name
from .choice import Choice, SearchSpace
from .dot import Dot
from .emit import Emitter, dtype_bits, splat, vector, vector_parts
from .epilogue import Epilogue
from .fused import FusedFunction
from .layer_kernel import LayerKernel, read_layer
from .matrix import PARALLEL_MACS
from .sparse import SparseLayer, SparseOperands, sparse_operands
from .spec import SparseConv2dSpec, ceil_div
from .window import window_of

_Parts = list[tuple[int, int]]


def sparse_bytes_kernel_as(
    kernel: type[SparseBytesKernel],
    select_dot: Callable[[SparseConv2dSpec, Target], Dot | None],
    fused: FusedFunction,
    target: Target,
    choice: Choice | None,
) -> SparseBytesKernel | None:
    """The anchor as a kernel of an instruction set; None: no form for it."""

    def takes(spec: SparseConv2dSpec) -> Dot | None:
        if spec.by_channel:
            return None
        dot = select_dot(spec, target)
        if dot is None or dot.group != spec.group or spec.block % dot.lanes:
            return None
        return dot

    layer = read_layer(
        fused, target, choice, (SparseConv2dSpec,), takes, sparse_operands, kernel.epilogue_type
    )
    dot = None if layer is None else takes(layer.spec)
    return None if layer is None or dot is None else kernel(layer, dot)


class SparseBytesKernel(LayerKernel[SparseConv2dSpec, SparseOperands, Epilogue]):
    """One function being written."""

    epilogue_type: ClassVar[type[Epilogue]] = Epilogue
    spare: ClassVar[int] = 1
    """Registers besides sums and weights."""
    epilogue_lanes: ClassVar[int] = 0
    """Outputs of a position that go through the epilogue together; 0: a register of sums."""

    def __init__(self, layer: SparseLayer, dot: Dot) -> None:
        super().__init__(layer)
        spec, target, choice = layer.spec, layer.target, layer.choice
        self.dot, self.window = dot, window_of(spec)
        self.is_pointwise = spec.kernel == (1, 1) and not any(spec.padding)
        self.step = (1, 1) if self.is_pointwise else self.window.strides
        self.run = self._run_of_a_block()
        """Positions that are interleaved at once."""
        self.vectors = spec.block // dot.lanes
        chains = [n for n in (1, 2, 4) if n <= max(1, dot.chain if dot.is_chained else 1)]
        self.positions, self.chain = max(
            ((p, c) for p in (16, 8, 4, 2, 1) for c in chains if p == 1 or self._fits(p, c)),
            key=self._worth,
        )
        self.parallel = target.threads > 1 and spec.macs >= PARALLEL_MACS * dot.speed
        threads = target.threads if self.parallel else 1
        self.rows = self._rows_of_a_task(threads)
        if choice is not None:
            self.positions, self.chain = choice["positions"], choice["chain"]
            self.run = choice["run"]
            self.rows = min(self.window.rows, choice["band"])
        self.turned = [n for n in (LANE, 8, 4) if n <= self._columns_of_a_run(self.rows)][:1]
        """Positions of the block that the copy transposes at once; none: byte by byte."""
        if self.window.channels < LANE:
            self.turned = []
        self.e = Emitter()

    def _run_of_a_block(self) -> int:
        """A vector of positions, or less where the longest block would leave the first cache."""
        run = self.target.vector_bits // 8
        entry = dtype_bits(self.dot.data_dtype) // 8
        while run > LANE and self.spec.longest * run * entry > self.target.l1_bytes // 2:
            run //= 2
        return run

    def _registers(self, positions: int, chain: int) -> int:
        """Registers that a tile needs."""
        return positions * self.vectors + chain * self.vectors + self.spare

    def _fits(self, positions: int, chain: int) -> bool:
        return self._registers(positions, chain) <= self.target.vector_registers

    def _worth(self, tile: tuple[int, int]) -> float:
        """Multiply-adds an instruction of a tile's inner loop."""
        positions, chain = tile
        sums = 1 / chain if self.dot.is_chained else 0
        return positions / (positions * self.vectors * (1 + sums) + self.vectors + positions)

    # Geometry of a task's planes

    @property
    def row_pitch(self) -> int:
        """Positions from one row of a phase to the next."""
        if self.is_pointwise:
            return self.window.columns
        return ceil_div(self.window.padded_columns, self.step[1])

    def _phase_rows(self, rows: int) -> int:
        """Rows of one phase of a channel."""
        return rows if self.is_pointwise else ceil_div(self.window.input_rows(rows), self.step[0])

    def _plane(self, rows: int) -> int:
        """Bytes of one channel: its rows, and what the last vectors read behind them."""
        behind = self.run + (self.window.kernel[1] - 1) * self.window.dilation[1]
        phases = self.step[0] * self.step[1]
        return ceil_div(phases * self._phase_rows(rows) * self.row_pitch + behind, 64) * 64

    def _columns_of_a_run(self, rows: int) -> int:
        """Positions that are copied side by side, at least."""
        if self.is_pointwise:
            return rows if self.window.is_flat else self.window.columns
        return self.window.in_columns // self.step[1]

    def _rows_of_a_task(self, threads: int) -> int:
        rows = ceil_div(self.window.rows, threads)
        limit = self.target.l2_bytes // 2
        while rows > 1 and self._plane(rows) * self.window.channels > limit:
            rows = ceil_div(rows, 2)
        return rows

    def space(self) -> SearchSpace:
        """Positions of a register tile, length of chains, rows of a task."""
        rows = self.window.rows
        bands = {ceil_div(rows, parts) for parts in (1, 2, 3, 4, 6, 8, 16)} | {self.rows}
        longest = self.dot.chain if self.dot.is_chained else 1

        def is_valid(choice: Choice) -> bool:
            fits = self._fits(choice["positions"], choice["chain"])
            return fits and choice["positions"] <= choice["run"]

        return SearchSpace(
            "sparse_bytes",
            {
                "positions": (2, 4, 8, 16),
                "chain": tuple(n for n in (1, 2, 4, 8) if n == 1 or n <= longest),
                "run": tuple(n for n in (16, 32, 64) if 8 * n <= max(128, self.target.vector_bits)),
                "band": tuple(sorted(bands)),
            },
            {
                "positions": self.positions,
                "chain": self.chain,
                "run": self.run,
                "band": self.rows,
            },
            is_valid,
        )

    # Writing

    def build(self) -> tirx.PrimFunc:
        e, window, spec, group = self.e, self.window, self.spec, self.dot.group
        self.values = e.flat(self.operands.weight)
        self.data = e.flat(self.operands.data)
        self.epilogue.declare(e)
        plane, run = self._plane(self.rows), self.run
        slots = (self.rows - 1) * self.row_pitch + window.columns
        bands = ceil_div(window.rows, self.rows)
        groups = max(1, spec.longest // group)
        kind = "parallel" if self.parallel else "serial"
        with e.loop("task", window.batch * bands, kind) as task:
            b = task // bands
            y = e.bind("y", tirx.min(task % bands * self.rows, window.rows - self.rows))
            planes = e.opaque(window.channels * plane, spec.data_dtype, "planes")
            self._copy(planes, plane, b, y)
            where = e.alloc(groups * group, "int32", "where")
            woven = e.opaque(groups * run * group, self.dot.data_dtype, "woven")
            with e.loop("block", spec.blocks) as block:
                first = e.bind("first", self.operands.starts[block])
                count = e.bind("count", self.operands.starts[block + 1] - first)
                with e.loop("entry", count) as entry:
                    e.store(where, self._in_planes(first + entry, plane), entry)
                with e.loop("chunk", ceil_div(slots, run)) as chunk:
                    begin = e.bind("begin", chunk * run)
                    self._weave(woven, planes, where, begin, count)
                    left = tirx.min(slots - begin, run) + (self.positions - 1)
                    with e.loop("tile", tirx.div(left, self.positions)) as tile:
                        self._tile(woven, first, count, tile, block, b, y, begin)
        self.epilogue.emit_rest(e, self.dot.lanes)
        helpers = self._interleave() + "".join(transpose(n) for n in self.turned)
        return e.function(list(self.fused.func.params), {}, helpers)

    def _in_planes(self, entry: Any, plane: int) -> ir.Expr:
        """Where an entry's data begins: its offset in the layer's own order, channels first."""
        offset = self.operands.offsets[entry].astype("int32")
        if self.is_pointwise:
            return offset * plane
        (row, column), (step_y, step_x) = self.spec.pitches, self.step
        rest = offset % row
        y, x = offset // row, rest // column
        phase = y % step_y * step_x + x % step_x
        first = (phase * self._phase_rows(self.rows) + y // step_y) * self.row_pitch
        return rest % column * plane + first + x // step_x

    def _copy(self, planes: tirx.Buffer, plane: int, b: Any, y: Any) -> None:
        """The task's input, channels first."""
        e, window = self.e, self.window
        channels, pitch = window.channels, self.row_pitch
        if window.is_flat:
            # Rows are positions, one behind the other.
            self._copy_run(planes, plane, 0, (b * window.in_rows + y) * channels, self.rows, 1)
            return
        top, left, bottom, _ = window.padding
        if any(window.padding):
            lanes = self.run
            border = splat(tirx.const(self.spec.pad_value, self.spec.data_dtype), lanes)
            with e.loop("i", channels * plane // lanes) as i:
                e.store_vector(planes, border, i * lanes, lanes)
        if self.is_pointwise:
            step_y, step_x = window.strides
            with e.loop("row", self.rows) as row:
                iy = (y + row) * step_y
                origin = (b * window.in_rows + iy) * window.in_columns * channels
                self._copy_run(planes, plane, row * pitch, origin, window.columns, step_x)
            return
        step_y, step_x = self.step
        phase_rows = self._phase_rows(self.rows)
        with e.loop("row", window.input_rows(self.rows)) as row:
            iy = y * step_y - top + row
            origin = (b * window.in_rows + iy) * window.in_columns * channels

            def copy(row: Any = row, origin: Any = origin) -> None:
                for phase in range(step_x):
                    ahead = (phase - left) % step_x
                    count = ceil_div(window.in_columns - ahead, step_x)
                    if count <= 0:
                        continue
                    first = (row % step_y * step_x + phase) * phase_rows + row // step_y
                    at = e.bind("at", first * pitch + (ahead + left) // step_x)
                    self._copy_run(planes, plane, at, origin + ahead * channels, count, step_x)

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
        if not self.turned:
            with e.loop("x", count) as x:
                with e.loop("c", channels) as c:
                    value = self.data[origin + x * (step * channels) + c]
                    e.store(planes, value, c * plane + at + x)
            return
        [height] = self.turned
        with e.loop("turned", ceil_div(count, height)) as outer:
            x = e.bind("x", tirx.min(outer * height, count - height))
            with e.loop("c16", ceil_div(channels, LANE)) as inner:
                c = e.bind("c", tirx.min(inner * LANE, channels - LANE))
                e.evaluate(
                    tirx.call_extern(
                        "void", transpose_name(height),
                        tirx.address_of(self.data[origin + x * (step * channels) + c]),
                        tirx.const(step * channels, "int64"),
                        tirx.address_of(planes[c * plane + at + x]),
                        tirx.const(plane, "int64"),
                    )
                )  # fmt: skip

    # Groups of planes, interleaved

    def _interleave(self) -> str:
        """The function that interleaves a run of positions."""
        wide = dtype_bits(self.dot.data_dtype) > 8
        return interleave(self.dot.group, self.run, wide)

    def _slot(self, position: int) -> int:
        """Where that function puts the position, one of the first tile's."""
        return position

    def _weave(
        self, woven: tirx.Buffer, planes: tirx.Buffer, where: tirx.Buffer, begin: Any, count: Any
    ) -> None:
        e, size = self.e, self.dot.group
        name = interleave_name(size, self.run)
        with e.loop("group", tirx.div(count, size)) as group:
            sources = [
                tirx.address_of(planes[where[group * size + i] + begin]) for i in range(size)
            ]
            target = tirx.address_of(woven[group * (self.run * size)])
            e.evaluate(tirx.call_extern("void", name, *sources, target))

    def _operands(self, woven: tirx.Buffer, at: Any) -> list[ir.Expr]:
        """A group's data for every position of the tile, in all lanes; `at`: the first of them."""
        dot, size = self.dot, self.dot.group
        return [
            dot.broadcast(vector(woven, at + self._slot(p) * size, size))
            for p in range(self.positions)
        ]

    def _tile(
        self, woven: tirx.Buffer, first: Any, count: Any, tile: Any, block: Any, b: Any, y: Any,
        begin: Any,
    ) -> None:  # fmt: skip
        e, dot, lanes, vectors = self.e, self.dot, self.dot.lanes, self.vectors
        size, places = dot.group, self.positions * vectors
        acc = e.alloc(places * lanes, "int32", "acc", registers=True)
        zero = splat(tirx.const(0, "int32"), lanes)
        for place in range(places):
            e.store_vector(acc, zero, place * lanes, lanes)
        position = e.bind("position", tile * self.positions)
        slot = e.bind("slot", self._first_slot(position))
        start = e.bind("start", tirx.div(first, size))
        groups = e.bind("groups", tirx.div(count, size))

        def step(group: Any, chain: int) -> None:
            weights: list[list[Any]] = []
            for i in range(chain):
                number = e.bind("number", (start + group + i) * self.spec.block * size)
                codes = (vector(self.values, number + v * lanes * size, lanes * size)
                         for v in range(vectors))  # fmt: skip
                weights.append([e.bind(f"w{v}", dot.widen(code)) for v, code in enumerate(codes)])
            data = [
                self._operands(woven, e.bind("at", ((group + i) * self.run + slot) * size))
                for i in range(chain)
            ]
            for p in range(self.positions):
                x = [e.bind("x", data[i][p]) for i in range(chain)]
                for v in range(vectors):
                    place = (p * vectors + v) * lanes
                    old = vector(acc, place, lanes)
                    if dot.is_chained:
                        pairs: Any = dot.pairs(x[0], weights[0][v])
                        for i in range(1, chain):
                            pairs = pairs + dot.pairs(x[i], weights[i][v])
                        new = dot.add_pairs(old, pairs)
                    else:
                        new = dot.accumulate(old, x[0], weights[0][v])
                    e.store_vector(acc, new, place, lanes)

        if self.chain == 1:
            with e.loop("group", groups) as group:
                step(group, 1)
        else:
            with e.loop("groups", tirx.div(groups, self.chain)) as turn:
                step(turn * self.chain, self.chain)
            whole = tirx.div(groups, self.chain) * self.chain
            with e.loop("group", groups - whole) as group:
                step(whole + group, 1)
        sums = e.alloc(places * lanes, "int32", "sums")
        for place in range(places):
            e.store_vector(sums, vector(acc, place * lanes, lanes), place * lanes, lanes)
        with e.loop("p", self.positions) as p:
            self._finish(sums, p, begin + position + p, block, b, y)

    def _first_slot(self, position: Any) -> Any:
        """The slot of a tile's first position, a multiple of the tile's size."""
        return position

    def _finish(self, sums: tirx.Buffer, p: Any, position: Any, block: Any, b: Any, y: Any) -> None:
        """One position through the epilogue, if there is such a position."""
        e, window, size = self.e, self.window, self.spec.block
        lanes = min(size, self.epilogue_lanes or self.dot.lanes)
        row = e.bind("row", position // self.row_pitch)
        column = e.bind("column", position % self.row_pitch)
        inside = row < self.rows
        if self.row_pitch != window.columns:
            inside = tirx.all(inside, column < window.columns)
        outputs, rest = self.spec.out_channels, self.spec.out_channels % lanes
        with e.when(inside):
            here = (b * window.rows + y + row) * window.columns + column
            for first in range(0, size, lanes):
                start = e.bind("channel", block * size + first)

                def write(parts: _Parts, at: int = first, start: Any = start) -> None:
                    for inner, width in parts:
                        self.epilogue.emit(
                            e, partial(window.indices, b, y + row, column), here, start + inner,
                            width, partial(_element, sums, p * size + (at + inner)),
                        )  # fmt: skip

                if outputs % size == 0:
                    write([(0, lanes)])
                    continue
                with e.when(start + lanes <= outputs):
                    write([(0, lanes)])
                if rest:
                    with e.when(start == outputs - rest):
                        write(vector_parts(rest, lanes))


def _element(buffer: tirx.Buffer, start: Any, lane: Any) -> ir.Expr:
    return buffer[start + lane]
