"""Rounding without a mathematical library, with the instructions that Arm's small cores have.

    lrint(clamp(x))      =>  clamp(vcvtr(x))            one conversion, half to even; it saturates
    clamp(v) + z         =>  clamp'(v + z), saturating
    clamp(v)             =>  ssat(v), usat(v)           bounds of a byte; a compiler that sees
                                                        comparisons moves the addition behind them
    (p + half) >> n      =>  smmulr for p                TFLite's multiplication of small sums
    (p + a) >> n         =>  smmlar for p + a            the same without codes below zero point

The integers are the same for every input.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm_ffi
from tvm import ir, tirx
from tvm.ir.prim.expr import RShift

from ...targets import Target
from .patterns import high_product, is_lrint, terms

HIGH_PRODUCT = "tvmc_smmulr"
HIGH_PRODUCT_ADDED = "tvmc_smmlar"


def llvm_helpers() -> str:
    """LLVM's form of what `finisher` calls."""
    pure = "nounwind memory(none)"
    return f"""
define internal i32 @{HIGH_PRODUCT}(i32 %a, i32 %b) alwaysinline {pure} {{
  %r = call i32 asm "smmulr $0, $1, $2", "=r,r,r"(i32 %a, i32 %b) {pure}
  ret i32 %r
}}
define internal i32 @{HIGH_PRODUCT_ADDED}(i32 %a, i32 %b, i32 %c) alwaysinline {pure} {{
  %r = call i32 asm "smmlar $0, $1, $2, $3", "=r,r,r,r"(i32 %a, i32 %b, i32 %c) {pure}
  ret i32 %r
}}
"""


def finisher(target: Target) -> Callable[[ir.Expr], ir.Expr]:
    """What a target makes of expressions before they are stored."""
    if not target.has("thumb2"):
        return lambda value: value
    has_fpu = target.has("fpu") and not target.has("mve")
    return lambda value: _Finish(has_fpu, target.has("dsp")).visit(value)


def _int(value: int) -> ir.Expr:
    return tirx.const(value, "int32")


def _limited(value: ir.Expr, low: int, high: int) -> ir.Expr:
    """max(min(value, high), low): where a bound is that of a byte, saturation takes care of it."""
    if low >= -128 and high <= 127 and (low == -128 or high == 127):
        value = _saturate("llvm.arm.ssat", value)
        wholes = -128, 127
    elif low >= 0 and high <= 255 and (low == 0 or high == 255):
        value = _saturate("llvm.arm.usat", value)
        wholes = 0, 255
    else:
        return tirx.max(tirx.min(value, _int(high)), _int(low))
    if high != wholes[1]:
        return tirx.min(value, _int(high))
    return tirx.max(value, _int(low)) if low != wholes[0] else value


def _saturate(name: str, value: ir.Expr) -> ir.Expr:
    return tirx.call_llvm_pure_intrin("int32", name, value, _int(8))


class _Finish:
    def __init__(self, has_fpu: bool, has_dsp: bool) -> None:
        self.has_fpu, self.has_dsp = has_fpu, has_dsp

    def visit(self, e: ir.Expr) -> ir.Expr:
        if isinstance(e, tirx.Add):
            clamped = self._clamped(e.a)
            if clamped is not None and isinstance(e.b, tirx.IntImm):
                value, low, high = clamped
                plus = int(e.b.value)
                moved = (
                    tirx.call_llvm_pure_intrin("int32", "llvm.sadd.sat", value, _int(plus))
                    if plus
                    else value
                )
                return _limited(moved, low + plus, high + plus)
            return tirx.Add(self.visit(e.a), self.visit(e.b))
        if isinstance(e, ir.Call):
            if self.has_fpu and is_lrint(e):
                clamped = self._clamped(e)
                if clamped is not None:
                    value, low, high = clamped
                    return _limited(value, low, high)
                return self._convert(e.args[-1])
            return ir.Call(
                e.op, [self.visit(a) for a in e.args], e.attrs, ty_args=e.ty_args, ret_ty=e.ty
            )
        if isinstance(e, RShift):
            small = self._small(e) if self.has_dsp else None
            return RShift(self.visit(e.a), self.visit(e.b)) if small is None else small
        if isinstance(e, tirx.Max) and isinstance(e.a, tirx.Min) and str(e.ty.dtype) == "int32":
            low, high = e.b, e.a.b
            if isinstance(low, tirx.IntImm) and isinstance(high, tirx.IntImm):
                return _limited(self.visit(e.a.a), int(low.value), int(high.value))
        if isinstance(e, tirx.Cast):
            return tirx.Cast(e.ty, self.visit(e.value))
        if isinstance(e, tirx.Select):
            return tirx.Select(
                self.visit(e.condition), self.visit(e.true_value), self.visit(e.false_value)
            )
        if hasattr(e, "a") and hasattr(e, "b"):
            return type(e)(self.visit(e.a), self.visit(e.b))
        return e

    def _small(self, e: RShift) -> ir.Expr | None:
        """(p + (half + (p >> 31))) >> right with p a rounded high product, as `multiply_small` and
        `tflite_add` of bytes write it, for |x| < 2^30 only: so 2x does not overflow, and one
        instruction multiplies and rounds."""
        parts, right = terms(e.a), e.b
        if len(parts) == 2:
            return self._rounded_once(parts[0], parts[1], right)
        if len(parts) != 3:
            return None
        product, *others = parts
        others.sort(key=lambda term: isinstance(term, RShift))
        half, sign = others
        if not isinstance(sign, RShift) or not tvm_ffi.structural_equal(sign.a, product):
            return None
        factors = high_product(product)
        if factors is None:
            return None
        x, mantissa = (self.visit(factor) for factor in factors)
        twice = tirx.shift_left(x, _int(1))
        high = tirx.call_pure_extern("int32", HIGH_PRODUCT, twice, mantissa)
        return (high + (self.visit(half) + (high >> _int(31)))) >> self.visit(right)

    def _rounded_once(self, product: ir.Expr, addend: ir.Expr, right: ir.Expr) -> ir.Expr | None:
        """(p + addend) >> right, as `rounded_once` writes it: for |x| < 2^30 as well."""
        factors = high_product(product)
        if factors is None:
            return None
        x, mantissa = (self.visit(factor) for factor in factors)
        twice = tirx.shift_left(x, _int(1))
        total = tirx.call_pure_extern(
            "int32", HIGH_PRODUCT_ADDED, twice, mantissa, self.visit(addend)
        )
        return total >> self.visit(right)

    def _convert(self, x: ir.Expr) -> ir.Expr:
        """float32 => int32, half to even, saturating."""
        rounded = tirx.call_llvm_pure_intrin("float32", "llvm.arm.vcvtr", self.visit(x))
        return tirx.reinterpret("int32", rounded)

    def _clamped(self, e: ir.Expr) -> tuple[ir.Expr, int, int] | None:
        """lrint(max(min(x, high), low)) as (converted x, low, high)."""
        if not (self.has_fpu and isinstance(e, ir.Call) and is_lrint(e)):
            return None
        upper = e.args[-1]
        if not isinstance(upper, tirx.Max) or not isinstance(upper.a, tirx.Min):
            return None
        low, high = upper.b, upper.a.b
        if not isinstance(low, tirx.FloatImm) or not isinstance(high, tirx.FloatImm):
            return None
        bounds = int(low.value), int(high.value)
        if max(abs(bound) for bound in bounds) >= 1 << 24:
            return None
        return self._convert(upper.a.a), *bounds
