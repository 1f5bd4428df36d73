"""AVX-512 instructions that take a bit for each element, as functions of LLVM: expanding spreads
the first values at an address over the elements whose bits are set, zeros between them;
compressing brings those elements together.

A kernel that calls one has its text among its `helpers`.
"""

from __future__ import annotations

from tvm import ir, tirx

BYTES, FLOATS = 64, 16


def _function(what: str, name: str, lanes: int, element: str, suffix: str) -> str:
    values, mask = f"<{lanes} x {element}>", f"<{lanes} x i1>"
    intrinsic = f"llvm.x86.avx512.mask.{what}.v{lanes}{suffix}"
    returned, output, end = values, "", f"  ret {values} %r"
    if what == "compress":
        returned, output = "void", ", ptr %o"
        end = f"  store {values} %r, ptr %o, align 1\n  ret void"
    # vexpandps from memory is slower on Zen 4 than a load and vexpandps: 1.75 against 1.35 ns.
    load = "load volatile" if element == "float" else "load"
    return f"""declare {values} @{intrinsic}({values}, {values}, {mask})
define internal {returned} @{name}(ptr %a, i{lanes} %m{output}) alwaysinline nounwind {{
  %v = {load} {values}, ptr %a, align 1
  %k = bitcast i{lanes} %m to {mask}
  %r = call {values} @{intrinsic}({values} %v, {values} zeroinitializer, {mask} %k)
{end}
}}
"""


COMPRESS_BYTES = _function("compress", "tvmc_compress", BYTES, "i8", "i8")
EXPAND_BYTES = _function("expand", "tvmc_expand_bytes", BYTES, "i8", "i8")
EXPAND_FLOATS = _function("expand", "tvmc_expand_floats", FLOATS, "float", "f32")


def compress_bytes(data: ir.Expr, bits: ir.Expr, out: ir.Expr) -> ir.Expr:
    """Of 64 bytes at the address `data` those of set bits, side by side at `out`, where all 64
    are written. Needs `COMPRESS_BYTES`."""
    return tirx.call_extern("void", "tvmc_compress", data, bits, out)


def expand_bytes(values: ir.Expr, bits: ir.Expr, dtype: str) -> ir.Expr:
    """64 bytes of `dtype` by the values at an address, of which 64 are read. Needs
    `EXPAND_BYTES`."""
    return tirx.call_extern(f"{dtype}x{BYTES}", "tvmc_expand_bytes", values, bits)


def expand_floats(values: ir.Expr, bits: ir.Expr) -> ir.Expr:
    """16 floats by the values at an address, of which 16 are read; `bits` uint16. Needs
    `EXPAND_FLOATS`."""
    return tirx.call_extern(f"float32x{FLOATS}", "tvmc_expand_floats", values, bits)
