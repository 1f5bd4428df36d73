"""Table look-up: any function of one 8- or 16-bit code."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx

from .prim import BROADCAST, make_prim_func


def table_lookup(shape: Sequence[int], dtype: str, out_dtype: str) -> tirx.PrimFunc:
    """(codes, table) -> table[code - min(dtype)]; table has 256 or 65,536 entries of
    `out_dtype`."""
    entries, offset = _codes(dtype)
    x = te.placeholder(shape, dtype, name="x")
    table = te.placeholder((entries,), out_dtype, name="table")
    out = te.compute(shape, lambda *i: table[x[i].astype("int32") + offset], name="table")
    return make_prim_func("table", [x, table], out, ["data", "table"], BROADCAST)


def channel_table_lookup(
    shape: Sequence[int], axis: int, dtype: str, out_dtype: str
) -> tirx.PrimFunc:
    """(codes, tables [channels, entries]) -> tables[i[axis], code - min(dtype)]."""
    entries, offset = _codes(dtype)
    x = te.placeholder(shape, dtype, name="x")
    table = te.placeholder((shape[axis], entries), out_dtype, name="table")
    out = te.compute(
        shape, lambda *i: table[i[axis], x[i].astype("int32") + offset], name="channel_table"
    )
    return make_prim_func("channel_table", [x, table], out, ["data", "table"], BROADCAST)


def _codes(dtype: str) -> tuple[int, tirx.PrimExpr]:
    """Number of codes, and what makes the smallest one index 0."""
    bits, signed = int(dtype.lstrip("uint")), not dtype.startswith("u")
    if bits not in (8, 16):
        raise ValueError(f"no table for {dtype} codes; allowed: int8, uint8, int16, uint16")
    return 1 << bits, tirx.const(1 << (bits - 1) if signed else 0, "int32")
