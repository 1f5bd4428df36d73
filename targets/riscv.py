"""RISC-V without an operating system, run on QEMU's `virt` board."""

from __future__ import annotations

from .spec import Target

PACKAGES = (
    "gcc-riscv64-unknown-elf",
    "picolibc-riscv64-unknown-elf",
    "qemu-system-misc",
    "gcc",
    "libc6-dev",
)


def _riscv(
    name: str,
    description: str,
    letters: str,
    abi: str,
    capabilities: frozenset[str],
    machine: str,
    *,
    vector_bits: int,
) -> Target:
    bits = 64 if abi.startswith("lp64") else 32
    return Target(
        name=name,
        description=description,
        tvm_options={
            "kind": "llvm",
            "mtriple": f"riscv{bits}-unknown-elf",
            "mcpu": f"generic-rv{bits}",
            "mattr": [f"+{letter}" for letter in letters],
            "mabi": abi,
        },
        capabilities=capabilities,
        vector_bits=vector_bits,
        vector_registers=32,
        threads=1,
        l1_bytes=16 * 1024,
        l2_bytes=16 * 1024,
        toolchain=PACKAGES,
        runner="qemu_system",
        machine=machine,
        system="none",
        architecture=f"riscv{bits}",
        pointer_bits=bits,
        compiler="riscv64-unknown-elf-gcc",
        # GCC 12 knows no vectors; its own code (start-up, glue) needs none.
        compiler_flags=(
            f"-march=rv{bits}i{letters.replace('v', '')}",
            f"-mabi={abi}",
            "-mcmodel=medany",
        ),
    )


_RV = frozenset({"riscv"})
RISCV_TARGETS: tuple[Target, ...] = (
    _riscv(
        "riscv32imc",
        "32-bit RISC-V without FPU (ESP32-C3, GD32VF103)",
        "mc",
        "ilp32",
        _RV,
        "virt-rv32",
        vector_bits=32,
    ),
    _riscv(
        "riscv32imafc",
        "32-bit RISC-V with single-precision FPU",
        "mafc",
        "ilp32f",
        _RV | {"fpu"},
        "virt-rv32",
        vector_bits=32,
    ),
    _riscv(
        "riscv64gc",
        "64-bit RISC-V with FPU (Kendryte K210)",
        "mafdc",
        "lp64d",
        _RV | {"rv64", "fpu", "fp64"},
        "virt-rv64",
        vector_bits=64,
    ),
    _riscv(
        "riscv64gcv",
        "64-bit RISC-V with FPU and vectors of at least 128 bits (V 1.0)",
        "mafdcv",
        "lp64d",
        _RV | {"rv64", "fpu", "fp64", "rvv"},
        "virt-rv64v",
        vector_bits=128,
    ),
)
