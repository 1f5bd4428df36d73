"""The same of bytes (`sparse_planes.py`), four entries at a time: their planes are interleaved in
registers and multiplied by `vpdpbusd` with four weights of each output of the block. Interleaving
is twice as much work as one output's products, so blocks of two or four are worth more here.
Without it `vpmaddubsw` multiplies, of entries whose order keeps its sums exact
(`../paired_entries.py`).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ...targets import Target
from ..byte_shuffles import LANE, unpacking_order
from ..choice import Choice, SearchSpace
from ..dot import element
from ..emit import dtype_bits, splat, vector
from ..epilogue import Epilogue
from ..fused import FusedFunction
from ..layer_kernel import read_layer
from ..sparse import SparseLayer, sparse_operands
from ..sparse_conv2d import BYTES
from ..spec import SparseConv2dSpec, ceil_div
from .dot import ByteDot, ChainDot, has_pairs, widest_byte_dot
from .sparse_planes import SparsePlanesKernel, fits_planes

# Registers of planes and what becomes of them on the way to quads.
_WOVEN = 8


def sparse_byte_planes_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> BytePlanesKernel | None:
    """A sparse convolution of bytes whose offsets name channels and taps; None: another one, or
    weights that `vpmaddubsw` would saturate with."""

    def takes(spec: SparseConv2dSpec) -> bool:
        dtypes = (spec.data_dtype, spec.weight_dtype, spec.acc_dtype)
        is_ours = spec.by_channel and dtypes == BYTES and spec.group == ByteDot.group
        dot = planes_dot(target)
        is_exact = dot is not None and (not dot.is_chained or spec.chain > 0)
        return is_ours and is_exact and fits_byte_planes(spec.out_channels, spec.block, target)

    layer = read_layer(fused, target, choice, (SparseConv2dSpec,), takes, sparse_operands, Epilogue)
    return None if layer is None else BytePlanesKernel(layer)


def fits_byte_planes(out_channels: int, block: int, target: Target) -> bool:
    """Whether registers hold a block's sums for one run of positions."""
    return (
        planes_dot(target) is not None
        and fits_planes(out_channels, block, target)
        and 4 * block + _WOVEN <= target.vector_registers
    )


def planes_dot(target: Target) -> ByteDot | None:
    """What multiplies quads, in the widest registers; None: nothing does."""
    lanes = next((lanes for lanes in (16, 8) if has_pairs(target, lanes)), None)
    pairs = None if lanes is None else ChainDot(lanes, "int8", False)
    return widest_byte_dot(target) or pairs


