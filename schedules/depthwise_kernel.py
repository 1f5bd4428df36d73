"""Depthwise convolution: vectors along the channels, a few neighbouring outputs at a time in
registers.

Order of loops: tasks (batch, bands of output rows), the copy of the band's input with its border,
blocks of channels, rows, groups of `columns` outputs, kernel taps written out. Within a row
neighbouring outputs share the input they have in common, and a block's weights stay in registers.
How taps are multiplied is an instruction set's own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, TypeVar

from tvm import ir, tirx

from ..targets import Target
from .band import Band, BandReader, Source, even_rows
from .choice import Choice, SearchSpace
from .emit import Emitter, dtype_bits, splat, vector
from .epilogue import Epilogue
from .fused import FusedFunction
from .layer_kernel import Layer, LayerKernel, read_layer
from .operands import Operands, find_operands
from .spec import Conv2dSpec, ceil_div
from .window import window_of

_PARALLEL_MACS = 200_000  # about 10 us
# Larger kernels are not written out as a whole but row by row.
UNROLLED_TAPS = 30
# Products of 16-bit data and 8-bit codes below 2**23 each: as many as fit int32.
_SAFE_TAPS = 255
# Neighbouring outputs computed together: for small kernels, for large ones, and for the last few
# channels (measured; more only makes the code longer).
_OUTPUTS, _OUTPUTS_LARGE, _OUTPUTS_TAIL = 8, 4, 2
_SMALL_TAPS = 9
_MOST_OUTPUTS = 14  # tried by tuning

DepthwiseLayer = Layer[Conv2dSpec, Operands, Epilogue]
_Written = TypeVar("_Written", bound="DepthwiseKernel")


def depthwise_kernel_as(
    kernel: type[_Written], fused: FusedFunction, target: Target, choice: Choice | None
) -> _Written | None:
    """A depthwise convolution as a `kernel`; None: no form for it."""
    layer = read_layer(
        fused, target, choice, (Conv2dSpec,), _takes, find_operands, kernel.epilogue_type
    )
    return None if layer is None else kernel(layer)


def _takes(spec: Conv2dSpec) -> bool:
    return (
        spec.is_depthwise
        and spec.weight_layout == spec.plain_layout
        and takes_weight(spec)
        and spec.kernel[1] <= UNROLLED_TAPS
        and (spec.data_dtype != "int16" or spec.reduction_size <= _SAFE_TAPS)
    )


def takes_weight(spec: Conv2dSpec) -> bool:
    """Whether the kernel can read the layer's codes."""
    return not spec.group_size and spec.weight_dtype in ("float32", "int8", "uint8")


