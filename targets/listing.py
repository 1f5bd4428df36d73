"""What `tvm-compress list targets` says of a target."""

from __future__ import annotations

from typing import Any

from .machines import MACHINES
from .spec import Target
from .toolchains import missing_tools


def missing(target: Target) -> tuple[str, ...]:
    """What this machine lacks to run an artefact, by itself or under the target's emulator: parts
    of the toolchain, or instruction sets."""
    return missing_tools(target) if target.is_cross else tuple(sorted(target.missing_here()))


def facts(target: Target) -> dict[str, Any]:
    """The target as JSON; null where there is none of it."""
    lacking = missing(target)
    return {
        "name": target.name,
        "description": target.description,
        "runs_here": not lacking and (target.runner == "local" or target.is_emulated),
        "missing": list(lacking),
        "runner": target.runner,
        "machine": target.machine or None,
        "emulator": MACHINES[target.machine].emulator if target.is_emulated else None,
        "architecture": target.architecture,
        "system": target.system,
        "tvm_options": dict(target.tvm_options),
        "capabilities": sorted(target.capabilities),
        "vector_bits": target.vector_bits,
        "flash_bytes": target.flash_bytes,
        "ram_bytes": target.ram_bytes,
        "compiler": target.compiler or None,
        "packages": list(target.toolchain),
    }