class BytePlanesKernel(SparsePlanesKernel):
    """One function being written."""

    element_bytes = 1
    unroll = 1

    def __init__(self, layer: SparseLayer) -> None:
        dot = planes_dot(layer.target)
        assert dot is not None
        self.dot, self.lanes = dot, dot.lanes
        self.chunk = 4 * dot.lanes
        """Positions that are interleaved at once."""
        super().__init__(layer)
        self.most = (layer.target.vector_registers - _WOVEN) // (4 * layer.spec.block)
        self.rows, self.columns = self._tile()
        if layer.choice is not None:
            self.band, self.parts = layer.choice["band"], layer.choice["parts"]
            self.rows, self.columns = layer.choice["rows"], layer.choice["columns"]

    @property
    def pitch(self) -> int:
        if self.is_pointwise:
            return ceil_div(self.extent[1], self.columns) * self.columns
        return ceil_div(self.window.padded_columns, self.step[1])

    def _chunks(self, rows: int, columns: int) -> int:
        """Runs of a tile: rows follow one another, through the columns of the padding."""
        across = columns
        if rows > 1:
            across += (rows - 1) * ceil_div(self.window.padded_columns, self.step[1])
        return ceil_div(across, self.chunk)

    @property
    def run(self) -> int:
        return self._chunks(self.rows, self.columns) * self.chunk

    def slot(self, row: Any, column: Any) -> Any:
        place = row * self.pitch + column
        inner = place % self.chunk
        of_a_vector = inner % LANE // 4 * self.lanes + inner // LANE * 4 + inner % 4
        return place // self.chunk * self.chunk + of_a_vector

    def _tiles(self) -> list[tuple[int, int]]:
        """(rows, columns) that fit the registers."""
        rows, columns = self.extent
        found = [(1, min(n * self.chunk, columns)) for n in range(1, self.most + 1)]
        found += [(n, columns) for n in range(2, rows + 1) if self._chunks(n, columns) <= self.most]
        return sorted(set(found))

    def _tile(self) -> tuple[int, int]:
        rows, columns = self.extent

        def cost(tile: tuple[int, int]) -> float:
            tiles = ceil_div(rows, tile[0]) * ceil_div(columns, tile[1])
            return tiles * (self._chunks(*tile) + 0.4)

        return min(self._tiles(), key=cost)

    def space(self) -> SearchSpace:
        """Tiles, rows of a task, parts of the outputs."""
        window, tiles = self.window, self._tiles()
        default = {
            "rows": self.rows, "columns": self.columns, "band": self.band, "parts": self.parts,
        }  # fmt: skip
        bands = {ceil_div(window.rows, parts) for parts in (1, 2, 3, 4, 6, 8)} | {self.band}

        def is_valid(choice: Choice) -> bool:
            band, columns = choice["band"], window.columns
            if self.is_pointwise:
                band, columns = 1, band * columns
            whole = choice["columns"] == columns
            fits = whole or (choice["columns"] < columns and choice["columns"] % self.chunk == 0)
            one_row = choice["rows"] == 1
            chunks = self._chunks(choice["rows"], choice["columns"])
            return fits and chunks <= self.most and (one_row or whole) and choice["rows"] <= band

        return SearchSpace(
            "x86.sparse_byte_planes",
            {
                "rows": tuple(sorted({tile[0] for tile in tiles})),
                "columns": tuple(sorted({tile[1] for tile in tiles})),
                "band": tuple(sorted(bands)),
                "parts": tuple(sorted({1, self.target.threads if self.parallel else 1})),
            },
            default,
            is_valid,
        )

    def _quads(self, planes: list[Any]) -> list[Any]:
        """Four registers of four planes' bytes as interleaved registers, in the order of `slot`."""
        pairs = [
            self._unpacked(planes[first], planes[first + 1], "uint16", high)
            for high in (False, True)
            for first in (0, 2)
        ]
        return [
            self._unpacked(pairs[2 * half], pairs[2 * half + 1], "uint8", high)
            for half in (0, 1)
            for high in (False, True)
        ]

    def _unpacked(self, first: Any, second: Any, dtype: str, high: bool) -> Any:
        """What an unpacking instruction makes of two registers, as elements of `dtype`."""
        bits, lanes = dtype_bits(element(first)), 4 * self.dot.lanes * 8
        lanes //= bits
        order = [tirx.const(i, "int32") for i in unpacking_order(lanes, LANE * 8 // bits, high)]
        mixed = self.e.bind("mixed", tirx.Shuffle([first, second], order))
        as_type = f"{dtype}x{self.chunk * 8 // dtype_bits(dtype)}"
        return self.e.bind("unpacked", tirx.reinterpret(as_type, mixed))

    def multiply(
        self, planes: tirx.Buffer, sums: tirx.Buffer, at: Any, output: Any, entries: tuple[Any, Any]
    ) -> None:
        e, lanes, block, chunk = self.e, self.lanes, self.spec.block, self.chunk
        group, chunks = self.dot.group, self.run // self.chunk
        acc = e.alloc(block * self.run, "int32", "acc", registers=True)
        for number in range(block * self.run // lanes):
            e.store_vector(acc, splat(tirx.const(0, "int32"), lanes), number * lanes, lanes)
        first, count = entries
        begin = e.bind("begin", tirx.div(first, group))
        with e.loop("quad", tirx.div(count, group)) as index:
            quad = e.bind("number", begin + index)
            places = [e.bind(f"p{i}", at + self.place(quad * group + i)) for i in range(group)]
            weights = [
                e.bind(
                    f"w{j}",
                    self.dot.broadcast(vector(self.values, (quad * block + j) * group, group)),
                )
                for j in range(block)
            ]
            for number in range(chunks):
                parts = [
                    e.bind("x", vector(planes, place + number * chunk, chunk)) for place in places
                ]
                for v, data in enumerate(self._quads(parts)):
                    for j, weight in enumerate(weights):
                        which = j * self.run + (number * group + v) * lanes
                        old = vector(acc, which, lanes)
                        e.store_vector(acc, self.dot.accumulate(old, data, weight), which, lanes)
        for j in range(block):
            for start in range(0, self.run, lanes):
                value = vector(acc, j * self.run + start, lanes)
                e.store_vector(sums, value, (output + j) * self.run + start, lanes)