class DepthwiseKernel(LayerKernel[Conv2dSpec, Operands, Epilogue]):
    """One function being written; by default taps are multiplied one by one in 32 bits."""

    name: ClassVar[str] = ""
    epilogue_type: ClassVar[type[Epilogue]] = Epilogue
    """How the stages behind the anchor are written."""

    def __init__(self, layer: DepthwiseLayer) -> None:
        super().__init__(layer)
        spec, target, choice = layer.spec, layer.target, layer.choice
        # A group is one channel; all of them together are the pixel that vectors run along.
        self.window = window_of(spec)
        self.compute = "float32" if not spec.is_integer else "int32"
        self.operand = self._operand()
        self.lanes = self._lanes()
        self.parallel = target.threads > 1 and spec.macs >= _PARALLEL_MACS
        self.band = self._choose_band()
        self.columns = min(self.window.columns, self._outputs())
        most = self._most_rows()
        threads = target.threads if self.parallel else 1
        self.rows = even_rows(self.window.rows, most, self.window.batch, threads)
        self.e = Emitter()
        if choice is not None:
            self.rows, self.columns = choice["band"], choice["columns"]

    def _lanes(self) -> int:
        """Channels computed together."""
        return min(self.target.lanes(32), 16)

    def _operand(self) -> str:
        """What data and weights are when they are loaded; products are of `compute`."""
        return self.compute

    def _data_dtype(self) -> str:
        """What data are in the copy."""
        return self.spec.data_dtype

    def _convert(self, value: ir.Expr) -> ir.Expr:
        """A value of the layer's input as the kernel reads it."""
        return value

    def _pad_value(self) -> int:
        """The border's value, converted."""
        return self.spec.pad_value

    def _choose_band(self) -> Band:
        """Copied when there is a border, a conversion, repeated channels or a producer."""
        spec, dtype = self.spec, self._data_dtype()
        copied = any(spec.padding) or spec.columns > 1 or dtype != spec.data_dtype
        return Band(
            self.window,
            copied or self.operands.data in self.fused.producers,
            spec.data_dtype,
            dtype,
            self._convert,
            self._pad_value(),
            1,
            repeat=spec.columns,
        )

    def _outputs(self) -> int:
        """Neighbouring outputs computed together."""
        outputs = _OUTPUTS if self.spec.reduction_size <= _SMALL_TAPS else _OUTPUTS_LARGE
        return min(outputs, self.target.vector_registers // 3)

    def _most_rows(self) -> int:
        """Output rows of a task."""
        return self.band.most_rows(self.target.l2_bytes // 4)

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        window = self.window
        return SearchSpace(
            self.name,
            {
                "band": self.band.choices(self.rows),
                "columns": tuple(range(1, min(window.columns, _MOST_OUTPUTS) + 1)),
            },
            {"band": self.rows, "columns": self.columns},
            lambda choice: True,
        )

    def build(self) -> tirx.PrimFunc:
        e, window = self.e, self.window
        self.weight = e.flat(self.operands.weight)
        reader = BandReader(e, self.band, self.fused, self.operands, self.target)
        self.epilogue.declare(e)
        bands = ceil_div(window.rows, self.rows)
        with e.loop(
            "task", window.batch * bands, "parallel" if self.parallel else "serial"
        ) as task:
            b = task // bands
            y = e.bind("y", tirx.min(task % bands * self.rows, window.rows - self.rows))
            source = reader.source(b, y, self.rows, 0)
            for channel, lanes in e.chunks(self.spec.out_channels, self.lanes):
                self._block(source, b, y, channel, lanes)
        self.epilogue.emit_rest(e, self.lanes)
        return e.function(list(self.fused.func.params), {}, self._code())

    def _code(self) -> str:
        """What the function calls, as a module of LLVM's."""
        return ""

    def _block(self, source: Source, b: Any, y: Any, channel: Any, lanes: int) -> None:
        """All outputs of the band for `lanes` channels."""
        e, window = self.e, self.window
        count = self.columns if lanes == self.lanes else min(self.columns, _OUTPUTS_TAIL)
        tiles = ceil_div(window.columns, count)
        initial = self._initial(channel, lanes)
        with e.loop("row", self.rows) as row, e.loop("tile", tiles) as tile:
            x = e.bind("x", tirx.min(tile * count, window.columns - count))
            self._tile(source, b, y, row, x, channel, lanes, count, initial)

    def _initial(self, _channel: Any, lanes: int) -> Any:
        """What accumulators of `lanes` channels start from."""
        return splat(tirx.const(0, self.compute), lanes)

    def _tile(
        self,
        source: Source,
        b: Any,
        y: Any,
        row: Any,
        x: Any,
        channel: Any,
        lanes: int,
        count: int,
        initial: Any,
    ) -> None:
        """`count` neighbouring outputs of `lanes` channels."""
        e, spec = self.e, self.spec
        acc = e.alloc(count * lanes, self.compute, "acc", registers=True)
        for c in range(count):
            e.store_vector(acc, initial, c * lanes, lanes)
        start = e.bind("start", source.base + row * source.step[0] + x * source.step[1] + channel)
        kh = spec.kernel[0]
        if spec.reduction_size <= UNROLLED_TAPS:
            self._taps(acc, source, start, list(range(kh)), channel, lanes, count)
        else:
            with e.loop("ky", kh) as ky:
                self._taps(acc, source, start, [ky], channel, lanes, count)
        self._finish(acc, b, y + row, x, channel, lanes, count)

    def _finish(
        self, acc: tirx.Buffer, b: Any, row: Any, x: Any, channel: Any, lanes: int, count: int
    ) -> None:
        """Written out for every output, so that the accumulators never leave the registers."""
        window = self.window
        for c in range(count):
            self.epilogue.emit(
                self.e,
                partial(window.indices, b, row, x + c),
                (b * window.rows + row) * window.columns + x + c,
                channel,
                lanes,
                partial(_element, acc, c * lanes, self.spec.acc_dtype),
            )

    def _taps(
        self,
        acc: tirx.Buffer,
        source: Source,
        start: Any,
        rows: list[Any],
        channel: Any,
        lanes: int,
        count: int,
    ) -> None:
        """The taps of some kernel rows for all outputs of the tile."""
        for ky in rows:
            self._kernel_row(acc, source, start, ky, channel, lanes, count)

    def _kernel_row(
        self,
        acc: tirx.Buffer,
        source: Source,
        start: Any,
        ky: Any,
        channel: Any,
        lanes: int,
        count: int,
    ) -> None:
        """The taps of one kernel row for all outputs of the tile; shared inputs are loaded once."""
        e, spec = self.e, self.spec
        dy, dx = spec.dilation
        loaded: dict[int, Any] = {}
        at_weight = self._channel_of_weights(channel, start)
        for kx in range(spec.kernel[1]):
            place = (ky * spec.kernel[1] + kx) * spec.out_channels + at_weight
            weight = vector(self.weight, place, lanes).astype(_vector_type(self.operand, lanes))
            if spec.weight_zero_point:
                zero_point = tirx.const(spec.weight_zero_point, self.operand)
                weight = weight - (zero_point if lanes == 1 else tirx.Broadcast(zero_point, lanes))
            weight = e.bind("w", weight)
            for c in range(count):
                offset = c * source.column_stride + kx * dx
                if offset not in loaded:
                    at = start + ky * (dy * source.row_pitch) + offset * source.column_pitch
                    loaded[offset] = e.bind("v", self._load(source.buffer, at, lanes))
                wide = _vector_type(self.compute, lanes)
                product = loaded[offset].astype(wide) * weight.astype(wide)
                e.store_vector(acc, vector(acc, c * lanes, lanes) + product, c * lanes, lanes)

    def _channel_of_weights(self, channel: Any, _start: Any) -> Any:
        """`channel`, as the address of weights is computed from it."""
        return channel

    def _load(self, buffer: tirx.Buffer, at: Any, lanes: int) -> ir.Expr:
        value = vector(buffer, at, lanes)
        if dtype_bits(self.spec.data_dtype) == 32:
            return value
        return value.astype(_vector_type(self.operand, lanes))


def _vector_type(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _element(buffer: tirx.Buffer, start: int, dtype: str, lane: Any) -> ir.Expr:
    return buffer[start + lane].astype(dtype)
