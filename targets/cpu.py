"""What the CPU we are running on can do."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# /proc/cpuinfo spells some features differently from LLVM.
_LINUX_TO_LLVM = {
    "pni": "sse3",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "avx512_vnni": "avx512vnni",
    "avx_vnni": "avxvnni",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_bf16": "avx512bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
}


@dataclass(frozen=True)
class HostCpu:
    """Machine (as `platform.machine`, lower case), LLVM feature names, usable cores, cache
    sizes."""

    machine: str
    features: frozenset[str]
    cores: int
    l1_bytes: int
    l2_bytes: int


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Feature names, spelled as LLVM does, of the first CPU in the text of /proc/cpuinfo."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    words = match[1].split() if match else []
    return frozenset(_LINUX_TO_LLVM.get(word, word) for word in words)


def _cache_bytes(index: int, default: int) -> int:
    path = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size")
    try:
        text = path.read_text().strip()
        return int(text[:-1]) * {"K": 1024, "M": 1024**2}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return default


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def host_cpu() -> HostCpu:
    """The CPU of this machine. Without /proc/cpuinfo the features LLVM knows of its CPU name."""
    machine = platform.machine().lower()
    try:
        features = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:
        features = frozenset()
    if not features:
        features = _features_from_llvm()
    return HostCpu(
        machine=machine,
        features=features,
        cores=_usable_cores(),
        l1_bytes=_cache_bytes(0, 32 * 1024),
        l2_bytes=_cache_bytes(2, 256 * 1024),
    )


def _features_from_llvm() -> frozenset[str]:
    from tvm.target import Target, codegen

    target = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    names = {str(name) for name in codegen.llvm_get_cpu_features(target)}
    return frozenset(names | ({"bmi1"} if "bmi" in names else set()))
