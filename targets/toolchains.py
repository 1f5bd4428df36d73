"""Whether this machine has what building for a target and running on it need."""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from ..errors import TargetError
from .machines import MACHINES
from .spec import Target

# The C library of a compiler without an operating system: the file that proves it is there.
_LIBRARY = {
    "arm-none-eabi-gcc": "libc.a",
    "riscv64-unknown-elf-gcc": "picolibc.specs",
    "aarch64-linux-gnu-gcc": "libc.a",
    "arm-linux-gnueabihf-gcc": "libc.a",
}


def missing_tools(target: Target) -> tuple[str, ...]:
    """What is not installed of the target's compiler, C library, and emulator."""
    if not target.is_cross:
        return ()
    missing = []
    if shutil.which(target.compiler) is None:
        missing.append(target.compiler)
    elif not _has_library(target.compiler):
        missing.append(f"the C library of {target.compiler}")
    if target.is_emulated:
        emulator = MACHINES[target.machine].emulator
        if shutil.which(emulator) is None:
            missing.append(emulator)
    return tuple(missing)


def require_tools(target: Target) -> None:
    """Raise TargetError that names the Debian packages when something is missing."""
    missing = missing_tools(target)
    if missing:
        raise TargetError(
            f"target {target.name!r} needs {', '.join(missing)}, not found on this machine; "
            f"on Debian or Ubuntu: apt-get install {' '.join(target.toolchain)}"
        )


@lru_cache(maxsize=8)
def _has_library(compiler: str) -> bool:
    asked = [compiler, f"-print-file-name={_LIBRARY.get(compiler, 'libc.a')}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return Path(found).is_absolute()
