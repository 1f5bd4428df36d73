"""Sparse linear layers of few rows on x86: block after block of 16 outputs, its sums in registers.

A dense kernel of one row is a load of weights, a load of data for all lanes and a multiply-add.
What is added to that, in the three forms:

- bits of inputs, bytes: `vpcompressb` brings the inputs of a block together, 64 at a time;
- bits of weights: `vpexpandb` or `vexpandps` puts the values where a dense kernel has them;
- offsets: bytes are brought together one by one, for CPUs that have neither; floats are read where
  they lie.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from tvm import ir, tirx

from ...targets import Target
from ..choice import Choice, SearchSpace
from ..dot import Dot, FloatDot
from ..emit import Emitter, splat, vector, vector_parts
from ..epilogue import Epilogue
from ..fused import FusedFunction, Stage
from ..layer_kernel import Layer, LayerKernel, read_layer
from ..matrix import PARALLEL_MACS
from ..operands import Operands
from ..sparse import SparseOperands, float_dot, sparse_operands
from ..spec import SparseConv2dSpec, SparseRowsSpec, ceil_div
from ..window import window_of
from .by_bits import (
    COMPRESS_BYTES,
    EXPAND_BYTES,
    EXPAND_FLOATS,
    compress_bytes,
    expand_bytes,
    expand_floats,
)
from .dot import ByteDot
from .sparse_bytes import select_dot
from .sparse_row_forms import BLOCK, has_few_rows, spreads_by_bits

NAME = "x86.sparse_rows"
# Sums of a block that are added up apart: a multiply-add takes four cycles.
_CHAINS = 4

SpecT = TypeVar("SpecT", bound=SparseConv2dSpec | SparseRowsSpec)


def sparse_rows_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> RowsKernel[Any, Any] | None:
    """A sparse linear layer of few rows; None: another anchor, or no form for it."""

    def has_bits(spec: SparseRowsSpec) -> bool:
        is_known = spec.is_integer or not spec.shared
        return is_known and spreads_by_bits(target, spec.is_integer)

    by_bits = read_layer(
        fused, target, choice, (SparseRowsSpec,), has_bits, _rows_operands, Epilogue
    )
    if by_bits is not None:
        if by_bits.spec.shared:
            return CompressedKernel(by_bits, ByteDot(BLOCK, "int8", True))
        if by_bits.spec.is_integer:
            return ExpandedBytesKernel(by_bits, ByteDot(BLOCK, "int8", True))
        return ExpandedFloatsKernel(by_bits, FloatDot(BLOCK, "float32", True))

    def dot_of(spec: SparseConv2dSpec) -> Dot | None:
        is_ours = spec.block == BLOCK and has_few_rows(spec.dense)
        if not is_ours:
            return None
        return select_dot(spec, target) if spec.is_integer else float_dot(spec, target)

    by_offsets = read_layer(
        fused, target, choice, (SparseConv2dSpec,), dot_of, sparse_operands, Epilogue
    )
    dot = None if by_offsets is None else dot_of(by_offsets.spec)
    if by_offsets is None or dot is None:
        return None
    kernel = OffsetsKernel if by_offsets.spec.is_integer else FloatOffsetsKernel
    return kernel(by_offsets, dot)


@dataclass(frozen=True, kw_only=True)
class RowsOperands(Operands):
    """Buffers of an anchor by bits; `weight` are the values."""

    words: tirx.Buffer
    starts: tirx.Buffer


def _rows_operands(
    fused: FusedFunction, anchor: Stage, spec: SparseRowsSpec
) -> RowsOperands | None:
    """None where the block reads something else."""
    reads = [read for read in anchor.reads if not read.same_as(anchor.buffer)]

    def find(shape: tuple[int, ...], dtype: str) -> tirx.Buffer | None:
        return next(
            (r for r in reads if (tuple(map(int, r.shape)), r.dtype) == (shape, dtype)), None
        )

    data = find(spec.data_shape, spec.data_dtype)
    values = find((spec.stored,), spec.weight_dtype)
    words = find((spec.blocks * spec.words_of_a_block,), "uint64")
    starts = find((spec.blocks * spec.starts_of_a_block + 1,), "int32")
    if data is None or words is None or starts is None or values is None:
        return None
    if any(buffer in fused.producers for buffer in (data, words, starts, values)):
        return None
    return RowsOperands(data, data, values, words=words, starts=starts)


OperandsT = TypeVar("OperandsT", bound=SparseOperands | RowsOperands)


class RowsKernel(LayerKernel[SpecT, OperandsT, Epilogue], Generic[SpecT, OperandsT]):
    """One function being written; what brings data and weights together is the subclass's."""

    def __init__(self, layer: Layer[SpecT, OperandsT, Epilogue], dot: Dot) -> None:
        super().__init__(layer)
        self.dot = dot
        self.vectors = BLOCK // dot.lanes
        spec, dense = layer.spec, layer.spec.dense
        self.window = window_of(spec if isinstance(spec, SparseConv2dSpec) else spec.dense)
        self.features, self.outputs = dense.reduction_size, dense.output_shape[-1]
        self.rows = dense.macs // (self.features * self.outputs)
        parallel = layer.target.threads > 1 and self.macs >= PARALLEL_MACS * dot.speed
        self.parts = layer.target.threads if parallel else 1
        self.chains = _CHAINS if layer.choice is None else layer.choice["chains"]
        self.e = Emitter()

    @property
    def macs(self) -> int:
        """What decides whether threads share the layer."""
        return self.spec.macs

    def space(self) -> SearchSpace:
        """How many sums of an output are added up apart."""
        return SearchSpace(
            NAME, {"chains": (1, 2, 4, 8)}, {"chains": self.chains}, lambda choice: True
        )

    # Writing

    def build(self) -> tirx.PrimFunc:
        e, blocks = self.e, self.spec.blocks
        self.values = e.flat(self.operands.weight)
        self.data = e.flat(self.operands.data)
        self.epilogue.declare(e)
        of_a_part = ceil_div(blocks, self.parts)
        kind = "parallel" if self.parts > 1 else "serial"
        with e.loop("part", self.parts, kind) as part:
            self.declare()
            with e.loop("row", self.rows) as row:
                data, base = self._row(row)
                with e.loop("block", of_a_part) as inner:
                    block = e.bind("block", part * of_a_part + inner)
                    if blocks % self.parts:
                        with e.when(block < blocks):
                            self._block(data, base, row, block)
                    else:
                        self._block(data, base, row, block)
        self.epilogue.emit_rest(e, self.dot.lanes)
        return e.function(list(self.fused.func.params), {}, self.helpers())

    @property
    def step(self) -> int:
        """Inputs that are read together."""
        return 1

    def declare(self) -> None:
        """A task's workspaces."""
        size = ceil_div(self.features, self.step) * self.step
        self.row = None
        if size != self.features:
            self.row = self.e.opaque(size, self.spec.data_dtype, "padded")

    def helpers(self) -> str:
        """Functions of LLVM that the kernel calls."""
        return ""

    @abstractmethod
    def multiply(self, data: tirx.Buffer, base: Any, block: Any, sums: _Sums) -> None:
        """Add a block's products."""

    def in_chains(self, count: Any, step: Callable[[Any, int], None]) -> None:
        """step(number, chain) for `count` numbers."""
        e, chains = self.e, self.chains
        # A shift: LLVM does not know that counts are not negative.
        turns = e.bind("turns", count >> tirx.const(chains.bit_length() - 1, "int32"))
        with e.loop("turn", turns) as turn:
            for chain in range(chains):
                step(turn * chains + chain, chain)
        if chains > 1:
            whole = e.bind("whole", turns * chains)
            with e.loop("rest", count - whole) as rest:
                step(whole + rest, 0)

    def _row(self, row: Any) -> tuple[tirx.Buffer, Any]:
        """Where a row of data begins; zeros behind it up to a whole step."""
        e, count = self.e, self.features
        base = e.bind("base", row * count)
        if self.row is None:
            return self.data, base
        for start, width in e.chunks(count, 64):
            e.store_vector(self.row, vector(self.data, base + start, width), start, width)
        zero = tirx.const(0, self.spec.data_dtype)
        for start, width in vector_parts(-count % self.step, 64):
            e.store_vector(self.row, splat(zero, width), count + start, width)
        return self.row, tirx.const(0, "int32")

    def _block(self, data: tirx.Buffer, base: Any, row: Any, block: Any) -> None:
        e, lanes = self.e, self.dot.lanes
        sums = _Sums(e, self.dot, self.vectors, self.chains)
        self.multiply(data, base, block, sums)
        total = sums.total()
        indices = partial(self.window.indices, 0, row, 0)

        def write(parts: list[tuple[int, int]]) -> None:
            for inner, width in parts:
                self.epilogue.emit(
                    e, indices, row, block * BLOCK + inner, width,
                    partial(_element, total, inner),
                )  # fmt: skip

        whole = [(start, lanes) for start in range(0, BLOCK, lanes)]
        rest = self.outputs % BLOCK
        blocks = self.spec.blocks
        if not rest:
            write(whole)
        elif blocks == 1:
            write(vector_parts(rest, lanes))
        else:
            e.branch(
                block == blocks - 1,
                lambda: write(vector_parts(rest, lanes)),
                lambda: write(whole),
            )


