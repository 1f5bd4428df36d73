"""Depthwise convolution: vectors along the channels, a few neighbouring outputs at a time in
registers.

Order of loops: tasks (batch, bands of output rows), the copy of the band's input with its border,
blocks of channels, rows, groups of `columns` outputs, kernel taps written out. Within a row
neighbouring outputs share the input they have in common, and a block's weights stay in registers.
8-bit data first go to words of several columns, so that one instruction computes several taps
(`taps.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..band import Band, BandReader, Source, even_rows
from ..choice import Choice, SearchSpace
from ..emit import Emitter, dtype_bits, vector
from ..epilogue import Epilogue
from ..fused import FusedFunction, Stage
from ..operands import Operands, find_operands
from ..spec import Conv2dSpec, ceil_div
from ..window import window_of
from .taps import TapWords, tap_words

_PARALLEL_MACS = 200_000  # about 10 us
# Larger kernels are not written out as a whole but row by row.
_UNROLLED_TAPS = 30
# Products of 16-bit data and 8-bit codes below 2**23 each: as many as fit int32.
_SAFE_TAPS = 255
# Neighbouring outputs computed together: for small kernels, for large ones, and for the last few
# channels (measured; more only makes the code longer).
_OUTPUTS, _OUTPUTS_LARGE, _OUTPUTS_TAIL = 8, 4, 2
_OUTPUTS_IN_WORDS, _LEAST_ROWS = 4, 8
_SMALL_TAPS = 9
_MOST_OUTPUTS = 14  # tried by tuning


def depthwise_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> _DepthwiseKernel | None:
    """The depthwise anchor vectorised over channels; None: no form for it."""
    anchor = fused.anchor
    if anchor is None or not isinstance(anchor.spec, Conv2dSpec):
        return None
    spec = anchor.spec
    if not spec.is_depthwise or spec.weight_layout != spec.plain_layout or not takes_weight(spec):
        return None
    if spec.kernel[1] > _UNROLLED_TAPS or (
        spec.data_dtype == "int16" and spec.reduction_size > _SAFE_TAPS
    ):
        return None
    operands = find_operands(fused, anchor, spec)
    if operands is None:
        return None
    epilogue = Epilogue(fused, anchor)
    if any(not stage.is_map for stage in epilogue.rest):
        return None
    return _DepthwiseKernel(fused, anchor, spec, operands, target, epilogue, choice)


def takes_weight(spec: Conv2dSpec) -> bool:
    """Whether the kernel can read the layer's codes."""
    return not spec.group_size and spec.weight_dtype in ("float32", "int8", "uint8")


