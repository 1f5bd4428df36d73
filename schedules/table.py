"""Table look-up: any function of one 8- or 16-bit code."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx

from .prim import BROADCAST, make_prim_func


def table_lookup(shape: Sequence[int], dtype: str, out_dtype: str) -> tirx.PrimFunc:
    """(codes, table) -> table[code - min(dtype)]; table has 256 or 65,536 entries of `out_dtype`."""
    bits, signed = int(dtype.lstrip("uint")), not dtype.startswith("u")
    if bits not in (8, 16):
        raise ValueError(f"no table for {dtype} codes; allowed: int8, uint8, int16, uint16")
    x = te.placeholder(shape, dtype, name="x")
    table = te.placeholder((1 << bits,), out_dtype, name="table")
    offset = tirx.const(1 << (bits - 1) if signed else 0, "int32")
    out = te.compute(shape, lambda *i: table[x[i].astype("int32") + offset], name="table")
    return make_prim_func("table", [x, table], out, ["data", "table"], BROADCAST)
