"""The C files that a program for a target needs below `main`: start-up code, files of the host."""

from __future__ import annotations

from pathlib import Path
from string import Template

from .machines import MACHINES
from .spec import Target

_FOLDER = Path(__file__).parent / "runtime"
_COMMON = ("host.h", "main.c", "marks.c")
_OF_SYSTEM = {
    "": ("linux/host.c",),
    "cortex_m": ("semihosting.c", "cortex_m/start.c"),
    "riscv": ("semihosting.c", "riscv/start.S", "riscv/board.c"),
}
_ENTRY = {"cortex_m": "reset", "riscv": "_start"}
LINKER_SCRIPT = "board.ld"
LEAST_STACK_BYTES = 8 * 1024


def runtime_files(target: Target) -> dict[str, str]:
    """Relative path => text, for the machine that the target is emulated on.

    With `main.c`, which runs a model over a file of samples, and for bare metal `board.ld`.
    """
    system = MACHINES[target.machine].runtime if target.machine else ""
    files = {name: (_FOLDER / name).read_text() for name in (*_COMMON, *_OF_SYSTEM[system])}
    if system:
        machine = MACHINES[target.machine]
        files[LINKER_SCRIPT] = linker_script(system, machine.flash, machine.ram)
    return files


def startup_sources(target: Target) -> tuple[str, ...]:
    """What a program needs below its own `main`: for bare metal, start-up code and semihosting."""
    return _OF_SYSTEM[MACHINES[target.machine].runtime] if target.is_bare_metal else ()


def rpc_files() -> dict[str, str]:
    """The same for a shared library that TVM's RPC server loads."""
    name = "rpc/tvm_call.c"
    return {name: (_FOLDER / name).read_text()}


def linker_script(system: str, flash: tuple[int, int], ram: tuple[int, int]) -> str:
    """For memories given as address and bytes; `system` is a folder of `runtime/`."""
    template = Template((_FOLDER / f"{LINKER_SCRIPT}.in").read_text())
    return template.substitute(
        entry=_ENTRY[system],
        flash_address=f"{flash[0]:#010x}",
        flash_bytes=flash[1],
        ram_address=f"{ram[0]:#010x}",
        ram_bytes=ram[1],
        stack_bytes=LEAST_STACK_BYTES,
    )
