"""Depthwise convolution on cores without vectors: a few outputs of a channel at a time.

The input's rows with their border are those of `rows.py`. A channel's weights and constants are
loaded once for a row of outputs, and a byte that was loaded is used by all outputs of the tile that
see it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..choice import Choice, SearchSpace
from ..emit import Emitter
from ..fused import FusedFunction
from ..layer_kernel import Layer, LayerKernel, read_layer
from ..operands import Operands, find_operands
from ..spec import Conv2dSpec, ceil_div
from ..window import window_of
from .epilogue import ScalarEpilogue
from .rows import Rows

_MOST_TAPS = 49
_COLUMNS = (1, 2, 3, 4, 5, 6, 7, 8)


def takes(spec: Conv2dSpec) -> bool:
    """Whether the kernel has a form for the layer's numbers."""
    return (
        spec.is_depthwise
        and spec.data_dtype in ("int8", "uint8")
        and spec.weight_dtype == "int8"
        and not spec.weight_zero_point
        and not spec.group_size
        and not spec.table_channels
        and spec.acc_dtype == "int32"
        and spec.weight_layout == spec.plain_layout
        and spec.reduction_size <= _MOST_TAPS
    )


def depthwise_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> _DepthwiseKernel | None:
    """The depthwise convolution with what follows it; None: no form for it."""
    layer = read_layer(fused, target, choice, (Conv2dSpec,), takes, find_operands, ScalarEpilogue)
    return None if layer is None else _DepthwiseKernel(layer)


class _DepthwiseKernel(LayerKernel[Conv2dSpec, Operands, ScalarEpilogue]):
    """One function being written."""

    def __init__(self, layer: Layer[Conv2dSpec, Operands, ScalarEpilogue]) -> None:
        super().__init__(layer)
        spec, choice = layer.spec, layer.choice
        self.window = window_of(spec)
        # In its own words the window has one channel a group; a row holds those of all.
        self.channels = spec.in_channels
        self.columns = self._columns()
        if choice is not None:
            self.columns = min(choice["columns"], self.window.columns)
        self.e = Emitter()

    def _columns(self) -> int:
        """Outputs of a tile: as many as leave registers for the taps of a row."""
        most = 5 if self.target.has("thumb2") else 2 if self.target.has("thumb") else 8
        tiles = ceil_div(self.window.columns, most)
        return ceil_div(self.window.columns, tiles)

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        columns = {*(n for n in _COLUMNS if n <= self.window.columns), self.columns}
        return SearchSpace(
            "scalar.depthwise",
            {"columns": tuple(sorted(columns))},
            {"columns": self.columns},
            lambda choice: True,
        )

    def build(self) -> tirx.PrimFunc:
        e, window, spec = self.e, self.window, self.spec
        self.weight = e.flat(self.operands.weight)
        self.epilogue.declare(e)
        self.rows = Rows(
            e, window, self.fused, self.operands, spec.data_dtype, spec.pad_value, 1, self.channels
        )
        with e.loop("b", window.batch) as b:
            self.rows.start(b)
            with e.loop("y", window.rows) as y:
                top = self.rows.next(b, y)
                starts = [e.bind("row", self.rows.row(top, ky)) for ky in range(window.kernel[0])]
                with e.loop("c", self.channels) as c, e.loop("m", spec.columns) as m:
                    self._channel(b, y, c, e.bind("o", c * spec.columns + m), starts)
        self.epilogue.emit_rest(e, 1)
        return e.function(list(self.fused.func.params), {}, self.epilogue.helpers())

    def _channel(self, b: Any, y: Any, c: Any, o: Any, starts: list[Any]) -> None:
        """A row of outputs of one channel."""
        e, window, spec = self.e, self.window, self.spec
        kh, kw = window.kernel
        zero = tirx.const(0, "int32")
        at = window.indices(zero, zero, zero, o)
        self.epilogue.start_channel(e, at)
        initial = e.bind("initial", self.epilogue.initial(at))
        places = [(ky * kw + kx) * spec.out_channels for ky in range(kh) for kx in range(kw)]
        weights = [e.bind("w", self.weight[o + place].astype("int32")) for place in places]
        tile = partial(self._tile, b, y, c, o, starts, weights, initial)
        full, rest = divmod(window.columns, self.columns)
        with e.loop("tile", full) as number:
            tile(e.bind("x", number * self.columns), self.columns)
        if rest:
            tile(tirx.const(full * self.columns, "int32"), rest)

    def _tile(
        self,
        b: Any,
        y: Any,
        c: Any,
        o: Any,
        starts: list[Any],
        weights: list[Any],
        initial: Any,
        x: Any,
        count: int,
    ) -> None:
        """`count` neighbouring outputs."""
        e, window = self.e, self.window
        kw = window.kernel[1]
        sums: list[Any] = [initial] * count
        for ky, start in enumerate(starts):
            origin = e.bind("at", start + x * (window.strides[1] * self.channels) + c)
            loaded: dict[int, Any] = {}
            for p in range(count):
                for kx in range(kw):
                    column = p * window.strides[1] + kx * window.dilation[1]
                    if column not in loaded:
                        value = self.rows.buffer[origin + column * self.channels]
                        loaded[column] = e.bind("value", value.astype("int32"))
                    product = loaded[column] * weights[ky * kw + kx]
                    sums[p] = e.bind("sum", sums[p] + product)
        for p, total in enumerate(sums):
            registers = e.alloc(1, "int32", "sums", registers=True)
            e.store(registers, total, 0)
            self.epilogue.sums = registers
            self.epilogue.emit(
                e,
                partial(window.indices, b, y, x + p),
                (b * window.rows + y) * window.columns + x + p,
                o,
                1,
                partial(_element, registers),
            )


def _element(buffer: tirx.Buffer, _lane: Any) -> ir.Expr:
    return buffer[0]
