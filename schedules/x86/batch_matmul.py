"""Product of two activations: the right side is packed on the fly, then tiles as in `matrix`.

Order of loops: tasks (batches, perhaps bands of rows; in parallel), the copies of both sides in the
layout of the instruction, groups of columns, tiles of rows, the reduction. Zero points cost nothing
inside it: with a = a' - A and b = b' - B, where a' and b' are what the instruction multiplies,

    sum (a' - A)(b' - B) = sum a'b' - A sum b' - B sum a' + K A B

so the accumulators start from what the sums over columns and rows say. Both sides in 16 bits (CPUs
without a byte dot) are centred when they are copied instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..band import even_rows
from ..choice import Choice
from ..dot import Dot, FloatDot
from ..emit import Emitter, vector, vector_parts
from ..epilogue import Epilogue
from ..fused import FusedFunction, Stage
from ..layer_kernel import Layer, LayerKernel, read_layer
from ..spec import BatchMatmulSpec, ceil_div
from .dot import ByteDot, WordDot, has_byte_dot
from .tile import choose_tile

_PARALLEL_MACS = 200_000
_UNROLLED_EPILOGUE = 1000
_BYTES = ("int8", "uint8")
# The four sums above are each at most this many times the sum of products with zero points.
_CORRECTION_TERMS = 4
_LARGEST_PRODUCT = 255 * 255
# Rows of the copy of a are as long as the narrowest register, for the sums over them, ...
_ROW_BYTES = 16
# ... and rows at a multiple of this distance would throw each other out of the cache.
_ALIASED_BYTES = 1024

_Sides = tuple[tirx.Buffer, tirx.Buffer]


def batch_matmul_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> _BatchMatmulKernel | None:
    """The product of two computed matrices; None: no form for it."""
    dot_of = partial(_select_dot, target=target)
    layer = read_layer(fused, target, choice, (BatchMatmulSpec,), dot_of, _sides, Epilogue)
    dot = None if layer is None else dot_of(layer.spec)
    return None if layer is None or dot is None else _BatchMatmulKernel(layer, dot)


def _sides(fused: FusedFunction, anchor: Stage, spec: BatchMatmulSpec) -> _Sides | None:
    """The two operands, perhaps one buffer; None when the block does not read what `spec` says, or
    one of them is computed in the same function."""
    reads: list[tirx.Buffer] = []
    for buffer in anchor.reads:
        if not buffer.same_as(anchor.buffer) and not any(buffer.same_as(r) for r in reads):
            reads.append(buffer)
    if len(reads) not in (1, 2):
        return None
    a, b = reads[0], reads[-1]
    for buffer, shape, dtype in ((a, spec.a_shape, spec.a_dtype), (b, spec.b_shape, spec.b_dtype)):
        if tuple(int(n) for n in buffer.shape) != shape or str(buffer.dtype) != dtype:
            return None
        if buffer in fused.producers:
            return None
    return a, b


def _select_dot(spec: BatchMatmulSpec, target: Target) -> Dot | None:
    lanes = min(16, target.lanes(32))
    while lanes > 4 and spec.columns <= lanes // 2:
        lanes //= 2
    if lanes not in (4, 8, 16):
        return None
    if not spec.is_integer:
        return FloatDot(lanes, "float32", target.has("fma"))
    if spec.acc_dtype != "int32" or {spec.a_dtype, spec.b_dtype} - set(_BYTES):
        return None
    if spec.depth * _CORRECTION_TERMS * _LARGEST_PRODUCT >= 2**31:
        return None
    if has_byte_dot(target, lanes):
        return ByteDot(lanes, "int8", True)
    return WordDot(lanes, "int16", False)


class _BatchMatmulKernel(LayerKernel[BatchMatmulSpec, _Sides, Epilogue]):
    """One function being written."""

    def __init__(self, layer: Layer[BatchMatmulSpec, _Sides, Epilogue], dot: Dot) -> None:
        super().__init__(layer)
        spec, target = layer.spec, layer.target
        self.dot, self.lanes = dot, dot.lanes
        self.blocks = ceil_div(spec.columns, self.lanes)
        self.steps = ceil_div(spec.depth, dot.group)
        # A and B of the equation, for codes as the instruction sees them: a unsigned, b signed.
        self.by_bytes = isinstance(dot, ByteDot)
        self.a_zero = spec.a_zero_point + (128 if spec.a_dtype == "int8" else 0)
        self.b_zero = spec.b_zero_point - (128 if spec.b_dtype == "uint8" else 0)
        cycles = (1 if dot.fused else 2) / (1 if self.lanes > 8 else 2)
        self.tile, _ = choose_tile(
            spec.rows,
            1,
            self.blocks,
            self.steps,
            target.vector_registers,
            cycles,
            0,
            1 if dot.fused else 2,
        )
        self.parallel = target.threads > 1 and spec.macs >= _PARALLEL_MACS * dot.group
        threads = target.threads if self.parallel else 1
        self.rows = even_rows(spec.rows, spec.rows, spec.batch, threads, self.tile.rows)
        self.bands = ceil_div(spec.rows, self.rows)
        self.e = Emitter()

    def space(self) -> None:
        """Nothing is left open."""

    def build(self) -> tirx.PrimFunc:
        e, spec = self.e, self.spec
        self.a, self.b = (e.flat(side) for side in self.operands)
        self.epilogue.declare(e)
        tasks = spec.batch * self.bands
        with e.loop("task", tasks, "parallel" if self.parallel else "serial") as task:
            i = e.bind("i", task // self.bands)
            y = tirx.min(task % self.bands * self.rows, spec.rows - self.rows)
            y = e.bind("y", y)
            packed = self._pack_b(i if spec.b_batch > 1 else tirx.const(0, "int32"))
            starts = self._column_starts(packed) if self._needs_columns else None
            data, base, pitch, sums = self._copy_a(i, y)
            tile = self.tile
            with e.loop("column_group", ceil_div(self.blocks, tile.vectors)) as j:
                block = e.bind("block", tirx.min(j * tile.vectors, self.blocks - tile.vectors))
                with e.loop("row_tile", ceil_div(self.rows, tile.rows)) as t:
                    dy = e.bind("dy", tirx.min(t * tile.rows, self.rows - tile.rows))
                    acc = self._reduce(packed, starts, data, base, pitch, sums, block, dy)
                    self._finish(acc, i, y + dy, block)
        self.epilogue.emit_rest(e, self.lanes)
        return e.function(list(self.fused.func.params), {})

    # The right side

    def _pack_b(self, batch: Any) -> tirx.Buffer:
        """[blocks, steps, lanes] words of `group` neighbours along the depth; zeros beyond."""
        e, spec, lanes, group = self.e, self.spec, self.lanes, self.dot.group
        dtype = "int32" if group > 1 else "float32"
        packed = e.alloc(self.blocks * self.steps * lanes, dtype, "packed")
        origin = e.bind("origin", batch * (spec.depth * spec.columns))
        full, ragged = spec.depth // group, spec.depth % group

        def columns(block: Any, parts: list[tuple[int, int]]) -> None:
            def one(step: Any, count: int) -> None:
                at = (block * self.steps + step) * lanes
                if sum(width for _, width in parts) < lanes:
                    zero = tirx.Broadcast(tirx.const(0, dtype), lanes)
                    e.store_vector(packed, zero, at, lanes)
                for start, width in parts:
                    first = block * lanes + start
                    word = self._word(origin, first, step * group, count, width)
                    e.store_vector(packed, word, at + start, width)

            if full:
                with e.loop("step", full) as step:
                    one(step, group)
            if ragged:
                one(tirx.const(full, "int32"), ragged)

        whole = spec.columns // lanes
        if whole:
            with e.loop("packed_block", whole) as block:
                columns(block, [(0, lanes)])
        if whole < self.blocks:
            columns(tirx.const(whole, "int32"), vector_parts(spec.columns % lanes, lanes))
        return packed

    def _word(self, origin: Any, column: Any, k: Any, count: int, width: int) -> ir.Expr:
        """`count` values from depth `k` on, lowest first, for `width` columns."""
        spec, dot = self.spec, self.dot
        bits = 32 // dot.group

        def load(row: Any) -> ir.Expr:
            if spec.transpose_b:
                base = origin + column * spec.depth + row
                return self.b[base if width == 1 else tirx.Ramp(base, spec.depth, width)]
            return vector(self.b, origin + row * spec.columns + column, width)

        if dot.group == 1:
            return load(k)
        word: Any = None
        for j in range(count):
            value = load(k + j)
            if self.by_bytes:
                value = tirx.reinterpret(_lanes("uint8", width), value)
                if spec.b_dtype == "uint8":
                    value = tirx.bitwise_xor(value, _splat(0x80, "uint8", width))
                value = value.astype(_lanes("int32", width))
            else:
                value = value.astype(_lanes("int32", width))
                value = value - _splat(spec.b_zero_point, "int32", width)
                value = tirx.bitwise_and(value, _splat(0xFFFF, "int32", width))
            if j:
                value = value << _splat(bits * j, "int32", width)
            word = value if word is None else tirx.bitwise_or(word, value)
        return word

    @property
    def _needs_columns(self) -> bool:
        return self.by_bytes and bool(self.a_zero)

    @property
    def _needs_rows(self) -> bool:
        return self.by_bytes and bool(self.b_zero)

    def _column_starts(self, packed: tirx.Buffer) -> tirx.Buffer:
        """K A B - A sum b' of every column."""
        e, lanes = self.e, self.lanes
        starts = e.alloc(self.blocks * lanes, "int32", "starts")
        ones = tirx.Broadcast(tirx.const(1, "uint8"), 4 * lanes)
        with e.loop("sum_block", self.blocks) as block:
            acc = e.alloc(lanes, "int32", "column_sums", registers=True)
            e.store_vector(acc, self._zero(), 0, lanes)
            with e.loop("step", self.steps) as step:
                weight = self._weight(packed, block, step)
                e.store_vector(
                    acc, self.dot.accumulate(vector(acc, 0, lanes), ones, weight), 0, lanes
                )
            constant = self.spec.depth * self.a_zero * self.b_zero
            value = _splat(constant, "int32", lanes) - vector(acc, 0, lanes) * _splat(
                self.a_zero, "int32", lanes
            )
            e.store_vector(starts, value, block * lanes, lanes)
        return starts

    def _weight(self, packed: tirx.Buffer, block: Any, step: Any) -> ir.Expr:
        word = vector(packed, (block * self.steps + step) * self.lanes, self.lanes)
        if self.dot.group == 1:
            return word
        kind = "int8" if self.by_bytes else "int16"
        return tirx.reinterpret(f"{kind}x{self.dot.group * self.lanes}", word)

    # The left side

    def _copy_a(self, i: Any, y: Any) -> tuple[tirx.Buffer, Any, int, tirx.Buffer | None]:
        """Buffer, offset of its first row, elements between rows, and B times the sum of each row.

        Read in place where nothing is to be converted or padded.
        """
        e, spec, dot = self.e, self.spec, self.dot
        depth, group = spec.depth, dot.group
        origin = e.bind("first", (i * spec.rows + y) * depth)
        if spec.a_dtype == dot.data_dtype and depth % group == 0 and not self._needs_rows:
            return self.a, origin, depth, None
        width = 1 if self.by_bytes else 2
        pitch = ceil_div(depth * width, _ROW_BYTES) * _ROW_BYTES
        pitch = (pitch + (_ROW_BYTES if pitch % _ALIASED_BYTES == 0 else 0)) // width
        copy = e.alloc(self.rows * pitch, dot.data_dtype, "left")
        sums = e.alloc(self.rows, "int32", "row_sums") if self._needs_rows else None
        most = self.target.vector_bits // (8 * width)
        zero = tirx.const(0, dot.data_dtype)
        with e.loop("row", self.rows) as row:
            for start, count in e.chunks(depth, most):
                value = vector(self.a, origin + row * depth + start, count)
                value = dot.convert(value)
                if not self.by_bytes:
                    value = value - _splat(spec.a_zero_point, "int16", count)
                e.store_vector(copy, value, row * pitch + start, count)
            for column in range(depth, pitch):
                e.store(copy, zero, row * pitch + column)
            if sums is not None:
                e.store(sums, self._row_sum(copy, row * pitch, pitch) * self.b_zero, row)
        return copy, tirx.const(0, "int32"), pitch, sums

    def _row_sum(self, copy: tirx.Buffer, start: Any, pitch: int) -> ir.Expr:
        """Sum of a row of bytes, padding included (it is zero)."""
        e, total = self.e, tirx.const(0, "int32")
        most = self.lanes if self.lanes < 16 or self.target.vector_bits < 512 else 16
        left, first = pitch // 4, start
        for lanes in (width for width in (16, 8, 4) if width <= most):
            if not left // lanes:
                continue
            acc = e.alloc(lanes, "int32", "sums", registers=True)
            e.store_vector(acc, _splat(0, "int32", lanes), 0, lanes)
            dot = ByteDot(lanes, "int8", True)
            ones = tirx.Broadcast(tirx.const(1, "int8"), 4 * lanes)
            with e.loop("k", left // lanes) as k:
                data = vector(copy, first + k * (4 * lanes), 4 * lanes)
                e.store_vector(acc, dot.accumulate(vector(acc, 0, lanes), data, ones), 0, lanes)
            total = total + tirx.call_llvm_pure_intrin(
                "int32", f"llvm.vector.reduce.add.v{lanes}i32", vector(acc, 0, lanes)
            )
            first, left = first + left // lanes * 4 * lanes, left % lanes
        return e.bind("row_sum", total)

    # Tiles

    def _reduce(
        self,
        packed: tirx.Buffer,
        starts: tirx.Buffer | None,
        data: tirx.Buffer,
        base: Any,
        pitch: int,
        sums: tirx.Buffer | None,
        block: Any,
        dy: Any,
    ) -> tirx.Buffer:
        """The tile's accumulators: [rows, vectors, lanes]."""
        e, tile, lanes, dot = self.e, self.tile, self.lanes, self.dot
        acc = e.alloc(tile.rows * tile.vectors * lanes, dot.acc_dtype, "acc", registers=True)
        for r in range(tile.rows):
            row_sum = None
            if sums is not None:
                row_sum = e.bind("row_sum", tirx.Broadcast(sums[dy + r], lanes))
            for v in range(tile.vectors):
                value = self._zero()
                if starts is not None:
                    value = vector(starts, (block + v) * lanes, lanes)
                if row_sum is not None:
                    value = value - row_sum
                e.store_vector(acc, value, (r * tile.vectors + v) * lanes, lanes)
        first = e.bind("at", base + dy * pitch)

        def step(k: Any) -> None:
            weights = [
                e.bind(f"w{v}", self._weight(packed, block + v, k)) for v in range(tile.vectors)
            ]
            for r in range(tile.rows):
                place = first + r * pitch + k * dot.group
                x = e.bind("x", dot.broadcast(vector(data, place, dot.group)))
                for v, weight in enumerate(weights):
                    at = (r * tile.vectors + v) * lanes
                    e.store_vector(
                        acc, dot.accumulate(vector(acc, at, lanes), x, weight), at, lanes
                    )

        with e.loop("k", self.steps) as k:
            step(k)
        return acc

    def _zero(self) -> ir.Expr:
        return _splat(0, self.dot.acc_dtype, self.lanes)

    def _finish(self, acc: tirx.Buffer, i: Any, y: Any, block: Any) -> None:
        """The tile through the epilogue, columns in vectors, the last one perhaps partly."""
        e, spec, tile, lanes = self.e, self.spec, self.tile, self.lanes
        ragged = spec.columns % lanes
        copies = tile.rows * tile.vectors * (2 if ragged and self.blocks > 1 else 1)
        unrolled = copies * self.epilogue.size <= _UNROLLED_EPILOGUE

        def rows(v: Any, parts: list[tuple[int, int]]) -> None:
            for r in e.each("r", tile.rows, unrolled):
                for start, width in parts:
                    self.epilogue.emit(
                        e,
                        partial(_index, i, y + r),
                        i * spec.rows + y + r,
                        (block + v) * lanes + start,
                        width,
                        partial(_element, acc, (r * tile.vectors + v) * lanes + start),
                    )

        for v in e.each("v", tile.vectors, unrolled):
            e.ragged(block + v, self.blocks, ragged, lanes, partial(rows, v))


def _index(i: Any, row: Any, column: Any) -> tuple[Any, ...]:
    return (i, row, column)


def _element(buffer: tirx.Buffer, start: Any, lane: Any) -> ir.Expr:
    return buffer[start + lane]


def _lanes(dtype: str, width: int) -> str:
    return dtype if width == 1 else f"{dtype}x{width}"


def _splat(value: int, dtype: str, width: int) -> ir.Expr:
    constant = tirx.const(value, dtype)
    return constant if width == 1 else tirx.Broadcast(constant, width)
