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


def section(name: str) -> list[str]:
    """The opening of a function that several kernels bring along: the linker keeps one."""
    return [
        f'.section .text.{name},"axG",%progbits,{name},comdat',
        f".weak {name}",
        f".hidden {name}",
        ".balign 4",
    ]


def function(name: str, body: list[str]) -> str:
    """A function in a section of its own."""
    head = [
        ".syntax unified",
        ".thumb",
        *section(name),
        ".thumb_func",
        f".type {name}, %function",
        f"{name}:",
    ]
    return "\n".join([*head, *body, f".size {name}, . - {name}"])


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
