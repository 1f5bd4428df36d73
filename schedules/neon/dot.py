"""The inner instructions of NEON's matrix kernels, per capability.

- FloatDot (`../dot.py`) and WordDot multiply registers of four outputs by a *lane* of a register of
  data, which thus brings several steps with one load: `fmla`, `smlal` on 16-bit operands.
- ByteDot does so with four bytes of a lane (`sdot`, with byte matrix products also `sudot`).
- TileDot multiplies eight bytes of two positions by those of two outputs (`smmla`, `usmmla`).
- PairsDot, on CPUs without any of these: 16 bytes of a position by those of one output (`smull`,
  `smlal2`), chained in 16 bits as long as the weights prove that nothing wraps, then added in pairs
  to four partial sums (`sadalp`).

Data are signed bytes where the weights are: unsigned ones become x - 128 when they are copied, and
-128 * sum(w) is subtracted, unless the CPU multiplies unsigned by signed bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...targets import Target
from ..dot import Dot, FloatDot, as_dtype, element, flip_sign
from ..spec import WeightedSpec

if TYPE_CHECKING:
    from tvm import ir

LANES = 4
"""32-bit sums of a register of 128 bits."""
_BYTES = ("int8", "uint8")


class WordDot(Dot):
    """acc[l] += x * w[l], both 16 bits wide"""

    name = "smlal"
    data_dtype = "int16"

    def convert(self, value: ir.Expr) -> ir.Expr:
        return as_dtype(value, "int16")

    def broadcast(self, value: ir.Expr) -> ir.Expr:
        from tvm import tirx

        return tirx.Broadcast(value, self.lanes)

    def widen(self, weight: ir.Expr) -> ir.Expr:
        from tvm import tirx

        wide = weight.astype(f"int16x{self.lanes}")
        if not self.zero_point:
            return wide
        return wide - tirx.Broadcast(tirx.const(self.zero_point, "int16"), self.lanes)

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        dtype = f"int32x{self.lanes}"
        return acc + data.astype(dtype) * weight.astype(dtype)


class SignedDot(Dot):
    """Base of those that multiply signed bytes by signed ones."""

    data_dtype = "int8"

    def convert(self, value: ir.Expr) -> ir.Expr:
        return value if element(value) == "int8" else flip_sign(value)

    def offset(self, dtype: str) -> int:
        return -128 if dtype == "uint8" else 0

    def widen(self, weight: ir.Expr) -> ir.Expr:
        return weight


class ByteDot(SignedDot):
    """acc[l] += sum over j < 4 of x[j] * w[l][j]"""

    name = "sdot"
    speed = 4
    group = 4

    def broadcast(self, value: ir.Expr) -> ir.Expr:
        from tvm import tirx

        four = tirx.reinterpret("int32", value)
        return tirx.reinterpret(f"{self.data_dtype}x16", tirx.Broadcast(four, self.lanes))

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        # LLVM looks for a lane of the last operand.
        return _intrinsic("sdot.v4i32.v16i8", acc, weight, data)


class UnsignedData(Dot):
    """Data are read as they are."""

    data_dtype = "uint8"

    def convert(self, value: ir.Expr) -> ir.Expr:
        return value

    def offset(self, dtype: str) -> int:
        return 0


class MixedByteDot(UnsignedData, ByteDot):
    """The same for unsigned data."""

    name = "usdot"

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        return _intrinsic("usdot.v4i32.v16i8", acc, data, weight)


class TileDot(SignedDot):
    """acc[p][l] += sum over j < 8 of x[p][j] * w[l][j], p and l < 2"""

    name = "smmla"
    speed = 8
    group = 8

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        return _intrinsic("smmla.v4i32.v16i8", acc, data, weight)


class MixedTileDot(UnsignedData, TileDot):
    """The same for unsigned data."""

    name = "usmmla"

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        return _intrinsic("usmmla.v4i32.v16i8", acc, data, weight)


class PairsDot(SignedDot):
    """acc[i] += sum over the halves h of a chain of x[h][2i] * w[h][2i] + x[h][2i + 1] * ..."""

    name = "sadalp"
    speed = 2
    group = 16
    is_chained = True

    HALF: ClassVar[int] = 8
    """Bytes of data that one instruction multiplies."""

    def pairs(self, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        return multiply_halves(True, data, weight)

    def add_pairs(self, acc: ir.Expr, pairs: ir.Expr) -> ir.Expr:
        return acc + _intrinsic("saddlp.v4i32.v8i16", pairs)

    def sum_lanes(self, parts: list[Any]) -> ir.Expr:
        """The sums of four registers, side by side."""
        low, high = (_intrinsic("addp.v4i32", *parts[i : i + 2]) for i in (0, 2))
        return _intrinsic("addp.v4i32", low, high)


class PairsDot32(PairsDot):
    """The same on ARMv7."""

    def pairs(self, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        return multiply_halves(False, data, weight)

    def add_pairs(self, acc: ir.Expr, pairs: ir.Expr) -> ir.Expr:
        from tvm import tirx

        name = "llvm.arm.neon.vpadals.v4i32.v8i16"
        return tirx.call_llvm_pure_intrin("int32x4", name, acc, pairs)

    def sum_lanes(self, parts: list[Any]) -> ir.Expr:
        from tvm import tirx

        def half(value: Any, first: int) -> ir.Expr:
            return tirx.Shuffle([value], [_index(first), _index(first + 1)])

        two = [half(part, 0) + half(part, 2) for part in parts]
        add = "llvm.arm.neon.vpadd.v2i32"
        low, high = (tirx.call_llvm_pure_intrin("int32x2", add, *two[i : i + 2]) for i in (0, 2))
        return tirx.Shuffle([low, high], [_index(i) for i in range(4)])


class OutputsDot(PairsDot):
    """acc[l] += sum over a chain of x[0] * w[l][0] + x[1] * w[l][1]: outputs side by side, four or
    eight (two registers), as sparse kernels need them"""

    group = 2

    _IS_64: ClassVar[bool] = True

    def pairs(self, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        return _each_half(self.lanes, partial(multiply_halves, self._IS_64), data, weight)

    def add_pairs(self, acc: ir.Expr, pairs: ir.Expr) -> ir.Expr:
        return _each_half(self.lanes, super().add_pairs, acc, pairs)


class OutputsDot32(OutputsDot, PairsDot32):
    """The same on ARMv7."""

    _IS_64 = False


def _each_half(lanes: int, operation: Callable[..., ir.Expr], *operands: ir.Expr) -> ir.Expr:
    """An operation on four lanes, on four or eight."""
    from tvm import tirx

    if lanes == LANES:
        return operation(*operands)
    halves = []
    for half in range(2):
        parts = []
        for operand in operands:
            count = int(str(operand.ty.dtype).partition("x")[2]) // 2
            indices = [_index(half * count + i) for i in range(count)]
            parts.append(tirx.Shuffle([operand], indices))
        halves.append(operation(*parts))
    count = int(str(halves[0].ty.dtype).partition("x")[2])
    return tirx.Shuffle(halves, [_index(i) for i in range(2 * count)])


def multiply_halves(is_64: bool, a: ir.Expr, b: ir.Expr) -> ir.Expr:
    """int8x8 * int8x8 => int16x8. (Of conversions LLVM moves those of weights out of loops, and
    then spills.)"""
    from tvm import tirx

    name = "llvm.aarch64.neon.smull.v8i16" if is_64 else "llvm.arm.neon.vmulls.v8i16"
    return tirx.call_llvm_pure_intrin("int16x8", name, a, b)


def _index(number: int) -> ir.Expr:
    from tvm import tirx

    return tirx.const(number, "int32")


def _intrinsic(name: str, *operands: ir.Expr) -> ir.Expr:
    from tvm import tirx

    return tirx.call_llvm_pure_intrin("int32x4", f"llvm.aarch64.neon.{name}", *operands)


def multiplies_bytes(spec: WeightedSpec) -> bool:
    """Whether a layer multiplies bytes by signed bytes and sums fit 32 bits."""
    return (
        spec.data_dtype in _BYTES
        and spec.weight_dtype == "int8"
        and not spec.weight_zero_point
        and spec.acc_dtype == "int32"
    )


def select_dot(spec: WeightedSpec, target: Target, group: int) -> Dot | None:
    """The dot for a layer whose weight is packed in groups of that many positions; None: no form
    is exact for it."""
    is_64, weight = target.has("aarch64"), spec.weight_dtype
    if spec.data_dtype == "float32":
        usable = group == 1 and not spec.weight_zero_point and weight in ("float32", *_BYTES)
        return FloatDot(LANES, weight, True) if usable else None
    if group == WordDot.group:
        usable = weight in _BYTES and abs(spec.weight_zero_point) <= 255
        return WordDot(LANES, weight, True, spec.weight_zero_point) if usable else None
    if not multiplies_bytes(spec):
        return None
    if group == PairsDot.group:
        kind = PairsDot if is_64 else PairsDot32
        return kind(LANES, weight, True, chain=max(spec.chain, 1))
    mixed = spec.data_dtype == "uint8" and target.has("i8mm")
    if group == ByteDot.group and target.has("dotprod"):
        return (MixedByteDot if mixed else ByteDot)(LANES, weight, True)
    if group == TileDot.group and target.has("i8mm"):
        return (MixedTileDot if mixed else TileDot)(LANES, weight, True)
    return None
