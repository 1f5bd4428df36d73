"""Keep the command line quick: TVM imports torch wherever it is installed, at several seconds a
start.

Only the torch front end needs torch, and imports it itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

# What imports torch at TVM's own import, and has a way without.
OPTIONAL_USERS = ("tvm_ffi", "tvm.relax.base_py_module")


class _NoTorchForTvm(MetaPathFinder):
    """Tells `OPTIONAL_USERS`, and nobody else, that there is no torch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname != "torch":
            return
        frame = sys._getframe(1)
        while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if str(frame.f_globals.get("__name__", "")).startswith(OPTIONAL_USERS):
            raise ModuleNotFoundError("torch is not needed here", name="torch")


def start_without_torch() -> None:
    """For a process of our own, before TVM is imported; a library must leave imports alone."""
    sys.meta_path.insert(0, _NoTorchForTvm())