def _element(buffer: tirx.Buffer, start: Any, lane: Any) -> ir.Expr:
    return buffer[start + lane]


class _Sums:
    """Sums of a block in registers, `chains` times, so that additions need not wait."""

    def __init__(self, e: Emitter, dot: Dot, vectors: int, chains: int) -> None:
        self.e, self.dot, self.vectors, self.chains = e, dot, vectors, chains
        self.size = vectors * dot.lanes
        self.acc = e.alloc(chains * self.size, dot.acc_dtype, "acc", registers=True)
        zero = splat(tirx.const(0, dot.acc_dtype), dot.lanes)
        for place in range(chains * vectors):
            e.store_vector(self.acc, zero, place * dot.lanes, dot.lanes)

    def add(self, chain: int, update: Callable[[int, Any], Any]) -> None:
        """update(vector's number, its sum so far) for all vectors of a chain."""
        lanes = self.dot.lanes
        for v in range(self.vectors):
            place = chain % self.chains * self.size + v * lanes
            self.e.store_vector(self.acc, update(v, vector(self.acc, place, lanes)), place, lanes)

    def total(self) -> tirx.Buffer:
        """All chains added into the first."""
        lanes = self.dot.lanes
        step = self.chains
        while step > 1:
            step //= 2
            for chain in range(step):
                for v in range(self.vectors):
                    place = chain * self.size + v * lanes
                    other = vector(self.acc, place + step * self.size, lanes)
                    self.e.store_vector(
                        self.acc, vector(self.acc, place, lanes) + other, place, lanes
                    )
        return self.acc


