"""A target as data: what the compiler needs to know about the machine that will run the
artefact."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import TargetError

if TYPE_CHECKING:
    import tvm

RUNNERS = ("local", "qemu_user", "qemu_system", "serial", "rpc")
SYSTEMS = ("linux", "none")


@dataclass(frozen=True)
class Target:
    """One row of the target table.

    Nobody outside `targets/` asks for `name`; kernels ask for `capabilities` and sizes.
    """

    name: str
    description: str
    tvm_options: Mapping[str, Any] = field(hash=False)
    """What `tvm.target.Target` takes: kind, mcpu, mattr..."""
    capabilities: frozenset[str] = frozenset()
    """Instruction sets a kernel may use: LLVM's feature names on x86, ours (README) elsewhere."""
    vector_bits: int = 64
    vector_registers: int = 16
    threads: int = 4
    """Threads a kernel is laid out for; it runs with any number."""
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 256 * 1024
    flash_bytes: int | None = None
    """Room for code and weights; None: no limit worth checking."""
    ram_bytes: int | None = None
    toolchain: tuple[str, ...] = ()
    """Debian packages that bring what building for this target and running on it need besides
    LLVM."""
    runner: str = "local"
    machine: str = ""
    """What the runner emulates: a row of `machines.MACHINES`; for a board that nobody emulates, one
    with its CPU, or with a CPU that executes all its instructions."""
    system: str = "linux"
    """`none`: bare metal, no operating system below the program."""
    architecture: str = "x86_64"
    """As `platform.machine` has it: x86_64, aarch64, armv7l, riscv32...; `thumb` for Cortex-M."""
    pointer_bits: int = 64
    compiler: str = ""
    """The C compiler of the target; empty: the host's."""
    compiler_flags: tuple[str, ...] = ()
    """That choose CPU and calling convention, for compiling and for linking."""
    flash_address: int | None = None
    ram_address: int | None = None
    rpc_tracker: str = field(default="", compare=False)
    """Of runner `rpc`: host:port of TVM's tracker, and the device's key there. Where a program
    runs changes none of its bytes."""
    rpc_key: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tvm_options", MappingProxyType(dict(self.tvm_options)))
        if self.vector_bits % 8 or self.vector_bits < 8:
            raise ValueError(f"target {self.name}: vector_bits {self.vector_bits} is no whole byte")
        if self.threads < 1:
            raise ValueError(f"target {self.name}: threads {self.threads} < 1")
        if self.runner not in RUNNERS:
            raise ValueError(f"target {self.name}: runner {self.runner!r} not in {RUNNERS}")
        if self.system not in SYSTEMS:
            raise ValueError(f"target {self.name}: system {self.system!r} not in {SYSTEMS}")

    def has(self, *capabilities: str) -> bool:
        """Whether the target has all of `capabilities`."""
        return self.capabilities.issuperset(capabilities)

    def lanes(self, dtype_bits: int) -> int:
        """How many values of `dtype_bits` one vector register holds."""
        return self.vector_bits // dtype_bits

    def tvm_target(self) -> tvm.target.Target:
        """The `tvm.target.Target` to compile for."""
        import tvm

        return tvm.target.Target(dict(self.tvm_options))

    def fingerprint(self) -> str:
        """Everything that code for this target depends on, as text: equal in all processes, where
        the order of a set is not."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        facts["tvm_options"] = dict(self.tvm_options)
        facts["capabilities"] = sorted(self.capabilities)
        return json.dumps(facts, sort_keys=True, default=str)

    def missing_here(self) -> frozenset[str]:
        """Capabilities of this target that the machine we are on lacks."""
        from .cpu import host_cpu

        cpu = host_cpu()
        missing = set(self.capabilities - cpu.features)
        if self.is_x86 and cpu.machine not in ("x86_64", "amd64"):
            missing.add("x86-64")
        elif self.is_cross and cpu.machine != self.architecture:
            missing.add(self.architecture)
        return frozenset(missing)

    @property
    def is_bare_metal(self) -> bool:
        """Whether there is no operating system below the program."""
        return self.system == "none"

    @property
    def is_cross(self) -> bool:
        """Whether artefacts are C projects, built by a compiler of the target's."""
        return bool(self.compiler)

    @property
    def is_emulated(self) -> bool:
        """Whether its programs run under an emulator here, which counts instructions."""
        return self.runner in ("qemu_user", "qemu_system")

    @property
    def is_x86(self) -> bool:
        """Whether the target is a 64-bit x86 (its baseline is SSE2)."""
        return "sse2" in self.capabilities

    def runs_here(self) -> bool:
        """Whether an artefact for this target can run on this machine."""
        return self.runner == "local" and not self.missing_here()

    def require_runs_here(self) -> None:
        """Raise TargetError, naming the missing features, when `runs_here` is false."""
        missing = self.missing_here()
        if missing:
            raise TargetError(
                f"target {self.name!r} cannot run on this machine: its CPU lacks "
                f"{', '.join(sorted(missing))}; compile for 'host', or run the artefact elsewhere"
            )


def nearest(name: str, names: list[str]) -> str:
    """', did you mean ...?' for an unknown name, or the whole list."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
