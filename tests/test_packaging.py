"""The wheel holds every module once, under tvm_compress, and works away from the checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

NESTED = ("relay_passes", "schedules", "targets")
NOT_SOURCE = {
    ".git", ".venv", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache",
    ".pytest_cache", ".hypothesis",
}  # fmt: skip


@pytest.fixture(scope="module")
def distributions(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """The sdist, the wheel made from it, and the wheel made from the checkout."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    # A copy, because setuptools leaves files in the tree that it builds; links stay links.
    shutil.copytree(
        repository,
        source,
        symlinks=True,
        ignore=lambda _, names: {n for n in names if n in NOT_SOURCE or n.endswith(".egg-info")},
    )
    out = tmp_path_factory.mktemp("dist")
    for folder, what in (("from_sdist", ()), ("from_checkout", ("--wheel",))):
        run(sys.executable, "-m", "build", "--no-isolation", "-o", out / folder, *what, source)
    (sdist,) = (out / "from_sdist").glob("*.tar.gz")
    (wheel_from_sdist,) = (out / "from_sdist").glob("*.whl")
    (wheel,) = (out / "from_checkout").glob("*.whl")
    return sdist, wheel_from_sdist, wheel


def run(*command: object, cwd: Path | None = None) -> str:
    """Output of a command; a failure shows what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words[:4])} ...\n{done.stdout}{done.stderr}"
    return done.stdout


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


def python_files(repository: Path) -> set[str]:
    """Every module of ours by its path inside the installed package."""
    folders = {"tvm_compress": "tvm_compress"} | {n: f"tvm_compress/{n}" for n in NESTED}
    return {
        f"{inside}/{path.relative_to(repository / folder).as_posix()}"
        for folder, inside in folders.items()
        for path in (repository / folder).rglob("*.py")
        if not (folder == "tvm_compress" and path.relative_to(repository).parts[1] in NESTED)
    }


def test_wheel_holds_each_module_once(
    distributions: tuple[Path, Path, Path], repository: Path
) -> None:
    names = contents(distributions[2])
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert {name.split("/")[0] for name in names} == {"tvm_compress"}
    assert {name for name in names if name.endswith(".py")} == python_files(repository)


def test_wheel_holds_the_data_files(
    distributions: tuple[Path, Path, Path], repository: Path
) -> None:
    names = set(contents(distributions[2]))
    recipes = {p.name for p in (repository / "tvm_compress" / "recipes").glob("*.yaml")}
    assert recipes
    assert {f"tvm_compress/recipes/{name}" for name in recipes} <= names
    assert "tvm_compress/py.typed" in names


def test_wheel_from_sdist_equals_wheel_from_checkout(
    distributions: tuple[Path, Path, Path],
) -> None:
    sdist, from_sdist, from_checkout = distributions
    assert sorted(contents(from_sdist)) == sorted(contents(from_checkout))
    with tarfile.open(sdist) as archive:
        assert [member.name for member in archive if member.issym() or member.islnk()] == []


CLEAN_IMPORT = """
import importlib.util, json, pkgutil, sys
installed, dependencies = sys.argv[1:]
# -S left .pth files unread, so an editable install of the checkout is out of reach.
sys.path[:0] = [installed]
sys.path.append(dependencies)
import tvm_compress
files = {}
for module in pkgutil.walk_packages(tvm_compress.__path__, "tvm_compress."):
    if not module.name.endswith(".__main__"):
        files[module.name] = importlib.import_module(module.name).__file__
top_level = [n for n in ("relay_passes", "schedules", "targets") if importlib.util.find_spec(n)]
print(json.dumps({"files": files, "top_level": top_level}))
"""


def test_wheel_imports_in_a_clean_environment(
    distributions: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    installed = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", installed, distributions[2])
    clean = (sys.executable, "-I", "-S", "-c", CLEAN_IMPORT)
    printed = run(*clean, installed, sysconfig.get_path("purelib"), cwd=tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert found["top_level"] == []
    assert {f"tvm_compress.{name}" for name in NESTED} <= set(found["files"])
    assert all(Path(file).is_relative_to(installed) for file in found["files"].values())
    script = (installed / "bin" / "tvm-compress").read_text()
    assert "tvm_compress.cli" in script
