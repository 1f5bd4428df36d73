"""Decoding of weights that are stored without their zeros: 64, 16 or eight of them at a time.

AVX-512 has instructions that spread a register's first values over the lanes whose bits are set.
Without them `pdep` does that for eight bytes, or makes the numbers of eight lanes for `vpermps`.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..emit import vector
from ..stored_weight import WORD, StoredKernel
from .by_bits import EXPAND_BYTES, EXPAND_FLOATS, expand_bytes, expand_floats

# A byte each of eight.
_ONES = 0x0101010101010101
_NUMBERS = 0x0706050403020100


def kernel_class(dtype: str, target: Target) -> type[StoredKernel]:
    """The fastest kernel of a target."""
    found = _forms(dtype, target)
    return found[0] if found else StoredKernel


def cycles_of_a_weight(dtype: str, target: Target) -> float | None:
    """Expected; None: one after the other."""
    found = _forms(dtype, target)
    return found[1] if found else None


def _forms(dtype: str, target: Target) -> tuple[type[StoredKernel], float] | None:
    if dtype in ("int8", "uint8"):
        if target.has("avx512vbmi2"):
            return ExpandedBytes, 0.06
        if target.has("bmi2"):
            return DepositedBytes, 0.7
    if dtype == "float32":
        if target.has("avx512f"):
            return ExpandedFloats, 0.2
        if target.has("avx2", "bmi2"):
            return PermutedFloats, 1.0
    return None


class ExpandedBytes(StoredKernel):
    """vpexpandb, 64 at a time."""

    def helpers(self) -> str:
        return EXPAND_BYTES

    def word(self, place: Any, bits: Any, base: Any) -> None:
        spread = expand_bytes(tirx.address_of(self.values[place]), bits, self.decoding.dtype)
        self.e.store_vector(self.out, spread, base, WORD)


class _InPieces(StoredKernel):
    """Pieces of a word, one behind the other."""

    lanes = 8

    def word(self, place: Any, bits: Any, base: Any) -> None:
        e, lanes = self.e, self.lanes
        for start in range(0, WORD, lanes):
            piece = bits >> tirx.const(start, "uint64") & tirx.const((1 << lanes) - 1, "uint64")
            piece = e.bind("piece", piece)
            e.store_vector(self.out, self.piece(place, piece), base + start, lanes)
            if start + lanes < WORD:
                place = e.bind("place", place + tirx.popcount(piece).astype("int32"))

    def piece(self, place: Any, bits: Any) -> ir.Expr:
        """`lanes` weights by as many bits, from the values from `place` on."""
        raise NotImplementedError


class ExpandedFloats(_InPieces):
    """vexpandps, 16 at a time."""

    lanes = 16

    def helpers(self) -> str:
        return EXPAND_FLOATS

    def piece(self, place: Any, bits: Any) -> ir.Expr:
        return expand_floats(tirx.address_of(self.values[place]), bits.astype("uint16"))


class DepositedBytes(_InPieces):
    """pdep, eight bytes at a time."""

    def piece(self, place: Any, bits: Any) -> ir.Expr:
        loaded = tirx.reinterpret("uint64", vector(self.values, place, self.lanes))
        return tirx.reinterpret(f"{self.decoding.dtype}x8", _deposit(loaded, _bytes(bits)))


class PermutedFloats(_InPieces):
    """vpermps, eight floats at a time, their places made by pdep."""

    def piece(self, place: Any, bits: Any) -> ir.Expr:
        e = self.e
        mask = e.bind("mask", _bytes(bits))
        places = _deposit(tirx.const(_NUMBERS, "uint64"), mask)
        numbers, kept = (
            tirx.reinterpret("int8x8", word).astype("int32x8") for word in (places, mask)
        )
        spread = tirx.call_llvm_pure_intrin(
            "float32x8", "llvm.x86.avx2.permps", vector(self.values, place, 8), numbers
        )
        return tirx.reinterpret(
            "float32x8", tirx.bitwise_and(tirx.reinterpret("int32x8", spread), kept)
        )


def _deposit(value: Any, mask: Any) -> ir.Expr:
    return tirx.call_llvm_pure_intrin("uint64", "llvm.x86.bmi.pdep.64", value, mask)


def _bytes(bits: Any) -> ir.Expr:
    """Eight bits => eight bytes, each all ones or zero."""
    return _deposit(bits, tirx.const(_ONES, "uint64")) * tirx.const(255, "uint64")
