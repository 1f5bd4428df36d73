"""Tables of 256 bytes in registers: 64 look-ups in a handful of instructions (AVX512-VBMI)."""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx

from ..targets import Target
from .emit import Emitter, vector

LANES = 64


def byte_lookup(value: ir.Expr, target: Target) -> tuple[tirx.Buffer, ir.Expr, str] | None:
    """(table, code, dtype of the code) of table[int32(code) - smallest code]; None: something
    else, or no such instruction."""
    if not target.has("avx512vbmi", "avx512bw") or not isinstance(value, ir.TensorLoad):
        return None
    table = value.source
    if str(table.dtype) not in ("int8", "uint8") or [int(n) for n in table.shape] != [256]:
        return None
    index, smallest = value.indices[0], 0
    if isinstance(index, tirx.Add) and isinstance(index.b, tirx.IntImm):
        index, smallest = index.a, -int(index.b.value)
    if not isinstance(index, tirx.Cast):
        return None
    dtype = str(index.value.ty.dtype)
    if (dtype, smallest) not in (("int8", -128), ("uint8", 0)):
        return None
    return table, index.value, dtype


def table_registers(e: Emitter, table: tirx.Buffer) -> list[Any]:
    """The four quarters of a flat table."""
    return [e.bind(f"quarter{k}", vector(table, LANES * k, LANES)) for k in range(4)]


def look_up(quarters: list[Any], codes: ir.Expr, dtype: str, table_dtype: str) -> ir.Expr:
    """64 entries. `codes` are of `dtype`; int8 code c is entry c + 128."""
    signed = f"int8x{LANES}"
    index = tirx.reinterpret(signed, codes)
    if dtype == "int8":
        index = tirx.bitwise_xor(index, tirx.Broadcast(tirx.const(-128, "int8"), LANES))
    quarters = [tirx.reinterpret(signed, quarter) for quarter in quarters]
    # The instruction takes seven bits of an index.
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    low, high = (
        tirx.call_llvm_pure_intrin(signed, name, quarters[k], index, quarters[k + 1])
        for k in (0, 2)
    )
    is_high = index < tirx.Broadcast(tirx.const(0, "int8"), LANES)
    return tirx.reinterpret(f"{table_dtype}x{LANES}", tirx.Select(is_high, high, low))
