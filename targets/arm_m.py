"""Cortex-M: the cores, and boards with their memories. All bare metal.

Cores that QEMU 7.2 has no board of run on the machine of a core that executes all their
instructions: M0+ on M3 (ARMv6-M is a part of ARMv7-M), M33 and M85 on M55.
"""

from __future__ import annotations

from dataclasses import replace

from .spec import Target

PACKAGES = (
    "gcc-arm-none-eabi",
    "libnewlib-arm-none-eabi",
    "qemu-system-arm",
    # The instruction counter is built with the host's compiler at first use.
    "gcc",
    "libc6-dev",
)

_THUMB1 = frozenset({"thumb"})
_THUMB2 = _THUMB1 | {"thumb2", "hwdiv"}
_DSP = _THUMB2 | {"dsp"}  # smlad, sxtb16: two 16-bit multiply-adds an instruction
_HELIUM = _DSP | {"fpu", "fp64", "mve", "mve.fp", "lob"}  # vectors of 128 bits, loops without cost


def _core(
    name: str,
    description: str,
    capabilities: frozenset[str],
    machine: str,
    triple: str,
    compiler_flags: tuple[str, ...],
    *,
    mcpu: str = "",
    vector_bits: int = 32,
    vector_registers: int = 8,
) -> Target:
    is_hard = "fpu" in capabilities
    float_abi = "hard" if is_hard else "soft"
    return Target(
        name=name,
        description=description,
        tvm_options={
            "kind": "llvm",
            # With all four parts, or LLVM takes eabi for an operating system and calls arithmetic
            # in software by the wrong convention. gnu: copies are memcpy, as every C library's.
            "mtriple": f"{triple}-unknown-none-gnueabi{'hf' if is_hard else ''}",
            "mcpu": mcpu or name,
            "mfloat-abi": float_abi,
            # Numbers of 32 bits from a pool, as GCC does for these cores: one instruction, not two.
            **({"mattr": ["+no-movt"]} if "thumb2" in capabilities else {}),
            # Level 3 unrolls twice as far: 3 % of flash with our loops, for nothing.
            **({"opt-level": 2} if "dsp" in capabilities else {}),
            # The most that is taken for granted of a pointer's alignment.
            "vector-width": vector_bits,
        },
        capabilities=capabilities,
        vector_bits=vector_bits,
        vector_registers=vector_registers,
        threads=1,
        l1_bytes=16 * 1024,
        l2_bytes=16 * 1024,  # there is none
        toolchain=PACKAGES,
        runner="qemu_system",
        machine=machine,
        system="none",
        architecture="thumb",
        pointer_bits=32,
        compiler="arm-none-eabi-gcc",
        compiler_flags=(*compiler_flags, "-mthumb", f"-mfloat-abi={float_abi}"),
    )


M0_PLUS = _core(
    "cortex-m0plus",
    "Cortex-M0+: Thumb-1, no divider, no FPU (RP2040, STM32L0, SAM D21)",
    _THUMB1,
    "mps2-an385",
    "thumbv6m",
    ("-mcpu=cortex-m0plus",),
)
M3 = _core(
    "cortex-m3",
    "Cortex-M3: Thumb-2, no DSP instructions, no FPU (STM32F1)",
    _THUMB2,
    "mps2-an385",
    "thumbv7m",
    ("-mcpu=cortex-m3",),
    vector_registers=12,
)
M4 = _core(
    "cortex-m4",
    "Cortex-M4F: DSP instructions, single-precision FPU (STM32F4, STM32L4, nRF52)",
    _DSP | {"fpu"},
    "mps2-an386",
    "thumbv7em",
    ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16"),
    vector_registers=12,
)
M7 = _core(
    "cortex-m7",
    "Cortex-M7: DSP instructions, double-precision FPU, dual issue (STM32F7, STM32H7)",
    _DSP | {"fpu", "fp64"},
    "mps2-an500",
    "thumbv7em",
    ("-mcpu=cortex-m7", "-mfpu=fpv5-d16"),
    vector_registers=12,
)
M33 = _core(
    "cortex-m33",
    "Cortex-M33: DSP instructions, single-precision FPU, TrustZone (STM32U5, nRF5340, RP2350)",
    _DSP | {"fpu"},
    "mps3-an547",
    "thumbv8m.main",
    ("-mcpu=cortex-m33", "-mfpu=fpv5-sp-d16"),
    vector_registers=12,
)
M55 = _core(
    "cortex-m55",
    "Cortex-M55: Helium (vectors of 128 bits), FPU (Alif Ensemble, Corstone-300)",
    _HELIUM,
    "mps3-an547",
    "thumbv8.1m.main",
    ("-mcpu=cortex-m55",),
    vector_bits=128,
)
M85 = _core(
    "cortex-m85",
    "Cortex-M85: Helium (vectors of 128 bits), FPU, dual issue (Renesas RA8)",
    _HELIUM,
    "mps3-an547",
    "thumbv8.1m.main",
    # GCC 12 has no -mcpu=cortex-m85; this is its instruction set without pointer authentication.
    ("-march=armv8.1-m.main+mve.fp+fp.dp",),
    vector_bits=128,
)


