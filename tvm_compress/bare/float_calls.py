"""Arithmetic on floats that LLVM leaves to the compiler's library on 32-bit Arm with an FPU.

LLVM passes their floats in FPU registers, as this calling convention has it; the library's
functions take them in others (Run-time ABI for the Arm Architecture: always the base standard).
So kernels call them by names of our own, and the project defines those in C, which the target's
compiler turns into the right calls. The new names are as long as the old ones.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..targets import Target

_TYPES = {"d": "double", "s": "float", "si": "int32_t", "di": "int64_t"}
_UNSIGNED = {"si": "uint32_t", "di": "uint64_t"}
_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
# Name => its value; the caller compares it with 0 as C compares a with b. Of NaN: false.
_COMPARISONS = {
    "gt": "a > b ? 1 : -1",
    "ge": "a >= b ? 1 : -1",
    "lt": "a < b ? -1 : 1",
    "le": "a <= b ? -1 : 1",
    "eq": "a == b ? 0 : 1",
    "ne": "a == b ? 0 : 1",
    "unord": "a != a || b != b",
}


def _definitions() -> dict[str, str]:
    """Name in the library => result type, parameters and value of the function."""
    found: dict[str, str] = {}
    for name, operator in _OPERATORS.items():
        found[f"__{name}df3"] = f"double@(double a, double b) {{ return a {operator} b; }}"
    for name, value in _COMPARISONS.items():
        found[f"__{name}df2"] = f"int@(double a, double b) {{ return {value}; }}"
    for short, real in (("d", "double"), ("s", "float")):
        for whole in ("si", "di"):
            if (short, whole) == ("s", "si"):
                continue  # an instruction
            for sign, kind in (("", _TYPES[whole]), ("un", _UNSIGNED[whole])):
                found[f"__float{sign}{whole}{short}f"] = (
                    f"{real}@({kind} a) {{ return ({real})a; }}"
                )
                signed = "uns" if sign else ""
                found[f"__fix{signed}{short}f{whole}"] = (
                    f"{kind}@({real} a) {{ return ({kind})a; }}"
                )
    found["__extendsfdf2"] = "double@(float a) { return (double)a; }"
    found["__truncdfsf2"] = "float@(double a) { return (float)a; }"
    return found


_FUNCTIONS = _definitions()


def is_needed(target: Target) -> bool:
    """Whether the target's floats are passed in FPU registers, and its library's are not."""
    return target.architecture in ("thumb", "armv7l") and target.has("fpu")


def _own(name: str) -> str:
    return name.replace("df", "dF").replace("sf", "sF")


def with_own_names(content: bytes, target: Target) -> bytes:
    """An object file that calls what `definitions` defines."""
    if is_needed(target):
        for name in _FUNCTIONS:
            content = content.replace(f"\0{name}\0".encode(), f"\0{_own(name)}\0".encode())
    return content


def definitions(objects: Iterable[bytes], target: Target) -> str:
    """C of the functions that object files of `with_own_names` call; empty: there are none."""
    if not is_needed(target):
        return ""
    everything = b"".join(objects)
    lines = []
    for name, text in _FUNCTIONS.items():
        own = _own(name)
        if f"\0{own}\0".encode() in everything:
            signature, _, body = text.replace("@", f" {own}").partition(" {")
            lines.append(f"{signature};\n__attribute__((weak)) {signature} {{{body}\n")
    if not lines:
        return ""
    return (
        "\n/* What the kernels' machine code calls where the CPU has no instruction. */\n"
        + "".join(lines)
    )
