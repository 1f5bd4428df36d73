"""What the runners emulate: QEMU's command line and memory map, by name."""

from __future__ import annotations

from dataclasses import dataclass

_KIB, _MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Machine:
    """One emulated machine. For user-mode emulation there is no memory map."""

    emulator: str
    arguments: tuple[str, ...]
    runtime: str = ""
    """Folder of `targets/runtime/` with its start-up code; empty: the operating system's."""
    flash: tuple[int, int] = (0, 0)
    """Address and bytes of the memory that code and constants are in."""
    ram: tuple[int, int] = (0, 0)
    tick_ns: float = 0.0
    """Length of a tick of the timer that `-icount` advances by one ns an instruction; 0: none."""


def _mps(name: str, memory_bytes: int, tick_ns: float) -> Machine:
    return Machine(
        emulator="qemu-system-arm",
        arguments=("-M", name),
        runtime="cortex_m",
        flash=(0x00000000, memory_bytes),
        ram=(0x20000000, memory_bytes),
        tick_ns=tick_ns,
    )


def _virt(emulator: str, *arguments: str) -> Machine:
    return Machine(
        emulator=emulator,
        arguments=("-M", "virt", "-bios", "none", *arguments),
        runtime="riscv",
        # One RAM of 128 MiB, parted.
        flash=(0x80000000, 16 * _MIB),
        ram=(0x81000000, 16 * _MIB),
        tick_ns=100.0,  # mtime, 10 MHz
    )


MACHINES: dict[str, Machine] = {
    "mps2-an385": _mps("mps2-an385", 4 * _MIB, 40.0),
    "mps2-an386": _mps("mps2-an386", 4 * _MIB, 40.0),
    "mps2-an500": _mps("mps2-an500", 4 * _MIB, 40.0),
    "mps3-an547": _mps("mps3-an547", 512 * _KIB, 31.25),
    "virt-rv32": _virt("qemu-system-riscv32"),
    "virt-rv64": _virt("qemu-system-riscv64"),
    "virt-rv64v": _virt("qemu-system-riscv64", "-cpu", "rv64,v=true,vext_spec=v1.0,vlen=128"),
    "aarch64-a53": Machine("qemu-aarch64", ("-cpu", "cortex-a53")),
    "aarch64-a72": Machine("qemu-aarch64", ("-cpu", "cortex-a72")),
    "aarch64-a76": Machine("qemu-aarch64", ("-cpu", "cortex-a76")),
    "aarch64-n1": Machine("qemu-aarch64", ("-cpu", "neoverse-n1")),
    # Of Cortex-A55 and of byte matrix products QEMU 7.2 has no CPU but the one with everything.
    "aarch64-max": Machine("qemu-aarch64", ("-cpu", "max")),
    "armv7-a7": Machine("qemu-arm", ("-cpu", "cortex-a7")),
}
