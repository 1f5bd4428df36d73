"""exp and erf of float32 in additions and multiplications, so that loops over them become vectors.

The mathematical library computes one value a call, at 5 to 40 ns. These are within 5e-7 of the
value, relatively: what a float sum in another order differs by. Not-a-numbers stay so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm import ir, tirx

# exp(x) = 2^n exp(r) with |r| <= ln(2) / 2. Beyond the first the result overflows to infinity; at
# the second n is -126, and everything from there on is 0.
_LARGEST, _SMALLEST = 88.8, -87.3
# ln(2) in two parts, of which the first times n is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2) - _LN2_HIGH
# Taylor's coefficients are enough for so small an r: r^8 / 8! < 6e-9.
_EXP = [1 / math.factorial(k) for k in range(8)]
# erf(x) / x as a quotient of polynomials in x^2, for |x| up to 4, where erf is 1 in float32:
# weighted least squares of the relative error, reweighted until it was even (2.5e-8).
_ERF_LIMIT = 4.0
_ERF_ABOVE = (
    1.1283791393510447, 0.1935427128082964, 0.05310144017576362, 0.003883242758139811,
    0.00028456340668876924, 1.9867980622114687e-06,
)  # fmt: skip
_ERF_BELOW = (
    1.0, 0.5048553198001229, 0.11534903212062546, 0.015207051489311566, 0.001185546051065221,
    3.7420206793684455e-05,
)  # fmt: skip


def vectorised(expr: ir.Expr) -> ir.Expr:
    """`expr` with every float32 exp and erf written out."""
    if isinstance(expr, ir.Call):
        arguments = [vectorised(a) if isinstance(a, ir.Expr) else a for a in expr.args]
        if str(expr.ty.dtype) == "float32" and len(arguments) == 1:
            name = str(getattr(expr.op, "name", "")).rpartition(".")[2]
            if name in _FUNCTIONS:
                return _FUNCTIONS[name](arguments[0])
        return ir.Call(expr.op, arguments, expr.attrs, ty_args=expr.ty_args, ret_ty=expr.ty)
    if isinstance(expr, tirx.Cast):
        return tirx.Cast(expr.ty, vectorised(expr.value))
    if isinstance(expr, tirx.Select):
        return tirx.Select(
            expr.condition, vectorised(expr.true_value), vectorised(expr.false_value)
        )
    if isinstance(expr, _ARITHMETIC):
        return type(expr)(vectorised(expr.a), vectorised(expr.b))
    return expr


_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Min, tirx.Max)


def exp(x: ir.Expr) -> ir.Expr:
    """e^x."""
    # The constant first: a comparison with a not-a-number is false and takes the second.
    x = tirx.min(_real(_LARGEST), tirx.max(_real(_SMALLEST), x))
    n = tirx.call_llvm_pure_intrin("int32", "llvm.lrint", x * _real(1 / math.log(2)))
    whole = n.astype("float32")
    r = (x - whole * _real(_LN2_HIGH)) - whole * _real(_LN2_LOW)
    # 2^(n-1), twice: n is up to 128, for which there is no float.
    bits = (n + tirx.const(126, "int32")) << tirx.const(23, "int32")
    return _polynomial(_EXP, r) * tirx.reinterpret("float32", bits) * _real(2.0)


def erf(x: ir.Expr) -> ir.Expr:
    """2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x."""
    x = tirx.min(_real(_ERF_LIMIT), tirx.max(_real(-_ERF_LIMIT), x))
    square = x * x
    value = x * _polynomial(_ERF_ABOVE, square) / _polynomial(_ERF_BELOW, square)
    return tirx.min(_real(1.0), tirx.max(_real(-1.0), value))


_FUNCTIONS = {"exp": exp, "erf": erf}


def _polynomial(coefficients: Sequence[float], x: ir.Expr) -> ir.Expr:
    value = _real(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + _real(coefficient)
    return value


def _real(value: float) -> ir.Expr:
    return tirx.const(value, "float32")
