"""The epilogue on scalars without an FPU: float32 requantisation by an integer product.

    lrint(float(x) * m)  =>  (high(x * M) + half) >> n     where no tie is near, else exactly

M and n are mantissa and exponent of m. The product's high half is below the exact one by less
than 1, and both roundings of float32 move a result that no clamp of bytes swallows (|x*m| < 512)
by less than 2^-13. Where the fraction leaves more room than that on both sides of a tie, the
quotient rounds like the float; else a helper computes it, from the whole product or, where even
that is too close, in float32. So the integers are those of every other target.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..arm.epilogue import DspEpilogue
from ..arm.patterns import is_lrint
from ..arm.rounding import finisher
from ..emit import Emitter
from ..fused import FusedFunction, Index, Stage
from .exact import NAME, exact_product

_FRACTION_BITS = 6
"""So many bits of the fraction decide whether a tie is near: one product in 64 is looked at
again."""
_LEAST_SHIFT, _MOST_SHIFT = 3, 14
_FAST = "tvmc_scaled"


def _int(value: int) -> ir.Expr:
    return tirx.const(value, "int32")


class ScalarEpilogue(DspEpilogue):
    """Biases where sums start, constants loaded once a channel, no floats where there is no FPU."""

    def __init__(self, fused: FusedFunction, anchor: Stage, target: Target) -> None:
        super().__init__(fused, anchor, target)
        self._finisher = finisher(target)
        self._factors: dict[Any, tuple[ir.Expr, ...]] = {}
        self._in_integers = not target.has("fpu") and all(
            str(output.dtype) in ("int8", "uint8") for output in fused.outputs
        )
        self._is_used = False

    def start_channel(self, e: Emitter, indices: Index | None = None) -> None:
        super().start_channel(e, indices)
        self._factors = {}
        if self._in_integers and indices is not None:
            for constant in self._constants.values():
                if str(constant.ty.dtype) == "float32":
                    self._factors[constant] = self._integers(e, constant)

    def finish(self, value: ir.Expr) -> ir.Expr:
        value = super().finish(value)
        if self._in_integers:
            value = self._scaled(value)
        return self._finisher(value)

    def helpers(self) -> str:
        """LLVM's form of what the expressions call."""
        if not self._is_used:
            return ""
        high = _HIGH_PRODUCT if self._has_high_product else _HIGH_PRODUCT_OF_HALVES
        return _helpers(self.target, high)

    def _scaled(self, e: Any) -> ir.Expr:
        """`e` with what is rounded to a byte computed in integers."""
        if isinstance(e, tirx.Cast):
            return tirx.Cast(e.ty, self._scaled(e.value))
        if isinstance(e, (tirx.Min, tirx.Max, tirx.Add, tirx.Sub)) and isinstance(e.b, tirx.IntImm):
            return type(e)(self._scaled(e.a), e.b)
        if not isinstance(e, ir.Call) or not is_lrint(e):
            return e
        low = high = None
        inner = e.args[-1]
        if isinstance(inner, tirx.Max) and isinstance(inner.a, tirx.Min):
            low, high, inner = inner.b, inner.a.b, inner.a.a
            if not isinstance(low, tirx.FloatImm) or not isinstance(high, tirx.FloatImm):
                return e
        if not isinstance(inner, tirx.Mul) or not isinstance(inner.a, tirx.Cast):
            return e
        total, factor = inner.a.value, inner.b
        if str(total.ty.dtype) != "int32" or not isinstance(factor, tirx.Var):
            return e
        code = self._product(total, factor)
        if low is not None and high is not None:
            code = tirx.max(tirx.min(code, _int(int(high.value))), _int(int(low.value)))
        return code

    def _product(self, total: ir.Expr, factor: tirx.Var) -> ir.Expr:
        """lrint(float(total) * factor), right after a clamp of bytes."""
        e = self._emitter
        assert e is not None
        self._is_used = True
        if factor not in self._factors:
            self._factors[factor] = self._integers(e, factor)
        bits, mantissa, shift, plus, near = self._factors[factor]
        return tirx.call_pure_extern("int32", _FAST, total, bits, mantissa, shift, plus, near)

    @property
    def _has_high_product(self) -> bool:
        return not self.target.has("thumb") or self.target.has("thumb2")

    def _integers(self, e: Emitter, factor: tirx.Var) -> tuple[ir.Expr, ...]:
        """Bits of a float32, its mantissa, the shift to the right behind the product, what is added
        in front of it, and which bits are all 0 near a tie (none: every product is near)."""
        bits = e.bind("bits", tirx.reinterpret("int32", factor))
        one = _int(1)
        if self._has_high_product:
            # 31 bits: the high half is x*m * 2^shift.
            mantissa = tirx.bitwise_or(
                tirx.bitwise_and(bits << _int(7), _int(0x3FFFFF80)), _int(1 << 30)
            )
        else:
            # 15 bits, rounded: an error of 2^-16 of the product.
            mantissa = tirx.bitwise_or(tirx.bitwise_and(bits, _int(0x7FFFFF)), _int(1 << 23))
            mantissa = (mantissa + _int(0x100)) >> _int(9)
        mantissa = e.bind("mantissa", mantissa)
        shift = e.bind("shift", _int(125) - (bits >> _int(23)))
        is_fast = tirx.all(shift >= _int(_LEAST_SHIFT), shift <= _int(_MOST_SHIFT))
        safe = e.bind("safe", tirx.Select(is_fast, shift, _int(_LEAST_SHIFT)))
        room = tirx.max(safe - _int(_FRACTION_BITS), _int(2))
        room = e.bind("room", one << room)
        plus = (one << (safe - one)) + (room >> one)
        near = tirx.Select(is_fast, (one << safe) - room, _int(0))
        return bits, mantissa, safe, e.bind("plus", plus), e.bind("near", near)


_HIGH_PRODUCT = """
  %x64 = sext i32 %x to i64
  %m64 = sext i32 %mantissa to i64
  %product = mul nsw i64 %x64, %m64
  %above = ashr i64 %product, 32
  %high = trunc i64 %above to i32
"""
# By halves: there is no product of more than 32 bits.
_HIGH_PRODUCT_OF_HALVES = """
  %bottom = and i32 %x, 65535
  %low = mul i32 %bottom, %mantissa
  %carry = lshr i32 %low, 16
  %top = ashr i32 %x, 16
  %most = mul i32 %top, %mantissa
  %high = add i32 %most, %carry
"""


def _helpers(target: Target, high_product: str) -> str:
    """What is computed of every sum, and what only near a tie."""
    lines = exact_product(target).replace('"', "\\22").splitlines()
    assembly = "\n".join(f'module asm "{line}"' for line in lines)
    return f"""{assembly}
declare i32 @{NAME}(i32 %x, i32 %bits) nounwind memory(none)
define internal i32 @{_FAST}(i32 %x, i32 %bits, i32 %mantissa, i32 %shift, i32 %plus, i32 %near)
    alwaysinline nounwind memory(none) {{
entry:{high_product}
  %raised = add i32 %high, %plus
  %room = and i32 %raised, %near
  %istie = icmp eq i32 %room, 0
  br i1 %istie, label %again, label %fast
again:
  %exact = call i32 @{NAME}(i32 %x, i32 %bits) nounwind memory(none)
  br label %done
fast:
  %quotient = ashr i32 %raised, %shift
  br label %done
done:
  %r = phi i32 [ %exact, %again ], [ %quotient, %fast ]
  ret i32 %r
}}
"""
