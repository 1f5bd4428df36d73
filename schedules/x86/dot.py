"""The inner instruction of a matrix kernel, per capability: what one step of the reduction does.

Four forms of a `Dot`:

- FloatDot: fused multiply-add, group 1; integer codes of weight-only layers are converted on load.
- WordDot: both sides 16 bits wide, pairs multiplied and added to 32 bits (vpmaddwd), group 2.
  Exact: a pair of products is at most 2 * 2**15 * 2**8 for 8-bit weights. (With AVX512-VNNI the
  addition is included.)
- ByteDot: unsigned by signed bytes, four products and the addition in one instruction (vpdpbusd),
  group 4. Exact, it does not saturate. int8 data becomes x + 128 by flipping its top bit when it is
  copied, and 128 * sum(w) is subtracted from the accumulators' initial value.
- ChainDot: the same on CPUs without it. vpmaddubsw adds products in pairs to 16 bits and would
  saturate; the weights prove (`saturation.longest_chain`) how many steps may be added in 16 bits
  before one vpmaddwd widens them. The fewer bits the weights have, the longer the chain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ...targets import Target
from ..dot import Dot, FloatDot, as_dtype, element, flip_sign
from ..spec import WeightedSpec

if TYPE_CHECKING:
    from tvm import ir


class WordDot(Dot):
    """acc[l] += x[0] * w[l][0] + x[1] * w[l][1], 16-bit operands"""

    name = "pmaddwd"
    speed = 2
    group = 2
    data_dtype = "int16"

    _MADD: ClassVar[dict[int, str]] = {
        4: "llvm.x86.sse2.pmadd.wd",
        8: "llvm.x86.avx2.pmadd.wd",
        16: "llvm.x86.avx512.pmaddw.d.512",
    }

    def convert(self, value: ir.Expr) -> ir.Expr:
        return as_dtype(value, "int16")

    def broadcast(self, value: ir.Expr) -> ir.Expr:
        from tvm import tirx

        pair = tirx.reinterpret("int32", value)
        return tirx.reinterpret(f"int16x{2 * self.lanes}", tirx.Broadcast(pair, self.lanes))

    def widen(self, weight: ir.Expr) -> ir.Expr:
        from tvm import tirx

        wide = weight.astype(f"int16x{2 * self.lanes}")
        if not self.zero_point:
            return wide
        return wide - tirx.Broadcast(tirx.const(self.zero_point, "int16"), 2 * self.lanes)

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        from tvm import tirx

        dtype = f"int32x{self.lanes}"
        if self.fused:
            name = f"llvm.x86.avx512.vpdpwssd.{32 * self.lanes}"
            return tirx.call_llvm_pure_intrin(dtype, name, acc, data, weight)
        return acc + tirx.call_llvm_pure_intrin(dtype, self._MADD[self.lanes], data, weight)


class ByteDot(Dot):
    """acc[l] += sum over j < 4 of (x[j] + 128) * w[l][j]"""

    name = "vpdpbusd"
    speed = 4
    group = 4
    data_dtype = "uint8"

    def convert(self, value: ir.Expr) -> ir.Expr:
        return value if element(value) == "uint8" else flip_sign(value)

    def offset(self, dtype: str) -> int:
        return 128 if dtype == "int8" else 0

    def broadcast(self, value: ir.Expr) -> ir.Expr:
        from tvm import tirx

        four = tirx.reinterpret("int32", value)
        return tirx.reinterpret(f"uint8x{4 * self.lanes}", tirx.Broadcast(four, self.lanes))

    def widen(self, weight: ir.Expr) -> ir.Expr:
        return weight

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        from tvm import tirx

        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        return tirx.call_llvm_pure_intrin(f"int32x{self.lanes}", name, acc, data, weight)


class ChainDot(ByteDot):
    """acc[l] += sum over `chain` steps and j < 4 of (x[j] + 128) * w[l][j], in 16 bits within a
    chain"""

    name = "pmaddubsw"
    is_chained = True
    speed = 2

    _PAIRS: ClassVar[dict[int, str]] = {
        4: "llvm.x86.ssse3.pmadd.ub.sw.128",
        8: "llvm.x86.avx2.pmadd.ub.sw",
        16: "llvm.x86.avx512.pmaddubs.w.512",
    }

    def pairs(self, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        """The products of one step, added in pairs: int16 x 2 * lanes."""
        from tvm import tirx

        dtype = f"int16x{2 * self.lanes}"
        return tirx.call_llvm_pure_intrin(dtype, self._PAIRS[self.lanes], data, weight)

    def add_pairs(self, acc: ir.Expr, pairs: ir.Expr) -> ir.Expr:
        """acc + what the chain has summed."""
        from tvm import tirx

        ones = tirx.Broadcast(tirx.const(1, "int16"), 2 * self.lanes)
        return self.add_scaled_pairs(acc, pairs, ones)

    def add_scaled_pairs(self, acc: ir.Expr, pairs: ir.Expr, scales: ir.Expr) -> ir.Expr:
        """acc + what the chain has summed, each half of a lane times its scale (int16)."""
        from tvm import tirx

        dtype, name = f"int32x{self.lanes}", WordDot._MADD[self.lanes]
        return acc + tirx.call_llvm_pure_intrin(dtype, name, pairs, scales)

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        return self.add_pairs(acc, self.pairs(data, weight))


def has_byte_dot(target: Target, lanes: int) -> bool:
    """Whether vpdpbusd exists for registers of `lanes` accumulators."""
    if target.has("avx512vnni"):
        return lanes == 16 or target.has("avx512vl")
    return target.has("avxvnni") and lanes <= 8


def widest_byte_dot(target: Target) -> ByteDot | None:
    """For weights of 8 bits, in the widest registers that have it."""
    lanes = next((lanes for lanes in (16, 8) if has_byte_dot(target, lanes)), None)
    return None if lanes is None else ByteDot(lanes, "int8", True)


def has_pairs(target: Target, lanes: int) -> bool:
    """Whether vpmaddubsw exists for registers of `lanes` 32-bit numbers."""
    return target.has({4: "ssse3", 8: "avx2", 16: "avx512bw"}[lanes])


def select_dot(spec: WeightedSpec, target: Target, lanes: int) -> Dot | None:
    """The dot for a layer with `lanes` outputs a register, or None when no form is exact for it."""
    if lanes not in (4, 8, 16) or lanes > target.lanes(32):
        return None
    if spec.data_dtype == "float32":
        if spec.weight_zero_point:
            return None
        return FloatDot(lanes, spec.weight_dtype, target.has("fma"))
    byte_dot = has_byte_dot(target, lanes)
    if spec.weight_dtype == "int4":  # opened to bytes in registers
        if byte_dot:
            return ByteDot(lanes, "int4", True)
        usable = spec.chain and has_pairs(target, lanes)
        return ChainDot(lanes, "int4", False, chain=spec.chain) if usable else None
    if spec.weight_dtype == "int8" and not spec.weight_zero_point:
        if spec.data_dtype in ("int8", "uint8") and byte_dot:
            return ByteDot(lanes, "int8", True)
        if spec.data_dtype in ("int8", "uint8") and spec.chain and has_pairs(target, lanes):
            return ChainDot(lanes, "int8", False, chain=spec.chain)
        return WordDot(lanes, "int8", byte_dot)
    if spec.weight_dtype in ("int8", "uint8") and abs(spec.weight_zero_point) <= 255:
        return WordDot(lanes, spec.weight_dtype, byte_dot, spec.weight_zero_point)
    return None
