"""The target table, the host's features, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from tvm_compress.errors import TargetError
from tvm_compress.targets import Target, get_target, list_targets
from tvm_compress.targets.cpu import HostCpu, parse_cpuinfo
from tvm_compress.targets.machines import MACHINES
from tvm_compress.targets.x86 import X86_TARGETS, host_target


def host(features: frozenset[str]) -> Target:
    return host_target(HostCpu("x86_64", features, 4, 32768, 524288))


def test_every_target_is_known_to_tvm() -> None:
    names = [target.name for target in list_targets()]
    assert names[0] == "host" and len(set(names)) == len(names)
    for target in list_targets():
        assert target.tvm_target().kind.name == "llvm"
        assert get_target(target.name) is target


def test_capabilities_are_llvms_too() -> None:
    """What we let kernels use, LLVM's CPU of the same name must have."""
    from tvm.target import codegen

    for target in X86_TARGETS:
        wanted = ["bmi" if name == "bmi1" else name for name in sorted(target.capabilities)]
        assert codegen.llvm_cpu_has_features(wanted, target.tvm_target()), target.name


# Words of ours for what LLVM spells otherwise, or does not call a feature.
OURS = {
    "fpu": {"thumb": "vfp2sp", "armv7l": "vfp2sp", "aarch64": "fp-armv8", "riscv": "f"},
    "fp64": {"thumb": "fp64", "armv7l": "fp64", "aarch64": "fp-armv8", "riscv": "d"},
    "rvv": {"riscv": "v"},
    "rv64": {"riscv": "64bit"},
}
ARCHITECTURES = {"thumb", "armv7a", "aarch64", "riscv"}


@pytest.mark.parametrize("name", [t.name for t in list_targets() if t.is_cross])
def test_cross_capabilities_are_llvms_too(name: str) -> None:
    from tvm.target import codegen

    target = get_target(name)
    family = "riscv" if target.architecture.startswith("riscv") else target.architecture
    wanted = [
        OURS[word][family] if word in OURS else word
        for word in sorted(target.capabilities - ARCHITECTURES)
    ]
    has = {str(feature) for feature in codegen.llvm_get_cpu_features(target.tvm_target())}
    assert not set(wanted) - has, sorted(has)
    assert target.capabilities & ARCHITECTURES
    # What a board has not been given must not slip in by the name of its CPU.
    for word in ("dsp", "mve", "dotprod", "i8mm"):
        assert word in target.capabilities or word not in has or family == "armv7l"


@pytest.mark.parametrize("name", [t.name for t in list_targets() if t.is_cross])
def test_llvm_emits_objects_of_the_targets_kind(name: str) -> None:
    """ELF class and machine of an object with int8, int64 and float arithmetic."""
    import tvm
    from tvm import te

    from tvm_compress.object_code import compile_object

    target = get_target(name)
    codes = te.placeholder((64,), "int8", name="codes")
    scaled = te.compute((64,), lambda i: (codes[i].astype("int64") * 3 >> 1).astype("int8"))
    reals = te.placeholder((64,), "float32", name="reals")
    rounded = te.compute((64,), lambda i: reals[i] * tvm.tirx.const(2.5, "float32"))
    content = compile_object(
        {
            tvm.ir.GlobalVar("scale"): te.create_prim_func([codes, scaled]),
            tvm.ir.GlobalVar("round"): te.create_prim_func([reals, rounded]),
        },
        target.tvm_target(),
    )
    machines = {"thumb": 40, "armv7l": 40, "aarch64": 183, "riscv32": 243, "riscv64": 243}
    assert content[:4] == b"\x7fELF"
    assert content[4] == {32: 1, 64: 2}[target.pointer_bits]
    assert int.from_bytes(content[18:20], "little") == machines[target.architecture]


def test_every_cross_target_names_a_machine() -> None:
    for target in list_targets():
        assert target.is_cross == (target.machine in MACHINES), target.name
        if target.is_cross:
            assert target.toolchain and target.runner in ("qemu_user", "qemu_system")
            assert (target.runner == "qemu_system") == bool(MACHINES[target.machine].runtime)
            assert not target.runs_here() or target.runner == "qemu_user"


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(TargetError, match="did you mean 'x86-64-v3'"):
        get_target("x86_64_v3")
    with pytest.raises(TargetError, match="known: host"):
        get_target("zzz")


def test_host_takes_the_best_level_its_cpu_has() -> None:
    v3, vnni = get_target("x86-64-v3"), get_target("x86-64-v4-vnni")
    assert host(v3.capabilities).tvm_options["mcpu"] == "x86-64-v3"
    assert host(vnni.capabilities).has("avx512vnni")
    assert host(v3.capabilities | {"avxvnni"}).tvm_options["mattr"] == ["+avxvnni"]
    # A masked feature drops the level, whatever the CPU calls itself.
    assert host(vnni.capabilities - {"avx512vl"}).tvm_options["mcpu"] == "x86-64-v3"
    assert host(frozenset({"sse2"})).tvm_options["mcpu"] == "x86-64"
    assert get_target("host").runs_here()


def test_a_target_the_host_lacks_features_for_does_not_run() -> None:
    target = dataclasses.replace(
        get_target("x86-64-v3"), capabilities=frozenset({"sse2", "avx1024"})
    )
    assert not target.runs_here()
    with pytest.raises(TargetError, match="lacks avx1024"):
        target.require_runs_here()


@pytest.mark.parametrize("changes", [{"threads": 0}, {"vector_bits": 12}, {"runner": "magic"}])
def test_bad_targets_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="target x86-64-v3"):
        dataclasses.replace(get_target("x86-64-v3"), **changes)


def test_cpuinfo_is_spelled_as_llvm_does() -> None:
    text = "processor : 0\nflags\t\t: sse2 pni sse4_1 avx512_vnni\nflags : other\n"
    assert parse_cpuinfo(text) == {"sse2", "sse3", "sse4.1", "avx512vnni"}
    assert parse_cpuinfo("") == frozenset()


def test_importing_targets_is_cheap() -> None:
    code = "import sys, tvm_compress.targets as t; t.list_targets(); sys.exit('tvm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_boards_have_memory_that_its_users_can_link_to() -> None:
    """Addresses and sizes are whole KiB; code and data do not overlap."""
    boards = [
        t for t in list_targets() if t.flash_address is not None and t.ram_address is not None
    ]
    assert len(boards) >= 10
    for board in boards:
        assert board.flash_bytes and board.ram_bytes and board.is_bare_metal, board.name
        starts = {
            board.flash_address: board.flash_bytes, board.ram_address: board.ram_bytes
        }  # fmt: skip
        assert all(n % 1024 == 0 for item in starts.items() for n in item if n), board.name
        (first, size), (second, _) = sorted(starts.items())  # type: ignore[type-var]
        assert (first or 0) + (size or 0) <= (second or 0), board.name
