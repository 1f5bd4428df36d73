"""Sparse convolution on vectors of positions with the pattern in the code, for small layers:

    x = planes[where an input's tap lies + position]        once for all outputs that read it
    acc[o] += x * values[entry]                             one instruction an entry

No offset is read and no loop turns: a group of outputs is straight code, its sums stay in
registers, places in the planes and in the values are constants of the instructions. About 10 bytes
of code a weight, so layers have at most `MOST_COMPILED` of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm import tirx

from ...targets import Target
from ..choice import Choice
from ..epilogue import Epilogue
from ..fused import FusedFunction
from ..layer_kernel import read_layer
from ..sparse import sparse_operands
from ..spec import SparseConv2dSpec, ceil_div
from .sparse_planes import FloatPlanesKernel, fits_planes

# What a tile costs beside its products, in vectors of the full width.
_TILE = 0.2
# Narrower vectors take as long.
_LEAST_LANES = 8


def sparse_compiled_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> CompiledPlanesKernel | None:
    """A sparse convolution whose pattern its spec knows; None: another one."""

    def takes(spec: SparseConv2dSpec) -> bool:
        return bool(spec.pattern) and fits_compiled(spec.out_channels, target)

    layer = read_layer(fused, target, choice, (SparseConv2dSpec,), takes, sparse_operands, Epilogue)
    return None if layer is None else CompiledPlanesKernel(layer)


def fits_compiled(out_channels: int, target: Target) -> bool:
    """Whether registers hold a group's sums and products are one instruction."""
    return target.has("fma") and target.lanes(32) >= 8 and fits_planes(out_channels, 1, target)


class CompiledPlanesKernel(FloatPlanesKernel):
    """Of float32; tiles are one vector of positions."""

    def _tiles(self) -> list[tuple[int, int, int]]:
        columns = self.extent[1]
        widths = [lanes for lanes in (16, 8) if lanes <= self.outputs]
        return [(lanes, 1, min(lanes, columns)) for lanes in widths]

    def _tile(self) -> tuple[int, int, int]:
        def cost(tile: tuple[int, int, int]) -> float:
            lanes, _, wide = tile
            vectors = max(lanes, _LEAST_LANES) / self.outputs
            return ceil_div(self.extent[1], wide) * (vectors + _TILE)

        return min(self._tiles(), key=cost)

    def space(self) -> None:
        """Nothing is left open."""

    def _nest(self, begin: Any, count: int) -> Iterator[tuple[Any, Any, Any]]:
        """All tiles of a group one behind the other: its code stays in the cache."""
        with self.e.loop("group", count) as i:
            group = self.e.bind("group", begin + i)
            for dy, x in self._each_tile():
                yield dy, x, group

    def _products(self, planes: tirx.Buffer, sums: tirx.Buffer, group: Any, at: Any) -> None:
        e = self.e
        places = [tirx.address_of(buffer[0]) for buffer in (self.values, sums)]
        for number in range(ceil_div(self.spec.out_channels, self.outputs)):
            with e.when(group == number):
                e.evaluate(
                    tirx.call_extern("void", _name(number), tirx.address_of(planes[at]), *places)
                )

    def helpers(self) -> str:
        kind = f"<{self.lanes} x float>"
        groups = range(ceil_div(self.spec.out_channels, self.outputs))
        return "".join(
            [
                super().helpers(),
                f"declare {kind} {self._product}({kind}, {kind}, {kind})\n",
                *map(self._function, groups),
            ]
        )

    @property
    def _product(self) -> str:
        return f"@llvm.fma.v{self.lanes}f32"

    def _entries(self, group: int) -> list[tuple[int, int, int]]:
        """(offset, output in the group, number of the value) of a group's entries by offset."""
        spec = self.spec
        starts = spec.pattern[spec.entries :]
        first = group * self.outputs
        last = min(first + self.outputs, spec.out_channels)
        return sorted(
            (spec.pattern[entry], output - first, entry)
            for output in range(first, last)
            for entry in range(starts[output], starts[output + 1])
        )

    def _function(self, group: int) -> str:
        """The products of a group, in LLVM's words: (a tile's planes, values, sums)."""
        lanes, kind = self.lanes, f"<{self.lanes} x float>"
        product, everywhere = self._product, f"<{lanes} x i32> zeroinitializer"
        taps, bits = self.taps(), self.spec.tap_bits
        # LLVM would take the values, which no tile changes, out of the loop over tiles, to spill
        # them as vectors: it must not see that the address is the same.
        lines = [
            f"define internal void @{_name(group)}(ptr %x, ptr %values, ptr %sums) nounwind {{",
            '  %w = call ptr asm sideeffect "", "=r,0"(ptr %values)',
        ]
        sums = ["zeroinitializer"] * self.outputs
        loaded = -1
        for offset, output, entry in self._entries(group):
            if offset != loaded:
                place = (offset >> bits) * self.plane + taps[offset & (2**bits - 1)]
                lines += [
                    f"  %p{offset} = getelementptr float, ptr %x, i64 {place}",
                    f"  %x{offset} = load {kind}, ptr %p{offset}, align 4",
                ]
                loaded = offset
            operands = f"{kind} %x{offset}, {kind} %b{entry}"
            lines += [
                f"  %q{entry} = getelementptr float, ptr %w, i64 {entry}",
                f"  %v{entry} = load float, ptr %q{entry}, align 4",
                f"  %i{entry} = insertelement {kind} poison, float %v{entry}, i32 0",
                f"  %b{entry} = shufflevector {kind} %i{entry}, {kind} poison, {everywhere}",
                f"  %a{entry} = call {kind} {product}({operands}, {kind} {sums[output]})",
            ]
            sums[output] = f"%a{entry}"
        for output, value in enumerate(sums):
            lines += [
                f"  %s{output} = getelementptr float, ptr %sums, i64 {output * self.run}",
                f"  store {kind} {value}, ptr %s{output}, align 4",
            ]
        return "\n".join([*lines, "  ret void", "}\n"])


def _name(group: int) -> str:
    return f"tvmc_products_{group}"
