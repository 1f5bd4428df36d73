"""Rounding half to even where neither a library nor an instruction may be asked for it.

`nearbyintf`, `lrintf` and `roundevenf` are calls into a mathematical library on CPUs that have no
such instruction; a board may not have that library. What is written here needs conversions,
comparisons and one addition that is exact, and no addition of a product: a back end that contracts
`a*b + c` into one rounding changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, tirx
from tvm.target.codegen import llvm_lookup_intrinsic_id

from ..targets import Target

_ROUNDED = {ir.Op.get("tirx.round"), ir.Op.get("tirx.nearbyint")}
_PURE_INTRINSIC = ir.Op.get("tirx.call_llvm_pure_intrin")
_WHOLE = float(1 << 23)  # from here on every float32 is a whole number


def rounder(target: Target, is_c: bool) -> Callable[[ir.Expr], ir.Expr] | None:
    """What to write instead of a call that rounds; None: LLVM has an instruction for it."""
    if not is_c:
        if target.is_x86 or target.architecture in ("x86_64", "aarch64"):
            return None
        if target.is_bare_metal and target.architecture == "thumb" and target.has("fpu"):
            return _by_fpu
        if target.has("riscv", "fpu"):
            return None  # fcvt, in the rounding mode that a program starts with
    return _portable


def without_library(expr: ir.Expr, to_int32: Callable[[ir.Expr], ir.Expr]) -> ir.Expr:
    """`expr`, its arguments done, without a call that rounds."""
    if not isinstance(expr, ir.Call):
        return expr
    if expr.op in _ROUNDED and _is_float32(expr):
        return _as_float(expr.args[0], to_int32)
    if expr.op == _PURE_INTRINSIC and int(expr.args[0].value) == _lrint():
        return to_int32(expr.args[1])
    return expr


def _lrint() -> int:
    return int(llvm_lookup_intrinsic_id("llvm.lrint"))


def _is_float32(expr: ir.Expr) -> bool:
    return str(expr.ty.dtype).startswith("float32")


def _lanes(expr: ir.Expr) -> int:
    return int(str(expr.ty.dtype).partition("x")[2] or 1)


def _like(value: float | int, dtype: str, lanes: int) -> ir.Expr:
    constant = tirx.const(value, dtype)
    return constant if lanes == 1 else tirx.Broadcast(constant, lanes)


def _wide(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _portable(x: ir.Expr) -> ir.Expr:
    """int32 nearest to x, |x| < 2^31, ties to even.

    The magnitude is cut to a whole number t; above t + 1/2, or on it with t odd, it is one more.
    From 2^23 on t + 1/2 rounds to t or to t + 1, either of which decides for t.
    """
    lanes = _lanes(x)
    zero, one = _like(0, "int32", lanes), _like(1, "int32", lanes)
    is_negative = x < _like(0.0, "float32", lanes)
    size = tirx.Select(is_negative, _like(0.0, "float32", lanes) - x, x)
    whole = tirx.Cast(ir.PrimType(_wide("int32", lanes)), size)
    middle = tirx.Cast(ir.PrimType(_wide("float32", lanes)), whole) + _like(0.5, "float32", lanes)
    is_odd = tirx.bitwise_and(whole, one)
    up = tirx.Select(size > middle, one, tirx.Select(size < middle, zero, is_odd))
    nearest = whole + up
    return tirx.Select(is_negative, zero - nearest, nearest)


def _by_fpu(x: ir.Expr) -> ir.Expr:
    """VCVTR of Arm's FPU: in the rounding mode of FPSCR, which is half to even unless somebody
    changed it."""
    lanes = _lanes(x)
    if lanes > 1:
        return _portable(x)
    bits = tirx.call_llvm_pure_intrin("float32", "llvm.arm.vcvtr", x)
    return tirx.reinterpret("int32", bits)


def _as_float(x: ir.Expr, to_int32: Callable[[ir.Expr], ir.Expr]) -> ir.Expr:
    """x rounded, as float32, for any finite x."""
    lanes = _lanes(x)
    limit = _like(_WHOLE, "float32", lanes)
    low = _like(-_WHOLE, "float32", lanes)
    small = tirx.max(tirx.min(x, limit), low)
    rounded: Any = tirx.Cast(ir.PrimType(_wide("float32", lanes)), to_int32(small))
    is_small = tirx.all(x > low, x < limit) if lanes == 1 else tirx.And(x > low, x < limit)
    return tirx.Select(is_small, rounded, x)
