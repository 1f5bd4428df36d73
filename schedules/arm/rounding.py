"""Rounding without a mathematical library, with the instructions that Arm's small cores have.

    lrint(clamp(x))      =>  clamp(vcvtr(x))            one conversion, half to even; it saturates
    clamp(v) + z         =>  clamp'(v + z), saturating  bounds of a whole type become one `ssat`
    TFLite's multiplication by mantissa and exponent: no comparison, no 64-bit shift

The integers are the same for every input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import tvm_ffi
from tvm import ir, tirx
from tvm.ir.prim.expr import LShift, RShift

from ...targets import Target
from ..requantize import multiply_by_quantized_multiplier


def finisher(target: Target) -> Callable[[ir.Expr], ir.Expr]:
    """What a target makes of expressions before they are stored."""
    if target.has("thumb2", "fpu") and not target.has("mve"):
        return lambda value: _Finish(True).visit(value)
    if target.has("thumb2"):
        return lambda value: _Finish(False).visit(value)
    return lambda value: value


def _int(value: int) -> ir.Expr:
    return tirx.const(value, "int32")


class _Finish:
    def __init__(self, has_fpu: bool) -> None:
        self.has_fpu = has_fpu

    def visit(self, e: ir.Expr) -> ir.Expr:
        if isinstance(e, tirx.Add):
            multiplied = self._tflite(e)
            if multiplied is not None:
                return multiplied
            clamped = self._clamped(e.a)
            if clamped is not None and isinstance(e.b, tirx.IntImm):
                value, low, high = clamped
                plus = int(e.b.value)
                moved = (
                    tirx.call_llvm_pure_intrin("int32", "llvm.sadd.sat", value, _int(plus))
                    if plus
                    else value
                )
                return tirx.max(tirx.min(moved, _int(high + plus)), _int(low + plus))
            return tirx.Add(self.visit(e.a), self.visit(e.b))
        if isinstance(e, ir.Call):
            if self.has_fpu and _is_lrint(e):
                clamped = self._clamped(e)
                if clamped is not None:
                    value, low, high = clamped
                    return tirx.max(tirx.min(value, _int(high)), _int(low))
                return self._convert(e.args[-1])
            return ir.Call(
                e.op, [self.visit(a) for a in e.args], e.attrs, ty_args=e.ty_args, ret_ty=e.ty
            )
        if isinstance(e, tirx.Cast):
            return tirx.Cast(e.ty, self.visit(e.value))
        if isinstance(e, tirx.Select):
            return tirx.Select(
                self.visit(e.condition), self.visit(e.true_value), self.visit(e.false_value)
            )
        if hasattr(e, "a") and hasattr(e, "b"):
            return type(e)(self.visit(e.a), self.visit(e.b))
        return e

    def _convert(self, x: ir.Expr) -> ir.Expr:
        """float32 => int32, half to even, saturating."""
        rounded = tirx.call_llvm_pure_intrin("float32", "llvm.arm.vcvtr", self.visit(x))
        return tirx.reinterpret("int32", rounded)

    def _clamped(self, e: ir.Expr) -> tuple[ir.Expr, int, int] | None:
        """lrint(max(min(x, high), low)) as (converted x, low, high)."""
        if not (self.has_fpu and isinstance(e, ir.Call) and _is_lrint(e)):
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

    def _tflite(self, e: tirx.Add) -> ir.Expr | None:
        """TFLite's double rounding: a product rounded half up to 31 bits, then a division by a
        power of two, half away from zero."""
        found = _factors(e)
        if found is None:
            return None
        x, mantissa, exponent = found
        if not tvm_ffi.structural_equal(multiply_by_quantized_multiplier(x, mantissa, exponent), e):
            return None
        x, exponent = self.visit(x), self.visit(exponent)
        zero = _int(0)
        left, right = tirx.max(exponent, zero), tirx.max(zero - exponent, zero)
        wide = (x << left).astype("int64") * mantissa.astype("int64")
        product = ((wide + tirx.const(1 << 30, "int64")) >> tirx.const(31, "int64")).astype("int32")
        half = (_int(1) << right) >> _int(1)
        # One less for what is negative, but not where there is nothing to round.
        return (product + tirx.max(half + (product >> _int(31)), zero)) >> right


def _is_lrint(e: ir.Call) -> bool:
    name = str(getattr(e.op, "name", ""))
    return name == "tirx.call_llvm_pure_intrin" and int(e.args[0].value) == _lrint()


@cache
def _lrint() -> int:
    """The number of llvm.lrint in this LLVM."""
    call = tirx.call_llvm_pure_intrin("int32", "llvm.lrint", tirx.const(0, "float32"))
    return int(call.args[0].value)


def _factors(e: tirx.Add) -> tuple[ir.Expr, ir.Expr, ir.Expr] | None:
    """x, mantissa and exponent of what may be a multiplication of TFLite's."""
    if not isinstance(e.a, RShift) or not isinstance(e.b, tirx.Cast):
        return None
    product, right = e.a.a, e.a.b
    if not isinstance(right, tirx.Max) or not isinstance(right.a, tirx.Sub):
        return None
    if not isinstance(product, tirx.Cast) or not isinstance(product.value, RShift):
        return None
    total = product.value.a
    if not isinstance(total, tirx.Add) or not isinstance(total.a, tirx.Mul):
        return None
    shifted, mantissa = total.a.a, total.a.b
    if not isinstance(shifted, tirx.Cast) or not isinstance(mantissa, tirx.Cast):
        return None
    if not isinstance(shifted.value, LShift):
        return None
    return shifted.value.a, mantissa.value, right.a.b
