"""Expressions of fixed-point arithmetic, found again in what TE's simplifier made of them."""

from __future__ import annotations

from functools import cache, reduce

import tvm_ffi
from tvm import ir, tirx
from tvm.ir.prim.expr import LShift, RShift

_SHORT = ("int8", "uint8", "int16", "uint16")


def terms(e: ir.Expr) -> list[ir.Expr]:
    """What is added up."""
    if isinstance(e, tirx.Sub) and isinstance(e.b, tirx.IntImm):
        return [*terms(e.a), tirx.IntImm(e.b.ty, -int(e.b.value))]
    return [*terms(e.a), *terms(e.b)] if isinstance(e, tirx.Add) else [e]


def high_product(
    product: ir.Expr, places: int = 31, half: int = 1 << 30
) -> tuple[ir.Expr, ir.Expr] | None:
    """x and m of int32((int64(x) * int64(m) + half) >> places). TE writes a sum x as several
    products."""
    if not isinstance(product, tirx.Cast) or not isinstance(product.value, RShift):
        return None
    total, shift = product.value.a, product.value.b
    if not isinstance(shift, tirx.IntImm) or int(shift.value) != places:
        return None
    products = terms(total)
    if half:
        *products, last = products
        if not isinstance(last, tirx.IntImm) or int(last.value) != half:
            return None
    if not products or not all(isinstance(each, tirx.Mul) for each in products):
        return None
    if not all(tvm_ffi.structural_equal(each.b, products[0].b) for each in products):
        return None
    parts, mantissa = [narrowed(each.a) for each in products], narrowed(products[0].b)
    if mantissa is None or any(part is None for part in parts):
        return None
    return reduce(tirx.Add, parts), mantissa


def narrowed(e: ir.Expr) -> ir.Expr | None:
    """The int32 that int64(e) was made of: TE moves the conversion to what is added and shifted."""
    if isinstance(e, tirx.Cast):
        if str(e.value.ty.dtype) == "int32":
            return e.value
        return tirx.Cast(_int(0).ty, e.value) if str(e.value.ty.dtype) in _SHORT else None
    if isinstance(e, tirx.IntImm):
        return _int(int(e.value)) if abs(int(e.value)) < 1 << 31 else None
    if isinstance(e, (tirx.Add, tirx.Sub, tirx.Mul, LShift)):
        a, b = narrowed(e.a), narrowed(e.b)
        return None if a is None or b is None else type(e)(a, b)
    return None


def is_widened_load(e: ir.Expr) -> bool:
    """Whether an int32 is a narrower integer from memory."""
    return (
        isinstance(e, tirx.Cast)
        and isinstance(e.value, ir.TensorLoad)
        and str(e.ty.dtype) == "int32"
        and str(e.value.ty.dtype) in _SHORT
    )


def is_lrint(e: ir.Call) -> bool:
    """Whether a call rounds a float to an integer, half to even."""
    name = str(getattr(e.op, "name", ""))
    return name == "tirx.call_llvm_pure_intrin" and int(e.args[0].value) == _lrint()


@cache
def _lrint() -> int:
    """The number of llvm.lrint in this LLVM."""
    call = tirx.call_llvm_pure_intrin("int32", "llvm.lrint", tirx.const(0, "float32"))
    return int(call.args[0].value)


def _int(value: int) -> ir.Expr:
    return tirx.const(value, "int32")
