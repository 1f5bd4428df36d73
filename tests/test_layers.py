"""Folders import one way only, and starting the command line loads no heavy library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# Who may import whom; everyone may import tvm_compress/errors.py.
MAY_IMPORT = {
    "targets": {"targets"},
    "schedules": {"schedules", "targets"},
    "relay_passes": {"relay_passes", "schedules", "targets"},
}
HEAVY = ("matplotlib", "numpy", "onnx", "onnxruntime", "scipy", "tflite", "torch", "tvm", "xgboost")


def our_imports(path: Path, package: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Modules of tvm_compress that a file imports, as parts below tvm_compress.

    `package` is the file's package below tvm_compress, for instance ("schedules", "x86").
    """
    found: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
            found += [name[1:] for name in names if name[0] == "tvm_compress"]
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = ("tvm_compress", *package)
                module = (*base[: len(base) - node.level + 1], *module)
            if module[:1] == ("tvm_compress",):
                found += [(*module[1:], alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_one_way(folder: str, repository: Path) -> None:
    paths = sorted((repository / folder).rglob("*.py"))
    assert paths, f"{folder} holds no module"
    wrong = []
    for path in paths:
        package = path.relative_to(repository).parent.parts
        for name in our_imports(path, package):
            if name[0] != "errors" and name[0] not in MAY_IMPORT[folder]:
                wrong.append(f"{path.relative_to(repository)} imports {'.'.join(name)}")
    assert wrong == []


def test_our_imports_sees_relative_and_absolute_names(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import numpy\n"
        "import tvm_compress.cli\n"
        "from . import spec\n"
        "from ..targets.host import HOST\n"
        "from ...errors import ModelError\n"
    )
    assert our_imports(path, ("schedules", "x86")) == [
        ("cli",),
        ("schedules", "x86", "spec"),
        ("schedules", "targets", "host", "HOST"),
        ("errors", "ModelError"),
    ]


@pytest.mark.parametrize("module", ["tvm_compress", "tvm_compress.cli"])
def test_start_up_loads_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint(HEAVY), sorted(loaded & set(HEAVY))