class _StagedKernel(RowsKernel[SpecT, OperandsT]):
    """Inputs of a block side by side in `staged`, then groups of them as in a dense kernel."""

    def _groups(self, staged: tirx.Buffer, first: Any, groups: Any, sums: _Sums) -> None:
        """`groups` of staged inputs by the values from group `first` on."""
        e, dot, size = self.e, self.dot, self.dot.group

        def step(group: Any, chain: int) -> None:
            data = e.bind("x", dot.broadcast(vector(staged, group * size, size)))
            number = e.bind("number", (first + group) * (BLOCK * size))

            def update(v: int, old: Any) -> Any:
                codes = vector(self.values, number + v * dot.lanes * size, dot.lanes * size)
                return dot.accumulate(old, data, dot.widen(codes))

            sums.add(chain, update)

        self.in_chains(groups, step)


class CompressedKernel(_StagedKernel[SparseRowsSpec, RowsOperands]):
    """Bytes by bits of inputs."""

    @property
    def step(self) -> int:
        return self.spec.inputs_of_a_word

    def declare(self) -> None:
        super().declare()
        self.staged = self.e.opaque(self.spec.longest + 64, self.spec.data_dtype, "staged")

    def helpers(self) -> str:
        return COMPRESS_BYTES

    def multiply(self, data: tirx.Buffer, base: Any, block: Any, sums: _Sums) -> None:
        e, spec, size = self.e, self.spec, self.dot.group
        first = e.bind("first", self.operands.starts[block * spec.starts_of_a_block])
        end = self.operands.starts[(block + 1) * spec.starts_of_a_block]
        count = e.bind("count", end - first)
        for word, number, place in _words(e, spec, self.operands, block):
            inputs = tirx.address_of(data[base + number * spec.inputs_of_a_word])
            staged = tirx.address_of(self.staged[place - first])
            e.evaluate(compress_bytes(inputs, word, staged))
        shift = tirx.const(size.bit_length() - 1, "int32")
        self._groups(self.staged, first >> shift, count >> shift, sums)


