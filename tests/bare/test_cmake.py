"""Projects built by CMake as their users build them, on this machine and for emulated ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tvm_compress.bare.emit import write_project
from tvm_compress.build import compile_project, lower
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

from .test_project import PORTABLE, Tiny, needs_gcc, tiny

__all__ = ["tiny"]  # a fixture

needs_cmake = pytest.mark.skipif(
    shutil.which("cmake") is None, reason="no cmake (Debian: apt-get install cmake)"
)


def cmake(*arguments: str | Path) -> str:
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def selftest(project: Path, build: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Configured, built, and run by ctest."""
    cmake("-S", project, "-B", build, "-DTINY_SELFTEST=ON", *arguments)
    cmake("--build", build)
    command = ["ctest", "--test-dir", str(build), "--output-on-failure"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def commands(source: Path, build: Path, target: str, *arguments: str) -> str:
    """How `target` is compiled, configured with `arguments`."""
    cmake("-S", source, "-B", build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *arguments)
    listed = json.loads((build / "compile_commands.json").read_text())
    found = [entry["command"] for entry in listed if f"{target}.dir/" in entry["command"]]
    assert found
    return "\n".join(found)


def spoil(project: Path) -> None:
    """Another result than the network's."""
    golden = project / "golden.c"
    head, name, rest = golden.read_text().partition("golden_output_0")
    number = re.search(r"(?<![\w\[])-?[0-9][\w.+-]*(?=,)", rest)
    assert number is not None
    golden.write_text(head + name + rest[: number.start()] + "77" + rest[number.end() :])


@needs_cmake
@needs_gcc
@pytest.mark.parametrize("form", ["object", "c"])
def test_the_selftest_on_this_machine(tiny: Tiny, tmp_path: Path, form: str) -> None:
    tiny.project(tmp_path, form)
    done = selftest(tmp_path / "project", tmp_path / "build")
    assert done.returncode == 0 and "100% tests passed" in done.stdout, done.stdout
    compiled = commands(tmp_path / "project", tmp_path / "build", "tiny")
    assert all("-O3" in line and "-O2" not in line for line in compiled.splitlines())  # Release
    spoil(tmp_path / "project")
    assert selftest(tmp_path / "project", tmp_path / "build").returncode != 0


@needs_cmake
@pytest.mark.parametrize("name", ["cortex-m4", "riscv32imc", "cortex-a53"])
def test_the_selftest_under_an_emulator(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """By the project's own toolchain file."""
    target = get_target(name)
    missing = missing_tools(target)
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} not installed")
    tiny.project(tmp_path, "object", target)
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={tmp_path / 'project' / 'toolchain.cmake'}"
    done = selftest(tmp_path / "project", tmp_path / "build", toolchain)
    assert done.returncode == 0, done.stdout + done.stderr
    if name == "cortex-m4":
        spoil(tmp_path / "project")
        assert selftest(tmp_path / "project", tmp_path / "build", toolchain).returncode != 0


USER_CMAKE = """cmake_minimum_required(VERSION 3.13)
project(lamp C)
add_subdirectory(deploy)
add_executable(lamp lamp.c)
target_link_libraries(lamp tiny)
"""
USER_MAIN = """#include "tiny.h"
static uint8_t arena[TINY_ARENA_BYTES] __attribute__((aligned(TINY_ALIGNMENT)));
static TINY_INPUT_0_TYPE in[TINY_INPUT_0_ELEMENTS] __attribute__((aligned(TINY_ALIGNMENT)));
static TINY_OUTPUT_0_TYPE out[TINY_OUTPUT_0_ELEMENTS] __attribute__((aligned(TINY_ALIGNMENT)));
int main(void) {
    tiny_inputs inputs = {in};
    tiny_outputs outputs = {out};
    return tiny_run(&inputs, &outputs, arena);
}
"""


@needs_cmake
@needs_gcc
def test_a_users_own_project(tiny: Tiny, tmp_path: Path) -> None:
    """`add_subdirectory(deploy)`, and link."""
    built = compile_project(lower(tiny.module, PORTABLE)).project
    (tmp_path / "deploy").mkdir()
    write_project(built, "tiny", tiny.sources, tmp_path / "deploy")
    (tmp_path / "CMakeLists.txt").write_text(USER_CMAKE)
    (tmp_path / "lamp.c").write_text(USER_MAIN)
    assert "-O2" in commands(tmp_path, tmp_path / "build", "tiny")
    assert "-O" not in commands(tmp_path, tmp_path / "build", "lamp")
    cmake("--build", tmp_path / "build")
    assert subprocess.run([str(tmp_path / "build" / "lamp")], check=False).returncode == 0


@needs_cmake
@pytest.mark.parametrize(
    "chosen", ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_C_FLAGS=-Os", "-DLAMP_OPTIONS=-Og"]
)
def test_a_users_own_optimisation_stays(tiny: Tiny, tmp_path: Path, chosen: str) -> None:
    built = compile_project(lower(tiny.module, PORTABLE), "c").project
    (tmp_path / "deploy").mkdir()
    write_project(built, "tiny", tiny.sources, tmp_path / "deploy")
    options = "add_compile_options(${LAMP_OPTIONS})\nadd_subdirectory(deploy)"
    text = USER_CMAKE.replace("add_subdirectory(deploy)", options)
    (tmp_path / "CMakeLists.txt").write_text(text)
    (tmp_path / "lamp.c").write_text(USER_MAIN)
    assert "-O2" not in commands(tmp_path, tmp_path / "build", "tiny", chosen)
