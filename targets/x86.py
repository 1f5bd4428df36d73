"""The x86-64 targets, by the psABI's micro-architecture levels: any CPU of a level runs its
artefacts."""

from __future__ import annotations

from dataclasses import replace

from .cpu import HostCpu
from .spec import Target

_V1 = frozenset({"sse2"})
_V2 = _V1 | {"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"}
_V3 = _V2 | {"avx", "avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = _V4 | {"avx512vnni"}

# Beyond a level, what a kernel here would use if the host has it.
_HOST_EXTRAS = frozenset({"avxvnni", "avx512vbmi", "avx512vbmi2"})

X86_TARGETS: tuple[Target, ...] = (
    Target(
        name="x86-64-v2",
        description="any 64-bit x86 since 2009 (SSE4.2, no AVX)",
        tvm_options={"kind": "llvm", "mcpu": "x86-64-v2"},
        capabilities=_V2,
        vector_bits=128,
    ),
    Target(
        name="x86-64-v3",
        description="x86 with AVX2 and FMA: Intel since Haswell, AMD since Zen",
        tvm_options={"kind": "llvm", "mcpu": "x86-64-v3"},
        capabilities=_V3,
        vector_bits=256,
    ),
    Target(
        name="x86-64-v4",
        description="x86 with AVX-512 (F, BW, CD, DQ, VL), no VNNI: Skylake-X",
        tvm_options={"kind": "llvm", "mcpu": "x86-64-v4"},
        capabilities=_V4,
        vector_bits=512,
        vector_registers=32,
        l2_bytes=1024 * 1024,
    ),
    Target(
        name="x86-64-v4-vnni",
        description="x86 with AVX-512 VNNI: Intel servers since Cascade Lake, AMD since Zen 4",
        tvm_options={"kind": "llvm", "mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]},
        capabilities=_VNNI,
        vector_bits=512,
        vector_registers=32,
        l2_bytes=1024 * 1024,
    ),
)


def as_board(cpu: Target) -> Target:
    """A 64-bit x86 that is another machine: like every other board it gets C projects, for one
    thread. Targets of other families as they are."""
    if cpu.is_cross or not cpu.is_x86:
        return cpu
    return replace(cpu, compiler="gcc", toolchain=("gcc", "libc6-dev"), threads=1)


def host_target(cpu: HostCpu) -> Target:
    """The best level the host has, plus what it has beyond.

    The CPU's own LLVM name is not used: under a hypervisor it may promise features that are masked
    out.
    """
    fitting = [t for t in X86_TARGETS if t.capabilities <= cpu.features]
    level = fitting[-1] if fitting else None
    capabilities = (level.capabilities if level else _V1) | (cpu.features & _HOST_EXTRAS)
    mcpu = level.tvm_options["mcpu"] if level else "x86-64"
    level_mattr = list(level.tvm_options.get("mattr", ())) if level else []
    extras = [f"+{name}" for name in sorted(cpu.features & _HOST_EXTRAS)]
    options: dict[str, object] = {"kind": "llvm", "mcpu": mcpu}
    if level_mattr or extras:
        options["mattr"] = level_mattr + extras
    return Target(
        name="host",
        description=f"this machine: {mcpu}, {cpu.cores} cores",
        tvm_options=options,
        capabilities=capabilities,
        vector_bits=level.vector_bits if level else 128,
        vector_registers=level.vector_registers if level else 16,
        threads=cpu.cores,
        l1_bytes=cpu.l1_bytes,
        l2_bytes=cpu.l2_bytes,
    )
