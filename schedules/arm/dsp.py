"""The DSP extension (Cortex-M4, M7, M33): two 16-bit multiply-adds an instruction.

`smlad` adds the products of both halves of two words to a third. 8-bit weights become 16-bit ones
while they are used: `sxtb16` extends bytes 0 and 2 of a word, and with the word turned by 8 bits
bytes 1 and 3.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx

from ..emit import vector


def word(buffer: tirx.Buffer, base: Any, lanes: int) -> ir.Expr:
    """Four bytes or two 16-bit integers of a flat buffer, from element `base` on, as they lie."""
    return tirx.reinterpret("int32", vector(buffer, base, lanes))


def extend_even(value: ir.Expr, signed: bool = True) -> ir.Expr:
    """Bytes 0 and 2 as two 16-bit integers."""
    return tirx.call_llvm_pure_intrin(
        "int32", "llvm.arm.sxtb16" if signed else "llvm.arm.uxtb16", value
    )


def extend_odd(value: ir.Expr, signed: bool = True) -> ir.Expr:
    """Bytes 1 and 3 as two 16-bit integers."""
    turned = tirx.call_llvm_pure_intrin("int32", "llvm.fshr", value, value, tirx.const(8, "int32"))
    return extend_even(turned, signed)


def join_low(low: ir.Expr, high: ir.Expr) -> ir.Expr:
    """The low halves of two words (`pkhbt`)."""
    return (low & tirx.const(0xFFFF, "int32")) | (high << tirx.const(16, "int32"))


def join_high(low: ir.Expr, high: ir.Expr) -> ir.Expr:
    """The high halves of two words (`pkhtb`)."""
    shifted = (low >> tirx.const(16, "int32")) & tirx.const(0xFFFF, "int32")
    return shifted | (high & tirx.const(-0x10000, "int32"))


def multiply_add(acc: ir.Expr, a: ir.Expr, b: ir.Expr) -> ir.Expr:
    """acc + a.low * b.low + a.high * b.high"""
    return tirx.call_llvm_pure_intrin("int32", "llvm.arm.smlad", a, b, acc)


def multiply_add_halves(acc: ir.Expr, a: ir.Expr, a_high: int, b: ir.Expr, b_high: int) -> ir.Expr:
    """acc + one half of a * one half of b."""
    name = "llvm.arm.smla" + "bt"[a_high] + "bt"[b_high]
    return tirx.call_llvm_pure_intrin("int32", name, a, b, acc)
