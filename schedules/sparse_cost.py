"""What the kernels of a family with vectors take for a layer: dense, by its entries alone, and by
gathered bytes. Units are the family's own: instructions, or times of a dense multiply-add."""

from __future__ import annotations

from dataclasses import dataclass

from .saturation import NarrowSums
from .sparse_form import SparseForm
from .spec import Conv2dSpec, MatmulSpec, ceil_div
from .window import window_of


@dataclass(frozen=True)
class DenseCost:
    """Of a multiply-add, and of an output beside them."""

    multiply_add: float
    output: float

    def of(self, spec: Conv2dSpec | MatmulSpec) -> float:
        """A multiply-add of a layer, its outputs included."""
        return self.multiply_add + self.output / spec.reduction_size


@dataclass(frozen=True)
class EntryCost:
    """Of a kernel that reads an entry's data where they lie (`sparse.py`)."""

    weights: dict[int, float]
    """Outputs of a block => of a stored weight and a position."""
    output: float
    copied: float = 0.0
    """Of an input, where there is a border."""

    def form(self, spec: Conv2dSpec | MatmulSpec, block: int, dense: float) -> SparseForm:
        """Blocks of so many outputs, where a dense multiply-add costs `dense`."""
        window = window_of(spec)
        copied = self.copied * _inputs(spec) if any(window.padding) else 0.0
        constant = self.output / spec.reduction_size + copied
        return SparseForm(block, self.weights[block] / dense, constant=constant / dense)


@dataclass(frozen=True)
class GatheredCost:
    """Of a kernel that interleaves the inputs of groups (`sparse_bytes.py`)."""

    weights: dict[int, float]
    output: float
    woven: float
    """Of an entry and a position."""
    copied: float
    """Of an input."""
    tile: int
    """Positions that are computed at once."""
    run: int
    """Positions that are interleaved at once."""

    def form(
        self, spec: Conv2dSpec | MatmulSpec, block: int, group: int, dense: float,
        sums: NarrowSums | None = None,
    ) -> SparseForm:  # fmt: skip
        """Blocks of so many outputs, groups of so many entries."""
        window = window_of(spec)
        slots = window.rows * window.columns
        if window.kernel != (1, 1) or any(window.padding):
            pitch = ceil_div(window.padded_columns, window.strides[1])
            slots += (window.rows - 1) * (pitch - window.columns)
        positions = window.rows * window.columns
        tiled = ceil_div(slots, self.tile) * self.tile / positions
        woven = ceil_div(slots, self.run) * self.run / positions
        weight = self.weights[block] * tiled + self.woven / block * woven
        # Blocks are filled up by half a group on average.
        filled = (group - 1) / 2 / spec.reduction_size * weight
        constant = self.output / spec.reduction_size + self.copied * _inputs(spec) + filled
        return SparseForm(block, weight / dense, group, constant / dense, sums=sums)


def _inputs(spec: Conv2dSpec | MatmulSpec) -> float:
    """Inputs that are read for a multiply-add."""
    window = window_of(spec)
    inputs = window.batch * window.in_rows * window.in_columns * window.channels * window.groups
    if window.kernel == (1, 1):
        inputs = window.positions * window.channels * window.groups
    outputs = spec.columns * spec.groups_of_channels
    return inputs / (window.positions * outputs * spec.reduction_size)
