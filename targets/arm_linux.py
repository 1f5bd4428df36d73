"""Arm under Linux: ARMv7 with NEON and AArch64, by CPU and by the boards that have it."""

from __future__ import annotations

from dataclasses import replace

from .spec import Target

_PACKAGES_64 = ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross", "qemu-user", "gcc", "libc6-dev")
_PACKAGES_32 = ("gcc-arm-linux-gnueabihf", "libc6-dev-armhf-cross", "qemu-user", "gcc", "libc6-dev")

_A64 = frozenset({"aarch64", "neon", "fpu", "fp64"})
_DOTPROD = _A64 | {"dotprod", "fullfp16"}  # sdot: 16 multiply-adds of bytes an instruction
_V82_DOTPROD = ("+v8.2a", "+neon", "+dotprod", "+fullfp16")
_I8MM = _DOTPROD | {"i8mm"}  # smmla: 32


def _aarch64(
    name: str,
    description: str,
    capabilities: frozenset[str],
    march: str,
    *,
    mcpu: str = "generic",
    mattr: tuple[str, ...] = (),
    machine: str = "aarch64-max",
    l1_bytes: int = 32 * 1024,
    l2_bytes: int = 512 * 1024,
) -> Target:
    options: dict[str, object] = {
        "kind": "llvm",
        "mtriple": "aarch64-linux-gnu",
        "mcpu": mcpu,
        "mattr": list(mattr or ("+neon",)),
    }
    return Target(
        name=name,
        description=description,
        tvm_options=options,
        capabilities=capabilities,
        vector_bits=128,
        vector_registers=32,
        threads=1,
        l1_bytes=l1_bytes,
        l2_bytes=l2_bytes,
        toolchain=_PACKAGES_64,
        runner="qemu_user",
        machine=machine,
        architecture="aarch64",
        compiler="aarch64-linux-gnu-gcc",
        compiler_flags=(f"-march={march}",),
    )


A53 = _aarch64(
    "cortex-a53",
    "Cortex-A53: ARMv8.0, NEON without dot products",
    _A64,
    "armv8-a",
    # Not LLVM's model of an in-order core: it hides latencies with registers that kernels lack, and
    # spills (0.31 instead of 0.23 instructions a multiply-add of a 3x3 convolution).
    machine="aarch64-a53",
)
A55 = _aarch64(
    "cortex-a55",
    "Cortex-A55: ARMv8.2, dot products",
    _DOTPROD,
    "armv8.2-a+dotprod+fp16",
    mattr=_V82_DOTPROD,  # as for Cortex-A53
)
A72 = _aarch64(
    "cortex-a72",
    "Cortex-A72: ARMv8.0, NEON without dot products",
    _A64,
    "armv8-a",
    mcpu="cortex-a72",
    machine="aarch64-a72",
    l2_bytes=1024 * 1024,
)
A76 = _aarch64(
    "cortex-a76",
    "Cortex-A76: ARMv8.2, dot products",
    _DOTPROD,
    "armv8.2-a+dotprod+fp16",
    mcpu="cortex-a76",
    machine="aarch64-a76",
    l1_bytes=64 * 1024,
)
NEOVERSE_N1 = _aarch64(
    "neoverse-n1",
    "Neoverse N1: ARMv8.2, dot products (AWS Graviton2, Ampere Altra)",
    _DOTPROD,
    "armv8.2-a+dotprod+fp16",
    mcpu="neoverse-n1",
    machine="aarch64-n1",
    l1_bytes=64 * 1024,
    l2_bytes=1024 * 1024,
)
V82_DOTPROD = _aarch64(
    "armv8.2-dotprod",
    "any ARMv8.2 with dot products (Apple M1, most 64-bit Arm since 2018)",
    _DOTPROD,
    "armv8.2-a+dotprod+fp16",
    mattr=_V82_DOTPROD,
)
V82_I8MM = _aarch64(
    "armv8.2-i8mm",
    "any ARMv8.2 with dot products and byte matrix products (Apple M2, Neoverse V1, Graviton3)",
    _I8MM,
    "armv8.2-a+dotprod+fp16+i8mm",
    mattr=("+v8.2a", "+neon", "+dotprod", "+fullfp16", "+i8mm"),
)
V7_NEON = Target(
    name="armv7-neon",
    description="any 32-bit ARMv7-A with NEON and VFPv4 (Cortex-A7, A15)",
    tvm_options={
        "kind": "llvm",
        "mtriple": "armv7a-linux-gnueabihf",
        "mcpu": "cortex-a7",
        "mattr": ["+neon", "+vfp4"],
        "mfloat-abi": "hard",
    },
    capabilities=frozenset({"armv7a", "neon", "fpu", "fp64"}),
    vector_bits=128,
    vector_registers=16,
    threads=1,
    toolchain=_PACKAGES_32,
    runner="qemu_user",
    machine="armv7-a7",
    architecture="armv7l",
    pointer_bits=32,
    compiler="arm-linux-gnueabihf-gcc",
    compiler_flags=("-march=armv7-a", "-mfpu=neon-vfpv4", "-mfloat-abi=hard"),
)


def _named(cpu: Target, name: str, description: str) -> Target:
    return replace(cpu, name=name, description=description)


ARM_LINUX_TARGETS: tuple[Target, ...] = (
    A53,
    A55,
    A72,
    A76,
    NEOVERSE_N1,
    V82_DOTPROD,
    V82_I8MM,
    V7_NEON,
    _named(V7_NEON, "raspberry-pi-2", "Raspberry Pi 2: Cortex-A7, 32-bit system"),
    _named(A53, "raspberry-pi-3", "Raspberry Pi 3: Cortex-A53, 64-bit system"),
    _named(A72, "raspberry-pi-4", "Raspberry Pi 4: Cortex-A72, 64-bit system"),
    _named(A76, "raspberry-pi-5", "Raspberry Pi 5: Cortex-A76, 64-bit system"),
)