class _DepthwiseKernel:
    """One function being written."""

    def __init__(
        self,
        fused: FusedFunction,
        anchor: Stage,
        spec: Conv2dSpec,
        operands: Operands,
        target: Target,
        epilogue: Epilogue,
        choice: Choice | None,
    ) -> None:
        self.fused, self.anchor, self.spec, self.operands = fused, anchor, spec, operands
        self.target, self.epilogue = target, epilogue
        # A group is one channel; all of them together are the pixel that vectors run along.
        self.window = window_of(spec)
        self.compute = "float32" if not spec.is_integer else "int32"
        self.lanes = min(target.lanes(32), 16)
        self.parallel = target.threads > 1 and spec.macs >= _PARALLEL_MACS
        copied = any(spec.padding) or spec.columns > 1 or operands.data in fused.producers
        self.band = Band(
            self.window,
            copied,
            spec.data_dtype,
            spec.data_dtype,
            lambda value: value,
            spec.pad_value,
            1,
            repeat=spec.columns,
        )
        most = self.band.most_rows(target.l2_bytes // 4)
        outputs = _OUTPUTS if spec.reduction_size <= _SMALL_TAPS else _OUTPUTS_LARGE
        self.columns = min(self.window.columns, outputs, target.vector_registers // 3)
        self.words = tap_words(spec, target, self.lanes)
        if self.words is not None:
            # Shorter bands write more words twice, longer ones leave the caches (measured).
            row = self.words.words(self.window.padded_columns) * 4 * self.lanes
            most = min(most, max(_LEAST_ROWS, 2 * target.l1_bytes // row))
            self.columns = min(self.window.columns, _OUTPUTS_IN_WORDS)
        threads = target.threads if self.parallel else 1
        self.rows = even_rows(self.window.rows, most, self.window.batch, threads)
        self.e = Emitter()
        if choice is not None:
            self.rows, self.columns = choice["band"], choice["columns"]
        if self.words is not None and self.columns % 2 and self.columns < self.window.columns:
            self.columns += 1  # the phase of every output of a tile is known

    def space(self) -> SearchSpace:
        """The default and what lies around it."""
        window = self.window
        return SearchSpace(
            "x86.depthwise",
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
                if lanes == self.lanes and self.words is not None:
                    self._in_words(self.words, source, b, y, channel)
                    continue
                count = self.columns if lanes == self.lanes else min(self.columns, _OUTPUTS_TAIL)
                tiles = ceil_div(window.columns, count)
                with e.loop("row", self.rows) as row, e.loop("tile", tiles) as tile:
                    x = e.bind("x", tirx.min(tile * count, window.columns - count))
                    self._tile(source, b, y, row, x, channel, lanes, count)
        self.epilogue.emit_rest(e, self.lanes)
        return e.function(list(self.fused.func.params), {})

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
    ) -> None:
        """`count` neighbouring outputs of `lanes` channels."""
        e, spec = self.e, self.spec
        acc = e.alloc(count * lanes, self.compute, "acc", registers=True)
        zero = tirx.const(0, self.compute)
        for c in range(count):
            e.store_vector(
                acc, zero if lanes == 1 else tirx.Broadcast(zero, lanes), c * lanes, lanes
            )
        start = e.bind("start", source.base + row * source.step[0] + x * source.step[1] + channel)
        kh = spec.kernel[0]
        if spec.reduction_size <= _UNROLLED_TAPS:
            for ky in range(kh):
                self._kernel_row(acc, source, start, ky, channel, lanes, count)
        else:
            with e.loop("ky", kh) as ky:
                self._kernel_row(acc, source, start, ky, channel, lanes, count)
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

    def _in_words(self, words: TapWords, source: Source, b: Any, y: Any, channel: Any) -> None:
        """All outputs of the band for one block of channels."""
        e, spec, window, lanes = self.e, self.spec, self.window, self.lanes
        columns = self.band.columns
        rows, pitch = window.input_rows(self.rows), words.words(columns)
        buffer = e.alloc(rows * pitch * lanes, "int32", "words")
        inside = max(0, min(pitch, (columns - words.taps) // 2 + 1))
        with e.loop("row", rows) as row:
            start = source.base + row * source.row_pitch + channel

            def write(j: Any, present: int) -> None:
                at = start + j * (2 * source.column_pitch)
                word = words.data_word(source.buffer, at, source.column_pitch, present)
                e.store_vector(buffer, word, (row * pitch + j) * lanes, lanes)

            with e.loop("word", inside) as j:
                write(j, words.taps)
            for last in range(inside, pitch):
                write(tirx.const(last, "int32"), columns - 2 * last)
        weights = words.weight_words(e, self.weight, channel)
        initial = self._initial(words, weights)
        count, full = self.columns, window.columns // self.columns
        with e.loop("row", self.rows) as row:
            first = row * (spec.strides[0] * pitch)

            def tile(x: Any, outputs: int) -> None:
                acc = e.alloc(outputs * lanes, "int32", "acc", registers=True)
                for c in range(outputs):
                    e.store_vector(acc, initial, c * lanes, lanes)
                for ky in range(spec.kernel[0]):
                    origin = first + ky * (spec.dilation[0] * pitch)
                    self._words_row(words, acc, buffer, origin, x, ky, outputs, weights)
                self._finish(acc, b, y + row, x, channel, lanes, outputs)

            with e.loop("tile", full) as index:
                tile(index * count, count)
            if window.columns % count:
                tile(tirx.const(full * count, "int32"), window.columns % count)

    def _words_row(
        self,
        words: TapWords,
        acc: tirx.Buffer,
        buffer: tirx.Buffer,
        origin: Any,
        x: Any,
        ky: int,
        outputs: int,
        weights: dict[tuple[int, int, int], Any],
    ) -> None:
        """The taps of one kernel row for a tile that starts at an even column; a word is loaded
        once."""
        e, lanes = self.e, self.lanes
        begin = e.bind("begin", (origin + x * self.spec.strides[1] // 2) * lanes)
        loaded: dict[int, Any] = {}
        for c in range(outputs):
            for word, phase, index in words.uses(c):
                if word not in loaded:
                    loaded[word] = e.bind("v", vector(buffer, begin + word * lanes, lanes))
                old = vector(acc, c * lanes, lanes)
                value = words.accumulate(old, loaded[word], weights[ky, phase, index])
                e.store_vector(acc, value, c * lanes, lanes)

    def _initial(self, words: TapWords, weights: dict[tuple[int, int, int], Any]) -> Any:
        """What accumulators start from: -128 * sum(w) for flipped data, else zero."""
        zero = words.constant(0)
        if not words.signed:
            return zero
        total: Any = zero
        for (_, phase, _), word in weights.items():
            if phase == 0:
                total = words.accumulate(total, words.constant(-0x7F7F7F80), word)
        return self.e.bind("initial", zero - total)

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
        for kx in range(spec.kernel[1]):
            place = (ky * spec.kernel[1] + kx) * spec.out_channels + channel
            weight = vector(self.weight, place, lanes).astype(_vector_type(self.compute, lanes))
            if spec.weight_zero_point:
                zero_point = tirx.const(spec.weight_zero_point, self.compute)
                weight = weight - (zero_point if lanes == 1 else tirx.Broadcast(zero_point, lanes))
            weight = e.bind("w", weight)
            for c in range(count):
                offset = c * source.column_stride + kx * dx
                if offset not in loaded:
                    at = start + ky * (dy * source.row_pitch) + offset * source.column_pitch
                    loaded[offset] = e.bind("v", self._load(source.buffer, at, lanes))
                value = vector(acc, c * lanes, lanes) + loaded[offset] * weight
                e.store_vector(acc, value, c * lanes, lanes)

    def _load(self, buffer: tirx.Buffer, at: Any, lanes: int) -> ir.Expr:
        value = vector(buffer, at, lanes)
        if dtype_bits(self.spec.data_dtype) == 32:
            return value
        return value.astype(_vector_type(self.compute, lanes))


def _vector_type(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _element(buffer: tirx.Buffer, start: int, dtype: str, lane: Any) -> ir.Expr:
    return buffer[start + lane].astype(dtype)
