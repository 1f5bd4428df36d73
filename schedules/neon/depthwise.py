"""Depthwise convolution with NEON: bytes of eight channels by their weights, chained in 16 bits as
long as the weights prove that nothing wraps (`smull`, `smlal`), then added to 32 bits (`saddw`)."""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..band import Source
from ..choice import Choice
from ..depthwise_kernel import UNROLLED_TAPS, DepthwiseKernel, depthwise_kernel_as
from ..dot import flip_sign
from ..emit import splat, vector
from ..fused import FusedFunction
from ..spec import WeightedSpec
from .dot import multiplies_bytes, multiply_halves
from .epilogue import NeonEpilogue

_LANES = 16
_HALF = 8  # that one instruction multiplies
_OFFSET = 128
_LONG_ROW = 10  # outputs; two at a time save 6 % (counted)


def depthwise_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> NeonDepthwiseKernel | None:
    """The depthwise anchor vectorised over channels; None: no form for it."""
    return depthwise_kernel_as(NeonDepthwiseKernel, fused, target, choice)


def taps_in_turn(spec: WeightedSpec) -> int:
    """Taps that are written out, one behind the other: chains start anew with every so many."""
    terms = spec.reduction_size
    return terms if terms <= UNROLLED_TAPS else spec.reduction[1]


class NeonDepthwiseKernel(DepthwiseKernel):
    """One function being written."""

    name = "neon.depthwise"
    epilogue_type = NeonEpilogue

    @property
    def is_bytes(self) -> bool:
        """Whether data and weights are multiplied as signed bytes."""
        return multiplies_bytes(self.spec)

    @property
    def is_flipped(self) -> bool:
        """Whether data are x - 128 in the copy, and 128 * sum(w) is added."""
        return self.is_bytes and self.spec.data_dtype == "uint8"

    def _lanes(self) -> int:
        return _LANES if self.is_bytes else super()._lanes()

    def _outputs(self) -> int:
        if not self.is_bytes:
            return super()._outputs()
        # An odd row would be computed half an output longer (the last tile is moved back inside).
        columns = self.window.columns
        pays = self.target.vector_registers > 16 and (columns % 2 == 0 or columns > _LONG_ROW)
        return 2 if pays else 1

    def _data_dtype(self) -> str:
        return "int8" if self.is_flipped else super()._data_dtype()

    def _convert(self, value: ir.Expr) -> ir.Expr:
        return flip_sign(value) if self.is_flipped else value

    def _pad_value(self) -> int:
        return self.spec.pad_value - _OFFSET * self.is_flipped

    def _initial(self, channel: Any, lanes: int) -> Any:
        initial = super()._initial(channel, lanes)
        if not self.is_flipped:
            return initial
        dtype = "int32" if lanes == 1 else f"int32x{lanes}"
        for tap in range(self.spec.reduction_size):
            weight = self._weight(tap, channel, lanes).astype(dtype)
            initial = initial + weight * splat(tirx.const(_OFFSET, "int32"), lanes)
        return self.e.bind("initial", initial)

    def _weight(self, tap: Any, channel: Any, lanes: int) -> ir.Expr:
        return vector(self.weight, tap * self.spec.out_channels + channel, lanes)

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
        if not self.is_bytes or lanes < _HALF:
            super()._taps(acc, source, start, rows, channel, lanes, count)
            return
        e, spec = self.e, self.spec
        (dy, dx), width = spec.dilation, spec.kernel[1]
        taps = [(ky, kx) for ky in rows for kx in range(width)]
        chain, is_64 = max(1, spec.chain), self.target.has("aarch64")
        loaded: dict[tuple[Any, int], Any] = {}

        def data(ky: Any, offset: int) -> Any:
            if (ky, offset) not in loaded:
                at = start + ky * (dy * source.row_pitch) + offset * source.column_pitch
                loaded[ky, offset] = e.bind("v", vector(source.buffer, at, lanes))
            return loaded[ky, offset]

        for begin in range(0, len(taps), chain):
            some = taps[begin : begin + chain]
            weights = [
                e.bind("w", self._weight(ky * width + kx, channel, lanes)) for ky, kx in some
            ]
            for c in range(count):
                values = [data(ky, c * source.column_stride + kx * dx) for ky, kx in some]
                for half in range(0, lanes, _HALF):
                    at = c * lanes + half
                    sums: Any = None
                    for value, weight in zip(values, weights, strict=True):
                        product = multiply_halves(is_64, _half(value, half), _half(weight, half))
                        sums = product if sums is None else sums + product
                    total = vector(acc, at, _HALF) + sums.astype(f"int32x{_HALF}")
                    e.store_vector(acc, total, at, _HALF)


def _half(value: Any, first: int) -> ir.Expr:
    """Eight channels from lane `first` on."""
    if str(value.ty.dtype) == f"int8x{_HALF}":
        return value
    return tirx.Shuffle([value], [tirx.const(first + i, "int32") for i in range(_HALF)])
