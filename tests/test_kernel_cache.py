"""Compiled kernels kept by content: what is compiled, what is taken over, and what may go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.command_line import tiny_data, tiny_onnx, tvm_compress
from tests.relay_passes.floats import Net, quantize
from tests.relay_passes.floats import build as float_network
from tvm_compress.build import build, compile_reference
from tvm_compress.kernel_cache import KernelCache
from tvm_compress.schedules import Choice, search_space
from tvm_compress.targets import get_target

HOST = get_target("host")
pytestmark = pytest.mark.links


def network(
    names: tuple[str, str, str] = ("a", "b", "c"), channels: int = 8, width: int = 8
) -> tvm.IRModule:
    """Three convolutions of different shapes; `channels` is the middle one's."""

    def body(net: Net, x: relax.Var) -> relax.Var:
        x = net.conv_relu(names[0], x, width)
        x = net.conv_relu(names[1], x, channels)
        return net.conv_relu(names[2], x, 4)

    return quantize(float_network(body))


def run(executable: relax.VMExecutable) -> np.ndarray:
    data = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](tvm.runtime.tensor(data)).numpy()


def test_cold_warm_and_without_give_the_same_library(tmp_path: Path) -> None:
    cached = KernelCache(tmp_path / "kernels")
    module = network()
    built = [build(module, HOST, cached=c) for c in (cached, cached, None)]
    counts = [(b.kernels.total, b.kernels.cached) for b in built]
    total = counts[0][0]
    assert total >= 3 and counts == [(total, 0), (total, total), (total, 0)]
    assert str(built[1].kernels) == f"{total} kernels: {total} from cache, 0 compiled"
    libraries = []
    for index, one in enumerate(built):
        one.export(tmp_path / f"{index}.so")
        libraries.append((tmp_path / f"{index}.so").read_bytes())
    assert libraries[0] == libraries[1] == libraries[2]
    references = [compile_reference(built[0].reference_module, c) for c in (cached, cached, None)]
    results = [run(executable) for executable in [*(b.executable for b in built), *references]]
    assert all(np.array_equal(results[0], result) for result in results)


def test_only_changed_kernels_are_compiled(tmp_path: Path) -> None:
    cached = KernelCache(tmp_path)
    first = build(network(), HOST, cached=cached).kernels
    # What layers are called changes nothing.
    renamed = build(network(("x", "y", "z")), HOST, cached=cached).kernels
    assert (renamed.total, renamed.cached) == (first.total, first.total)
    # Another width of the middle layer: its kernel and the one that reads it.
    changed = build(network(channels=40), HOST, cached=cached).kernels
    assert changed.total - changed.cached == 2
    # Back again, from the cache.
    again = build(network(), HOST, cached=cached).kernels
    assert again.cached == again.total


def test_other_target_and_choice_are_other_kernels(tmp_path: Path) -> None:
    class Second:
        """The second choice of every kernel that has any."""

        tuned = tunable = 0

        def __call__(self, func: tvm.tirx.PrimFunc) -> Choice | None:
            space = search_space(func, HOST)
            choices = [] if space is None else list(space)
            return choices[1] if len(choices) > 1 else None

    cached = KernelCache(tmp_path)
    first = build(network(), HOST, cached=cached)
    other = build(network(), get_target("x86-64-v3"), cached=cached)
    assert other.kernels.cached == 0
    tuned = build(network(), HOST, Second(), cached=cached)  # type: ignore[arg-type]
    with_choice = sum(choice is not None for choice in tuned.choices.values())
    assert with_choice and tuned.kernels.total - tuned.kernels.cached == with_choice
    assert np.array_equal(run(first.executable), run(tuned.executable))


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "another's"])
def test_damaged_entry_is_made_anew(tmp_path: Path, damage: str) -> None:
    cached = KernelCache(tmp_path)
    first = build(network(), HOST, cached=cached)
    entries = sorted(tmp_path.glob("*.o"))
    whole = entries[0].read_bytes()
    entries[0].write_bytes({
        "truncated": whole[: len(whole) // 2],
        "changed": whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:],
        "empty": b"",
        "another's": entries[1].read_bytes(),
    }[damage])  # fmt: skip
    again = build(network(), HOST, cached=cached)
    assert again.kernels.total - again.kernels.cached == 1
    assert entries[0].read_bytes() == whole
    assert np.array_equal(run(first.executable), run(again.executable))


PROGRAM = """
import sys
from pathlib import Path
from tests.test_kernel_cache import HOST, build, KernelCache, network
cached = KernelCache(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
built = build(network(), HOST, cached=cached)
assert cached.trouble is None
built.export(Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, repository: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, tmp_path / "kernels", tmp_path / f"{index}.so"],
            cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    threads = [threading.Thread(target=p.communicate, args=("go\n",)) for p in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.returncode for process in processes] == [0, 0]
    assert (tmp_path / "0.so").read_bytes() == (tmp_path / "1.so").read_bytes()
    assert not list((tmp_path / "kernels").glob(".*"))
    kernels = build(network(), HOST, cached=KernelCache(tmp_path / "kernels")).kernels
    assert kernels.cached == kernels.total


def test_size_is_bounded_and_what_was_used_last_stays(tmp_path: Path) -> None:
    cached = KernelCache(tmp_path, max_bytes=10_000)
    for index in range(6):
        cached.put(f"{index:x}", bytes(1_900))
        path = tmp_path / f"{index:x}.o"
        os.utime(path, (index, index))
    assert cached.get("0") == bytes(1_900)  # used now
    (tmp_path / ".unfinished-old").write_bytes(b"x")
    os.utime(tmp_path / ".unfinished-old", (1, 1))
    (tmp_path / ".unfinished-new").write_bytes(b"x")
    cached.trim()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"0.o", "4.o", "5.o", ".unfinished-new"}


def test_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model, data = tiny_onnx(tmp_path / "model.onnx"), tiny_data(tmp_path / "data.npz")
    database = tmp_path / "records"
    options = ("--calib", data, "-o", tmp_path / "out", "--database", database, "--json")
    result = tvm_compress("compress", model, *options)
    assert result.status == 0, result.err
    words = " ".join(result.err.split())
    assert words.count("warning: cache of kernels") == 1
    assert "cannot be written (Not a directory)" in words and "XDG_CACHE_HOME" in words
    assert all(check["passed"] for check in result.json["checks"])


def test_option_compiles_all_and_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, data = tiny_onnx(tmp_path / "model.onnx"), tiny_data(tmp_path / "data.npz")
    details = []
    for out, option in (("a", ["--no-kernel-cache"]), ("b", []), ("c", [])):
        result = tvm_compress(
            "compress", model, "--calib", data, "-o", tmp_path / out, "--json", *option
        )
        assert result.status == 0, result.err
        steps = {step["name"]: step["detail"] for step in result.json["steps"]}
        details.append(steps["build compressed"])
        if option:
            assert not (tmp_path / "cache" / "tvm-compress" / "kernels").exists()
    assert details[0].endswith(": 0 from cache, 5 compiled")
    assert details[2].endswith(": 5 from cache, 0 compiled")
    shown = tvm_compress("report", tmp_path / "c").out
    assert "5 kernels: 5 from cache, 0 compiled" in " ".join(shown.split())
