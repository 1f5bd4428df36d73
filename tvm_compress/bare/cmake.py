"""CMake for a project: the library, its self-test, and a toolchain file for the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..targets import Target

TOOLCHAIN = "toolchain.cmake"


def cmake_lists(
    name: str,
    target: Target,
    sources: Sequence[str],
    *,
    archive: str | None,
    is_mathematical: bool,
    has_golden: bool,
    runtime: Sequence[str],
) -> str:
    """`archive`: kernels that are compiled already. `runtime`: C below `main` of the machine that
    the target is emulated on, which a self-test without an operating system needs."""
    libraries = [f"${{CMAKE_CURRENT_SOURCE_DIR}}/{archive}"] if archive else []
    libraries += ["m"] if is_mathematical else []
    link = "".join(f"target_link_libraries({name} PUBLIC {library})\n" for library in libraries)
    flags = " ".join(target.compiler_flags)
    text = f"""# Add this folder with add_subdirectory and link `{name}`.
# Flags for {target.name}: {flags or "none"}
cmake_minimum_required(VERSION 3.13)
project({name} C{" ASM" if any(path.endswith(".S") for path in runtime) else ""})
if(CMAKE_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR
        AND NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

add_library({name} STATIC {" ".join(sources)})
target_include_directories({name} PUBLIC ${{CMAKE_CURRENT_SOURCE_DIR}})
{link}set_target_properties({name} PROPERTIES C_STANDARD 11 C_EXTENSIONS ON)
# The arena holds values of one type after values of another; products are rounded before sums.
target_compile_options({name} PRIVATE -ffunction-sections -fdata-sections
    -fno-strict-aliasing -ffp-contract=off)
# In a project that chooses neither a build type nor a level of optimisation.
get_directory_property(options COMPILE_OPTIONS)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES
        AND NOT "${{CMAKE_C_FLAGS}};${{options}}" MATCHES "(^|[ ;])-O")
    target_compile_options({name} PRIVATE -O2)
endif()
"""
    return text + (_selftest(name, target, runtime) if has_golden else "")


def _selftest(name: str, target: Target, runtime: Sequence[str]) -> str:
    text = f"""
# cmake -S . -B build -D{name.upper()}_SELFTEST=ON{
        f" -DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}" if target.is_cross else ""
    }
# cmake --build build && ctest --test-dir build
option({name.upper()}_SELFTEST "Build the self-test" OFF)
if({name.upper()}_SELFTEST)
    enable_testing()
    add_executable({name}_selftest selftest.c golden.c)
    target_link_libraries({name}_selftest {name})
    add_test(NAME {name}_selftest COMMAND {name}_selftest)
"""
    if target.is_bare_metal and runtime:
        script = "${CMAKE_CURRENT_SOURCE_DIR}/runtime/board.ld"
        files = " ".join(f"runtime/{path}" for path in runtime)
        text += f"""    # No operating system: start-up code and memory map of the emulated machine.
    target_sources({name}_selftest PRIVATE {files})
    target_link_options({name}_selftest PRIVATE -nostartfiles -Wl,--gc-sections
        -T {script})
"""
    return text + "endif()\n"


def toolchain_file(target: Target) -> str:
    """For CMAKE_TOOLCHAIN_FILE: compiler and flags of the target, and the emulator as what runs
    its programs, so that `ctest` works."""
    from ..targets.machines import MACHINES

    machine = MACHINES[target.machine]
    flags = list(target.compiler_flags)
    if target.compiler == "riscv64-unknown-elf-gcc":
        flags.append("--specs=picolibc.specs")
    emulator = [machine.emulator, *machine.arguments]
    if target.is_bare_metal:
        emulator += ["-nographic", "-monitor", "none", "-serial", "none"]
        emulator += ["-semihosting-config", "enable=on,target=native", "-kernel"]
    packages = " ".join(target.toolchain)
    return f"""# {target.name}; on Debian or Ubuntu: apt-get install {packages}
set(CMAKE_SYSTEM_NAME {"Generic" if target.is_bare_metal else "Linux"})
set(CMAKE_SYSTEM_PROCESSOR {target.architecture})
set(CMAKE_C_COMPILER {target.compiler})
set(CMAKE_ASM_COMPILER {target.compiler})
set(CMAKE_C_FLAGS_INIT "{" ".join(flags)}")
set(CMAKE_ASM_FLAGS_INIT "{" ".join(flags)}")
set(CMAKE_EXE_LINKER_FLAGS_INIT "-static")
# A program needs start-up code, which CMake's own trials do not have.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
# What runs the self-test here; on the board, it runs by itself.
set(CMAKE_CROSSCOMPILING_EMULATOR "{";".join(emulator)}")
"""
