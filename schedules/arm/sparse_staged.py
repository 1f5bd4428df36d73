"""Sparse convolutions of bytes on cores without vectors, or with short ones: the entries of a block
are gathered once for a tile of positions, then multiplied as in a dense kernel.

    stage[entry][position] = data[position's window + offsets[entry]]      for one block of outputs
    sums[output][position] = bias[output] + stage[:, position] . values[:, output]

Gathering is shared by all outputs of the block, so a stored weight costs about what it costs in a
dense kernel. Both lines are one function of assembly (`StagedLoops`), the same for all layers of a
program that have such blocks. A window lies in one piece, or offsets would have to be looked at:
rows are copied only where there is a border, into as many rows as the kernel is high, which move up
for the next output row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import tirx

from ..choice import SearchSpace
from ..emit import Emitter
from ..layer_kernel import EpilogueT, Layer, TiledKernel
from ..sparse import SparseOperands
from ..sparse_cost import DenseCost
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec, SparseConv2dSpec, ceil_div
from ..window import window_of
from .assembly import ROLLED, ROLLED_IN_LLVM, as_llvm
from .border import fill_sides
from .epilogue import DspEpilogue

# Where several tiles are summed before what follows: bytes of the sums, and instructions of a
# position (roughly) and of a call.
_SUMS_BYTES = 2048
_POSITION, _CALL = 100, 60


@dataclass(frozen=True)
class StagedLoops:
    """The loops of a block and a tile of positions as assembly:

        void NAME(const int8_t *data, const uint16_t *offsets, const int8_t *values,
                  const int32_t *initial, int32_t *sums, void *stage, int entries, int column)

    `initial` [block] is what the outputs' sums start from, `column` how many bytes of data lie
    between two positions. Those with `several` tiles take their number as last argument.
    """

    columns: int
    """Positions of a tile."""
    block: int
    is_signed: bool
    offset_bytes: int
    """2 or 4, of an offset."""

    prefix: ClassVar[str] = ""
    group: ClassVar[int] = 1
    """Entries whose weights lie side by side."""
    stage_bytes: ClassVar[int] = 1
    """Of an entry's number."""
    widest: ClassVar[int] = 1
    """Positions at once at most."""
    narrowest: ClassVar[int] = 1
    """Outputs at once at least."""
    several: ClassVar[bool] = False
    # Instructions under QEMU, fitted to those of some fifty layers.
    call_cost: ClassVar[float] = 0
    part_cost: ClassVar[float] = 0
    channel_cost: ClassVar[float] = 0
    output_cost: ClassVar[float] = 0
    copy_cost: ClassVar[float] = 1.4
    """Of a byte of a row that is copied or moves up."""

    @property
    def name(self) -> str:
        """Unique among the kernels of a program, the same for equal ones."""
        facts = (self.columns, self.block, int(self.is_signed), self.offset_bytes)
        return f"tvmc_{self.prefix}_" + "_".join(str(fact) for fact in facts)

    def most_tiles(self, extent: int) -> int:
        """Tiles of a call at most, where a row has `extent` positions."""
        if not self.several:
            return 1
        return max(1, min(_SUMS_BYTES // (4 * self.block), extent) // self.columns)

    def place(self, channel: Any, column: int) -> Any:
        """Where the sum of one of the block's outputs is: parts one behind the other, of each the
        outputs of a position side by side."""
        if self.columns == 1:
            return channel
        n = self.outputs
        return channel // n * (n * self.columns) + column * n + channel % n

    @property
    def entry_cost(self) -> float:
        """Instructions of an entry, for a tile."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """Outputs at once: a part of the block."""
        return next(n for n in self._outputs() if self.block % n == 0)

    def _outputs(self) -> tuple[int, ...]:
        """What `outputs` may be, the best first."""
        raise NotImplementedError

    def cost(self, entries: float, outputs: float, tiles: int = 1) -> float:
        """Instructions of a tile: a block of so many entries and, of its outputs, so many; `tiles`
        of a call."""
        parts = self.block // self.outputs
        fixed = self.call_cost / tiles + parts * self.part_cost
        results = outputs * (self.channel_cost + self.columns * self.output_cost)
        return entries * self.entry_cost + fixed + results

    def assembly(self) -> str:
        """The function."""
        raise NotImplementedError

    @classmethod
    def takes(cls, spec: SparseConv2dSpec) -> bool:
        """Whether the loops are right for the layer."""
        is_whole = spec.block % cls.narrowest == 0
        return cls.takes_dtypes(spec) and spec.group == cls.group and is_whole

    @classmethod
    def takes_dtypes(cls, spec: SparseConv2dSpec | Conv2dSpec | MatmulSpec) -> bool:
        """Whether they multiply such numbers."""
        dtypes = spec.weight_dtype, spec.acc_dtype
        return spec.data_dtype in ("int8", "uint8") and dtypes == ("int8", "int32")


StagedLayer = Layer[SparseConv2dSpec, SparseOperands, EpilogueT]


class StagedKernel(TiledKernel[SparseConv2dSpec, SparseOperands, EpilogueT]):
    """One function being written."""

    def __init__(self, layer: StagedLayer[EpilogueT], form: type[StagedLoops], name: str) -> None:
        super().__init__(layer, window_of(layer.spec))
        self.name, self.form = name, form
        self.columns = self._columns() if layer.choice is None else layer.choice["columns"]
        self.loops = self._loops(self.columns)
        self.tiles = self._tiles_at_once()
        self.e = self._emitter()

    def _emitter(self) -> Emitter:
        return Emitter()

    def _loops(self, columns: int) -> StagedLoops:
        spec = self.spec
        offset_bytes = 2 if spec.offsets_dtype == "uint16" else 4
        return self.form(columns, spec.block, spec.data_dtype == "int8", offset_bytes)

    def _widths(self) -> tuple[int, ...]:
        """Positions that a tile may have."""
        return tuple(range(1, min(self.form.widest, self.extent) + 1))

    def _columns(self) -> int:
        """Positions of a tile, for the fewest instructions."""
        entries = self.spec.entries / self.spec.blocks

        def cost(columns: int) -> float:
            tile = self._loops(columns).cost(entries, self.spec.block)
            return ceil_div(self.extent, columns) * tile

        return min(self._widths(), key=cost)

    def _tiles_at_once(self) -> int:
        """Tiles of a call, for the fewest positions computed twice and the fewest calls."""

        def cost(tiles: int) -> int:
            calls = ceil_div(self.extent, tiles * self.columns)
            return calls * (tiles * self.columns * _POSITION + _CALL)

        return min(range(1, self.loops.most_tiles(self.extent) + 1), key=cost)

    @property
    def positions(self) -> int:
        """Of a call."""
        return self.columns * self.tiles

    def space(self) -> SearchSpace:
        """Positions of a tile."""
        columns = self._widths()
        default = {"columns": self.columns}
        return SearchSpace(self.name, {"columns": columns}, default, lambda choice: True)

    def build(self) -> tirx.PrimFunc:
        e = self.e
        self.values = e.flat(self.operands.weight)
        self.data = e.flat(self.operands.data)
        self.epilogue.declare(e)
        self._declare()
        self.has_copy = any(self.window.padding)
        if self.has_copy:
            self._make_rows()
        if self.flat:
            self._positions()
        else:
            with e.loop("b", self.window.batch) as b:
                self._image(b)
        self.epilogue.emit_rest(e, self._lanes)
        return e.function(list(self.fused.func.params), {}, self._code())

    _lanes = 1

    def _declare(self) -> None:
        """What the loops read and write."""
        spec, e = self.spec, self.e
        size = spec.longest * self.columns * self.form.stage_bytes
        self.stage = e.opaque(max(1, ceil_div(size, 4)), "int32", "stage")
        self.sums = e.opaque(spec.block * self.positions, "int32", "sums")
        self._declare_initial()

    def _declare_initial(self) -> None:
        """What sums start from: the biases, or memory for a block of them."""
        e, spec = self.e, self.spec
        assert isinstance(self.epilogue, DspEpilogue)
        bias = self.epilogue.bias_buffer
        is_whole = bias is not None and spec.out_channels % spec.block == 0
        self.biases = e.flat(bias) if is_whole else None
        if self.biases is None:
            self.initial = e.opaque(spec.block, "int32", "initial")

    def _code(self) -> str:
        loops = as_llvm(self.loops.name, self.loops.assembly(), 6, 2 + self.form.several)
        return loops + ROLLED_IN_LLVM

    def _stay_rolled(self) -> None:
        """In a loop: it is long enough, and flash is short."""
        self.e.evaluate(tirx.call_extern("void", ROLLED))

    # Positions

    def _runs(self) -> int:
        return ceil_div(self.extent, self.positions)

    def _positions(self) -> None:
        """A layer without neighbours."""
        zero = tirx.const(0, "int32")
        with self.e.loop("run", self._runs()) as run:
            first = self._first(run, self.positions)
            self._blocks(zero, zero, first, self.data, first * self.window.channels)

    def _image(self, b: Any) -> None:
        e, window = self.e, self.window
        down, along = window.strides
        pitch = self.spec.pitches[0]
        if self.has_copy:
            fill_sides(e, window, self._kernel_rows, window.channels, self._constant)
        with e.loop("y", window.rows) as y:
            source, top = self.data, (b * window.in_rows + y * down) * pitch
            if self.has_copy:
                self._fill(b, y)
                source, top = self.rows, tirx.const(0, "int32")
            with e.loop("run", self._runs()) as run:
                x = self._first(run, self.positions)
                self._blocks(b, y, x, source, top + x * (along * window.channels))

    # The copy of rows with their border

    @property
    def _kernel_rows(self) -> int:
        return (self.window.kernel[0] - 1) * self.window.dilation[0] + 1

    def _make_rows(self) -> None:
        size = self._kernel_rows * self.spec.pitches[0]
        self.rows = self.e.alloc(size, self.spec.data_dtype, "rows")

    def _fill(self, b: Any, y: Any) -> None:
        """The rows of output row y: those that the one before had move up."""
        e, window, pitch = self.e, self.window, self.spec.pitches[0]
        top, left, _, _ = window.padding
        stride, count = window.strides[0], window.in_columns * window.channels
        with e.loop("row", self._kernel_rows) as row:
            to = e.bind("to", row * pitch + left * window.channels)
            source = e.bind("source", y * stride + row - top)

            def read() -> None:
                def copy() -> None:
                    origin = e.bind("origin", (b * window.in_rows + source) * count)
                    self._copy(self.data, origin, to, count)

                e.branch(
                    tirx.all(source >= 0, source < window.in_rows),
                    copy,
                    lambda: self._constant(to, count),
                )

            if self._kernel_rows <= stride:
                read()
            else:
                e.branch(
                    tirx.all(y > 0, row < self._kernel_rows - stride),
                    lambda: self._copy(self.rows, to + stride * pitch, to, count),
                    read,
                )

    def _copy(self, source: tirx.Buffer, origin: Any, to: Any, count: int) -> None:
        with self.e.loop("i", count) as i:
            self.e.store(self.rows, source[origin + i], to + i)

    def _constant(self, first: Any, count: int) -> None:
        value = tirx.const(self.spec.pad_value, self.spec.data_dtype)
        with self.e.loop("i", count) as i:
            self.e.store(self.rows, value, first + i)

    # Blocks of outputs

    def _blocks(self, b: Any, y: Any, x: Any, source: tirx.Buffer, at: Any) -> None:
        e, spec = self.e, self.spec
        at = e.bind("at", at)
        with e.loop("block", spec.blocks) as block:
            first = e.bind("first_entry", self.operands.starts[block])
            count = e.bind("entries", self.operands.starts[block + 1] - first)
            self._sum(block, source, at, first, count)
            self._results(b, y, x, block)

    def _initial(self, block: Any) -> Any:
        """Where the first sums of a block are."""
        e, spec, window = self.e, self.spec, self.window
        if self.biases is not None:
            return tirx.address_of(self.biases[block * spec.block])
        zero = tirx.const(0, "int32")
        assert isinstance(self.epilogue, DspEpilogue)
        with e.loop("c", spec.block) as c:
            channel = tirx.min(block * spec.block + c, spec.out_channels - 1)
            indices = window.indices(zero, zero, zero, e.bind("channel", channel))
            e.store(self.initial, self.epilogue.initial(indices), c)
        return tirx.address_of(self.initial[0])

    def _sum(self, block: Any, source: tirx.Buffer, at: Any, first: Any, count: Any) -> None:
        step = self.window.channels * (1 if self.flat else self.window.strides[1])
        tiles = [tirx.const(self.tiles, "int32")] if self.form.several else []
        self.e.evaluate(
            tirx.call_extern(
                "void", f"{self.loops.name}_call", tirx.address_of(source[at]),
                tirx.address_of(self.operands.offsets[first]),
                tirx.address_of(self.values[first * self.spec.block]), self._initial(block),
                tirx.address_of(self.sums[0]), tirx.address_of(self.stage[0]), count,
                tirx.const(step, "int32"), *tiles,
            )
        )  # fmt: skip

    def _results(self, b: Any, y: Any, x: Any, block: Any) -> None:
        """What follows the sums, channel by channel."""
        e, spec = self.e, self.spec
        count: Any = spec.block
        if spec.out_channels % spec.block:
            count = e.bind("count", tirx.min(count, spec.out_channels - block * spec.block))
        with e.loop("c", count) as c:
            self._stay_rolled()
            channel = e.bind("channel", block * spec.block + c)
            assert isinstance(self.epilogue, DspEpilogue)
            self.epilogue.start_channel(e)
            self.epilogue.sums = self.sums
            for p in range(self.columns):
                self._write(b, y, x + p, channel, self.sums, self.loops.place(c, p))


def staged_form(
    loops: type[StagedLoops], spec: Conv2dSpec | MatmulSpec, block: int, dense: DenseCost
) -> SparseForm:
    """A form with these loops, with what they are expected to take. Blocks are on average filled up
    by half a group."""
    window = window_of(spec)
    extent = window.extent
    lines = window.positions // extent
    outputs = spec.columns * spec.groups_of_channels

    def line(columns: int, entries: float) -> float:
        form = loops(columns, block, True, 2)
        blocks, tiles = ceil_div(outputs, block), ceil_div(extent, columns)
        at_once = form.most_tiles(extent)
        return tiles * blocks * form.cost(entries, outputs / blocks, at_once)

    # As many as are left at 75 %: the kernel knows better.
    usual = max(1.0, spec.reduction_size / 4)
    widths = range(1, min(loops.widest, extent) + 1)
    columns = min(widths, key=lambda columns: line(columns, usual))
    none = line(columns, (loops.group - 1) / 2)
    entry = line(columns, 1) - line(columns, 0)
    if any(window.padding):
        none += window.kernel[0] * window.in_columns * window.channels * loops.copy_cost
    output = dense.multiply_add * spec.reduction_size + dense.output
    total = window.positions * outputs * output / lines
    stored = ceil_div(outputs, block) * block  # weights of an entry of every block
    cost = entry / stored * spec.reduction_size * outputs / total
    return SparseForm(block, cost, loops.group, none / total)
