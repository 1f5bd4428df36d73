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
