"""The loops of a layer, simplified: every matrix-like layer is a convolution of some window.

A linear layer is a 1x1 convolution whose rows are positions; a 1x1 convolution without padding or
stride forgets where image rows end. A transposed convolution is one over its spread-out input,
kernel turned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .conv2d_transpose import spread_shape
from .spec import Conv2dSpec, Conv2dTransposeSpec, MatmulSpec, SparseConv2dSpec, WeightedSpec


@dataclass(frozen=True)
class Window:
    """Output `batch` x `rows` x `columns` positions, input rows/columns, kernel geometry; channels
    per group."""

    batch: int
    in_rows: int
    in_columns: int
    channels: int
    groups: int
    rows: int
    columns: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    turned: bool = False
    """Kernel row ky looks at row kh - 1 - ky of the window."""
    shape: tuple[int, ...] = ()
    """The layer's own position axes, when `rows` runs over all of them flattened; else ()."""

    def indices(self, b: Any, y: Any, x: Any, channel: Any) -> tuple[Any, ...]:
        """Index of a position in the layer's own data or result (same position axes for both)."""
        if not self.shape:
            return (b, y, x, channel)
        parts: list[Any] = []
        rest = y
        for extent in reversed(self.shape[1:]):
            parts.append(rest % extent)
            rest = rest // extent
        return (rest, *reversed(parts), channel)

    @property
    def is_flat(self) -> bool:
        """Whether no position looks at its neighbours, and output row y reads input row y."""
        return bool(self.shape)

    @property
    def extent(self) -> int:
        """Output positions side by side: of a row, or all of them."""
        return self.rows if self.is_flat else self.columns

    @property
    def positions(self) -> int:
        """All output positions."""
        return self.batch * self.rows * self.columns

    def input_rows(self, rows: int) -> int:
        """Padded input rows that `rows` output rows need."""
        return (rows - 1) * self.strides[0] + (self.kernel[0] - 1) * self.dilation[0] + 1

    @property
    def padded_columns(self) -> int:
        """Input columns with padding."""
        return self.in_columns + self.padding[1] + self.padding[3]


def window_of(spec: WeightedSpec | SparseConv2dSpec) -> Window:
    """The window of a convolution, transposed convolution or linear layer."""
    if isinstance(spec, SparseConv2dSpec):
        window = window_of(spec.dense)
        return replace(window, shape=(spec.width,)) if spec.is_flat else window
    if isinstance(spec, MatmulSpec):
        return Window(
            1,
            spec.rows,
            1,
            spec.in_features,
            1,
            spec.rows,
            1,
            spec.out_features,
            shape=(spec.rows,),
        )
    if isinstance(spec, Conv2dTransposeSpec):
        batch, in_rows, in_columns, _ = spread_shape(spec)
        return Window(
            batch,
            in_rows,
            in_columns,
            spec.reduction[2],
            spec.groups,
            spec.out_height,
            spec.out_width,
            spec.columns,
            spec.kernel,
            dilation=spec.dilation,
            turned=True,
        )
    assert isinstance(spec, Conv2dSpec)
    pointwise = spec.kernel == (1, 1) and spec.strides == (1, 1) and not any(spec.padding)
    if pointwise:
        count = spec.batch * spec.height * spec.width
        return Window(
            1,
            count,
            1,
            spec.reduction[2],
            spec.groups,
            count,
            1,
            spec.columns,
            shape=(spec.batch, spec.height, spec.width),
        )
    return Window(
        spec.batch,
        spec.height,
        spec.width,
        spec.reduction[2],
        spec.groups,
        spec.out_height,
        spec.out_width,
        spec.columns,
        spec.kernel,
        spec.strides,
        spec.dilation,
        spec.padding,
    )