class OffsetsKernel(_StagedKernel[SparseConv2dSpec, SparseOperands]):
    """Bytes by offsets."""

    def declare(self) -> None:
        super().declare()
        self.staged = self.e.alloc(max(1, self.spec.longest), self.dot.data_dtype, "staged")

    def multiply(self, data: tirx.Buffer, base: Any, block: Any, sums: _Sums) -> None:
        e, size = self.e, self.dot.group
        first = e.bind("first", self.operands.starts[block])
        count = e.bind("count", self.operands.starts[block + 1] - first)
        shift = tirx.const(size.bit_length() - 1, "int32")
        groups = e.bind("groups", count >> shift)
        with e.loop("group", groups) as group:
            for i in range(size):
                entry = group * size + i
                offset = self.operands.offsets[first + entry].astype("int32")
                e.store(self.staged, self.dot.convert(data[base + offset]), entry)
        self._groups(self.staged, first >> shift, groups, sums)


class FloatOffsetsKernel(RowsKernel[SparseConv2dSpec, SparseOperands]):
    """Floats by offsets."""

    def multiply(self, data: tirx.Buffer, base: Any, block: Any, sums: _Sums) -> None:
        e, dot = self.e, self.dot
        first = e.bind("first", self.operands.starts[block])
        count = e.bind("count", self.operands.starts[block + 1] - first)

        def step(index: Any, chain: int) -> None:
            entry = e.bind("entry", first + index)
            x = dot.broadcast(data[base + self.operands.offsets[entry].astype("int32")])

            def update(v: int, old: Any) -> Any:
                values = vector(self.values, entry * BLOCK + v * dot.lanes, dot.lanes)
                return dot.accumulate(old, x, values)

            sums.add(chain, update)

        self.in_chains(count, step)


class ExpandedBytesKernel(RowsKernel[SparseRowsSpec, RowsOperands]):
    """Bytes by bits of weights."""

    @property
    def step(self) -> int:
        return self.dot.group

    def helpers(self) -> str:
        return EXPAND_BYTES

    def multiply(self, data: tirx.Buffer, base: Any, block: Any, sums: _Sums) -> None:
        e, size = self.e, self.dot.group
        for chain, (word, number, place) in enumerate(_words(e, self.spec, self.operands, block)):
            x = e.bind("x", self.dot.broadcast(vector(data, base + number * size, size)))
            values = tirx.address_of(self.values[place])
            weight = e.bind("w", expand_bytes(values, word, "int8"))

            def update(_: int, old: Any, x: Any = x, weight: Any = weight) -> Any:
                return self.dot.accumulate(old, x, weight)

            sums.add(chain, update)


class ExpandedFloatsKernel(RowsKernel[SparseRowsSpec, RowsOperands]):
    """Floats by bits of weights."""

    @property
    def step(self) -> int:
        return self.spec.inputs_of_a_word

    def helpers(self) -> str:
        return EXPAND_FLOATS

    def multiply(self, data: tirx.Buffer, base: Any, block: Any, sums: _Sums) -> None:
        e, inputs = self.e, self.spec.inputs_of_a_word
        for chain, (word, number, place) in enumerate(_words(e, self.spec, self.operands, block)):
            for i in range(inputs):
                x = self.dot.broadcast(data[base + number * inputs + i])
                here: Any = place
                if i:
                    below = tirx.const(2 ** (BLOCK * i) - 1, "uint64")
                    here = place + tirx.popcount(word & below).astype("int32")
                bits = (word >> tirx.const(BLOCK * i, "uint64")).astype("uint16")
                values = tirx.address_of(self.values[here])
                weight = e.bind("w", expand_floats(values, bits))

                def update(_: int, old: Any, x: Any = x, weight: Any = weight) -> Any:
                    return self.dot.accumulate(old, x, weight)

                sums.add(chain * inputs + i, update)


def _words(
    e: Emitter, spec: SparseRowsSpec, operands: RowsOperands, block: Any
) -> Iterator[tuple[Any, Any, Any]]:
    """(word, its number, where its first value is) for all words of a block, in loops over runs."""
    run, count = spec.RUN, spec.words_of_a_block

    def written(turn: Any, words: int) -> Iterator[tuple[Any, Any, Any]]:
        place = e.bind("place", operands.starts[block * spec.starts_of_a_block + turn])
        for i in range(words):
            number = turn * run + i
            word = e.bind("word", operands.words[block * count + number])
            yield word, number, place
            if i + 1 < words:
                place = e.bind("place", place + tirx.popcount(word).astype("int32"))

    if count >= run:
        with e.loop("run", count // run) as turn:
            yield from written(turn, run)
    if count % run:
        yield from written(tirx.const(count // run, "int32"), count % run)
