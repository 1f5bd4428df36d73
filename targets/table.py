"""The target table: `get_target` and `list_targets`; a new board is a new row."""

from __future__ import annotations

from functools import lru_cache

from ..errors import TargetError
from .arm_linux import ARM_LINUX_TARGETS
from .arm_m import CORTEX_M_TARGETS
from .cpu import HostCpu, host_cpu
from .riscv import RISCV_TARGETS
from .spec import Target, nearest
from .x86 import X86_TARGETS, host_target


@lru_cache(maxsize=1)
def _table() -> dict[str, Target]:
    rows = (*X86_TARGETS, *ARM_LINUX_TARGETS, *CORTEX_M_TARGETS, *RISCV_TARGETS)
    targets = (_host(host_cpu()), *rows)
    return {target.name: target for target in targets}


def _host(cpu: HostCpu) -> Target:
    if cpu.machine in ("x86_64", "amd64"):
        return host_target(cpu)
    return Target(
        name="host",
        description=f"this machine ({cpu.machine}), {cpu.cores} cores, generic schedules",
        tvm_options={"kind": "llvm"},
        vector_bits=128,
        threads=cpu.cores,
        l1_bytes=cpu.l1_bytes,
        l2_bytes=cpu.l2_bytes,
    )


def list_targets() -> list[Target]:
    """All targets, `host` first."""
    return list(_table().values())


def get_target(name: str) -> Target:
    """The target called `name`; TargetError with the nearest name when there is none."""
    table = _table()
    if name not in table:
        raise TargetError(f"no target {name!r}; {nearest(name, list(table))}")
    return table[name]
