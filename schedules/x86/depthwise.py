"""Depthwise convolution on x86: 8-bit data first go to words of several columns, so that one
instruction computes several taps (`taps.py`)."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ...targets import Target
from ..band import Source
from ..choice import Choice
from ..depthwise_kernel import DepthwiseKernel, DepthwiseLayer, depthwise_kernel_as
from ..emit import vector
from ..fused import FusedFunction
from .taps import TapWords, tap_words

_OUTPUTS_IN_WORDS, _LEAST_ROWS = 4, 8


def depthwise_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> X86DepthwiseKernel | None:
    """The depthwise anchor vectorised over channels; None: no form for it."""
    return depthwise_kernel_as(X86DepthwiseKernel, fused, target, choice)


class X86DepthwiseKernel(DepthwiseKernel):
    """One function being written."""

    name = "x86.depthwise"

    def __init__(self, layer: DepthwiseLayer) -> None:
        self.words = tap_words(layer.spec, layer.target, min(layer.target.lanes(32), 16))
        super().__init__(layer)
        if self.words is not None and self.columns % 2 and self.columns < self.window.columns:
            self.columns += 1  # the phase of every output of a tile is known

    def _outputs(self) -> int:
        return super()._outputs() if self.words is None else _OUTPUTS_IN_WORDS

    def _most_rows(self) -> int:
        most = super()._most_rows()
        if self.words is None:
            return most
        # Shorter bands write more words twice, longer ones leave the caches (measured).
        row = self.words.words(self.window.padded_columns) * 4 * self.lanes
        return min(most, max(_LEAST_ROWS, 2 * self.target.l1_bytes // row))

    def _block(self, source: Source, b: Any, y: Any, channel: Any, lanes: int) -> None:
        if lanes == self.lanes and self.words is not None:
            self._in_words(self.words, source, b, y, channel)
        else:
            super()._block(source, b, y, channel, lanes)

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
        initial = self._words_initial(words, weights)
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

    def _words_initial(self, words: TapWords, weights: dict[tuple[int, int, int], Any]) -> Any:
        """What accumulators start from: -128 * sum(w) for flipped data, else zero."""
        zero = words.constant(0)
        if not words.signed:
            return zero
        total: Any = zero
        for (_, phase, _), word in weights.items():
            if phase == 0:
                total = words.accumulate(total, words.constant(-0x7F7F7F80), word)
        return self.e.bind("initial", zero - total)