def _board(
    core: Target, name: str, description: str, flash: tuple[int, int], ram: tuple[int, int]
) -> Target:
    """A board with `core`; `flash` and `ram` are address and bytes."""
    return replace(
        core,
        name=name,
        description=description,
        flash_address=flash[0],
        flash_bytes=flash[1],
        ram_address=ram[0],
        ram_bytes=ram[1],
    )


_KIB, _MIB = 1024, 1024 * 1024
CORTEX_M_TARGETS: tuple[Target, ...] = (
    M0_PLUS,
    M3,
    M4,
    M7,
    M33,
    M55,
    M85,
    _board(
        M4,
        "nucleo-l4r5zi",
        "ST Nucleo, STM32L4R5ZI: Cortex-M4F at 120 MHz, 2 MiB flash, 640 KiB RAM",
        (0x08000000, 2 * _MIB),
        (0x20000000, 640 * _KIB),  # SRAM1, 2 (by its second address) and 3 are adjacent
    ),
    _board(
        M7,
        "nucleo-h743zi",
        "ST Nucleo, STM32H743ZI: Cortex-M7 at 480 MHz, 2 MiB flash, 512 KiB of AXI RAM",
        (0x08000000, 2 * _MIB),
        (0x24000000, 512 * _KIB),  # of 1 MiB in all: the largest piece that is one
    ),
    _board(
        M0_PLUS,
        "raspberry-pi-pico",
        "Raspberry Pi Pico, RP2040: two Cortex-M0+ at 133 MHz, 2 MiB flash, 264 KiB RAM",
        (0x10000000, 2 * _MIB),
        (0x20000000, 264 * _KIB),
    ),
    _board(
        M33,
        "raspberry-pi-pico-2",
        "Raspberry Pi Pico 2, RP2350: two Cortex-M33 at 150 MHz, 4 MiB flash, 520 KiB RAM",
        (0x10000000, 4 * _MIB),
        (0x20000000, 520 * _KIB),
    ),
    _board(
        M3,
        "bluepill-f103c8",
        "Blue Pill, STM32F103C8: Cortex-M3 at 72 MHz, 64 KiB flash, 20 KiB RAM",
        (0x08000000, 64 * _KIB),
        (0x20000000, 20 * _KIB),
    ),
    _board(
        M4,
        "nucleo-f446re",
        "ST Nucleo, STM32F446RE: Cortex-M4F at 180 MHz, 512 KiB flash, 128 KiB RAM",
        (0x08000000, 512 * _KIB),
        (0x20000000, 128 * _KIB),
    ),
    _board(
        M4,
        "nrf52840-dk",
        "Nordic nRF52840 DK: Cortex-M4F at 64 MHz, 1 MiB flash, 256 KiB RAM",
        (0x00000000, 1 * _MIB),
        (0x20000000, 256 * _KIB),
    ),
    _board(
        M33,
        "nucleo-u575zi-q",
        "ST Nucleo, STM32U575ZI: Cortex-M33 at 160 MHz, 2 MiB flash, 768 KiB RAM",
        (0x08000000, 2 * _MIB),
        (0x20000000, 768 * _KIB),  # SRAM1, 2 and 3 are adjacent; 16 KiB more are elsewhere
    ),
    _board(
        M4,
        "mps2-an386",
        "Arm MPS2, AN386 image: Cortex-M4F, 4 MiB code and 4 MiB data memory",
        (0x00000000, 4 * _MIB),
        (0x20000000, 4 * _MIB),
    ),
    _board(
        M7,
        "mps2-an500",
        "Arm MPS2, AN500 image: Cortex-M7, 4 MiB code and 4 MiB data memory",
        (0x00000000, 4 * _MIB),
        (0x20000000, 4 * _MIB),
    ),
    _board(
        M55,
        "mps3-an547",
        "Arm MPS3, AN547 image: Cortex-M55, 512 KiB code and 512 KiB data memory (TCM)",
        (0x00000000, 512 * _KIB),
        (0x20000000, 512 * _KIB),
    ),
)
