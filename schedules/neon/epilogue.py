"""Integers out of sums with NEON: codes are narrowed by instructions that saturate.

With code = clamp(round(x) + z, low, high), the bounds those of a byte or inside them:

    AArch64   byte(sat16(round(x)) +sat z), then the bounds that are not the byte's own: `sqxtn`,
              `sqadd`, `sqxtn`. Exact: whatever sat16 changes is far outside the bounds.
    ARMv7     round(clamp(x, low - z, high - z)) + z, since bounds are whole numbers; it has no
              rounding instruction, but 1.5 * 2^23 + x has x rounded half to even in its low bits.
              (The clamp stands between product and sum, so nothing can be contracted.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tvm import ir, tirx
from tvm.target.codegen import llvm_lookup_intrinsic_id

from ...targets import Target
from ..epilogue import Epilogue
from ..fused import FusedFunction, Stage

_BOUNDS = {"int8": (-128, 127), "uint8": (0, 255)}
_WIDE = (-(2**15), 2**15 - 1)
# Zero points whose sum with a number of 16 bits saturates only outside of a byte.
_LARGEST_ZERO_POINT = 2**14
# 1.5 * 2^23 as a number and as bits: neighbours are 1 apart from here to 2^22 on both sides.
_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000


class NeonEpilogue(Epilogue):
    """Narrows as above; everything else is written as it stands."""

    def __init__(self, fused: FusedFunction, anchor: Stage, target: Target) -> None:
        super().__init__(fused, anchor, target)
        self.is_64 = target.has("aarch64")

    def finish(self, value: ir.Expr) -> ir.Expr:
        code = _code(value)
        if code is None:
            return value
        if self.is_64:
            return _saturated(code)
        return value if code.rounded is None else _rounded_by_addition(code)


class _Code(NamedTuple):
    """clamp(value + zero_point, low, high), the value either `whole` or `rounded`, not both."""

    whole: Any
    rounded: Any
    zero_point: int
    low: int
    high: int
    dtype: str


def _code(e: ir.Expr) -> _Code | None:
    """The parts of a narrowed, clamped code; None: it is something else."""
    if not isinstance(e, tirx.Cast) or str(e.ty.dtype) not in _BOUNDS:
        return None
    dtype, inner = str(e.ty.dtype), e.value
    least, most = _BOUNDS[dtype]
    if str(inner.ty.dtype) != "int32":
        return None
    outer = _clamp(inner, tirx.IntImm)
    if outer is not None:
        inner = outer[0]
    zero_point = 0
    if isinstance(inner, (tirx.Add, tirx.Sub)) and isinstance(inner.b, tirx.IntImm):
        sign = 1 if isinstance(inner, tirx.Add) else -1
        zero_point, inner = sign * int(inner.b.value), inner.a
    rounded = inner.args[-1] if isinstance(inner, ir.Call) and _is_lrint(inner) else None
    bounds = outer[1:] if outer is not None else None
    if rounded is not None and bounds is None:
        clamped = _clamp(rounded, tirx.FloatImm)
        if clamped is not None:
            rounded = clamped[0]
            bounds = clamped[1] + zero_point, clamped[2] + zero_point
    if bounds is None or abs(zero_point) > _LARGEST_ZERO_POINT:
        return None
    low, high = bounds
    if not least <= low <= high <= most:
        return None
    return _Code(None if rounded is not None else inner, rounded, zero_point, low, high, dtype)


def _clamp(e: ir.Expr, kind: Any) -> tuple[Any, int, int] | None:
    """x, low and high of max(min(x, high), low) with whole numbers."""
    if not isinstance(e, tirx.Max) or not isinstance(e.a, tirx.Min):
        return None
    low: Any = e.b
    high: Any = e.a.b
    if type(low) is not kind or type(high) is not kind:
        return None
    numbers = float(low.value), float(high.value)
    if not all(number.is_integer() for number in numbers):
        return None
    return e.a.a, int(numbers[0]), int(numbers[1])


def _saturated(code: _Code) -> ir.Expr:
    value = code.whole
    if value is None:
        nearest = tirx.call_llvm_pure_intrin("float32", "llvm.roundeven", code.rounded)
        value = tirx.call_llvm_pure_intrin("int32", "llvm.fptosi.sat", nearest)
    value = _limited(value, *_WIDE).astype("int16")
    if code.zero_point:
        offset = tirx.const(code.zero_point, "int16")
        value = tirx.call_llvm_pure_intrin("int16", "llvm.sadd.sat", value, offset)
    least, most = _BOUNDS[code.dtype]
    value = _limited(value, least, most).astype(code.dtype)
    if code.high < most:
        value = tirx.min(value, tirx.const(code.high, code.dtype))
    if code.low > least:
        value = tirx.max(value, tirx.const(code.low, code.dtype))
    return value


def _rounded_by_addition(code: _Code) -> ir.Expr:
    low, high = (float(bound - code.zero_point) for bound in (code.low, code.high))
    # Not tirx.max: a comparison and a choice, two instructions.
    small = tirx.call_llvm_pure_intrin(
        "float32", "llvm.minimum", code.rounded, tirx.const(high, "float32")
    )
    small = tirx.call_llvm_pure_intrin("float32", "llvm.maximum", small, tirx.const(low, "float32"))
    bits = tirx.reinterpret("int32", small + tirx.const(_MAGIC, "float32"))
    return (bits - tirx.const(_MAGIC_BITS - code.zero_point, "int32")).astype(code.dtype)


def _limited(value: ir.Expr, low: int, high: int) -> ir.Expr:
    dtype = str(value.ty.dtype)
    return tirx.max(tirx.min(value, tirx.const(high, dtype)), tirx.const(low, dtype))


def _is_lrint(e: ir.Call) -> bool:
    name = str(getattr(e.op, "name", ""))
    if name != "tirx.call_llvm_pure_intrin":
        return False
    return int(e.args[0].value) == int(llvm_lookup_intrinsic_id("llvm.lrint"))
