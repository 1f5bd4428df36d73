"""Functions of assembly as modules of LLVM's, which a kernel carries along."""

from __future__ import annotations


def as_llvm(name: str, assembly: str, pointers: int, integers: int = 0) -> str:
    """Assembly as a module of LLVM's, for `pragma_import_llvm`. Its arguments are pointers, then
    integers. What is called is NAME_call, which promises that nothing is thrown: or else the linker
    would want an unwinder."""
    lines = ['module asm "{}"'.format(line.replace('"', "\\22")) for line in assembly.splitlines()]
    kinds = ["ptr"] * pointers + ["i32"] * integers
    types = ", ".join(kinds)
    values = ", ".join(f"{kind} %a{i}" for i, kind in enumerate(kinds))
    return "\n".join(
        [
            *lines,
            f"declare void @{name}({types}) nounwind",
            f"define internal void @{name}_call({values}) alwaysinline nounwind {{",
            f"  call void @{name}({values}) nounwind",
            "  ret void",
            "}",
            "",
        ]
    )


ROLLED = "tvmc_rolled"
"""A call that is no instruction, but keeps LLVM from unrolling the loop around it."""
ROLLED_IN_LLVM = f"""
define internal void @{ROLLED}() alwaysinline nounwind {{
  call void asm sideeffect "", ""()
  ret void
}}
"""


def function(name: str, body: list[str], thumb: bool = True) -> str:
    """A function in a section of its own, of which the linker keeps one where several kernels bring
    it along."""
    return "\n".join(
        [
            *([".syntax unified", ".thumb"] if thumb else []),
            f'.section .text.{name},"axG",%progbits,{name},comdat',
            f".weak {name}",
            f".hidden {name}",
            ".balign 4",
            *([".thumb_func"] if thumb else []),
            f".type {name}, %function",
            f"{name}:",
            *body,
            f".size {name}, . - {name}",
        ]
    )


def arguments(frame: int, count: int) -> list[int]:
    """Where the arguments on the stack are for a function that pushed nine registers and has a
    frame of so many bytes."""
    return [frame + 36 + 4 * i for i in range(count)]


def constant(to: str, number: int) -> list[str]:
    """to = number, of 32 bits."""
    out = [f"movw {to}, #{number & 0xFFFF}"]
    return [*out, f"movt {to}, #{number >> 16 & 0xFFFF}"] if number >> 16 else out


def add_constant(to: str, value: str, number: int, scratch: str) -> list[str]:
    """to = value + number"""
    if number == 0 and to == value:
        return []
    if abs(number) <= 4095:
        return [f"{'addw' if number >= 0 else 'subw'} {to}, {value}, #{abs(number)}"]
    return [*constant(scratch, number), f"add {to}, {value}, {scratch}"]


def next_row(distance: int, ring_bytes: int, end: int) -> list[str]:
    """r0 += distance, in a ring of so many bytes (0: there is none), the end of which is at `end`
    in the frame; r2 and r3 are free."""
    out = add_constant("r0", "r0", distance, "r2")
    if not ring_bytes:
        return out
    out += [f"ldr r2, [sp, #{end}]", *constant("r3", ring_bytes)]
    return [*out, "cmp r0, r2", "it hs", "subhs r0, r0, r3"]


def again(counter: int, label: str, register: str = "r2") -> list[str]:
    """One less to do, by a counter in the frame."""
    place = f"[sp, #{counter}]"
    return [
        f"ldr {register}, {place}",
        f"subs {register}, #1",
        f"str {register}, {place}",
        f"bne.w {label}",
    ]


def entry(count: str, bit: int, many: str, odd: str, none: str, to: str, scratch: str) -> list[str]:
    """to = where to jump: label `none` if `count` is 0, else `odd` if it has the bit, else `many`.
    Leaves the flags of the comparison with 0."""
    return [
        f"adr.w {to}, {many}",
        f"adr.w {scratch}, {odd}",
        f"tst {count}, #{bit}",
        "it ne",
        f"movne {to}, {scratch}",
        f"orr {to}, {to}, #1",
        f"adr.w {scratch}, {none}",
        f"orr {scratch}, {scratch}, #1",
        f"cmp {count}, #0",
        "it eq",
        f"moveq {to}, {scratch}",
    ]
