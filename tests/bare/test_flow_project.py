"""The command line on a board: compress, run and verify under QEMU. Skips where that is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

from ..command_line import tiny_data, tiny_onnx, tvm_compress

pytestmark = [pytest.mark.links, pytest.mark.slow]


def require(name: str) -> None:
    missing = missing_tools(get_target(name))
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} not installed")


@pytest.mark.parametrize("name", ["cortex-m4", "riscv32imc"])
@pytest.mark.parametrize("form", ["object", "c"])
def test_a_board_computes_what_the_host_does(tmp_path: Path, name: str, form: str) -> None:
    require(name)
    model, data = tiny_onnx(tmp_path / "tiny.onnx"), tiny_data(tmp_path / "data.npz")
    out = tmp_path / "out"
    result = tvm_compress(
        "compress", model, "--calib", data, "--target", name, "--emit", form, "-o", out, "--json"
    )
    assert result.status == 0, result.err
    assert ("portable C takes many times" in result.err) == (form == "c" and name == "cortex-m4")
    checks = {check["name"]: check for check in result.json["checks"]}
    assert checks
    assert all(check["passed"] for check in checks.values())
    interface = json.loads((out / "deploy" / "interface.json").read_text())
    after = result.json["after"]
    assert after["plan_bytes"] == interface["arena_bytes"]
    assert after["bytes"]["total"] > interface["constant_bytes"] > 0

    # By layer there are checksums only: words, not a table without rows.
    told = tvm_compress("verify", out, "--per-layer")
    assert told.status == 0, told.err
    assert "integers are compared by checksum" in " ".join(told.out.split())
    assert "own dB" not in told.out
    assert tvm_compress("verify", out, "--per-layer", "--json").json["tensors"] == []

    # The same network for this machine gives the same numbers.
    host = tmp_path / "host"
    result = tvm_compress("compress", model, "--calib", data, "--target", "x86-64-v2", "-o", host)
    assert result.status == 0, result.err
    outputs = []
    for folder in (out, host):
        answers = tmp_path / f"{folder.name}.npz"
        result = tvm_compress("run", folder, "--input", data, "-o", answers)
        assert result.status == 0, result.err
        outputs.append(dict(np.load(answers)))
    assert outputs[0].keys() == outputs[1].keys()
    for key, found in outputs[0].items():
        assert np.array_equal(found, outputs[1][key])


def test_a_missing_emulator_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built all the same; `run` says what to install."""
    model, data = tiny_onnx(tmp_path / "tiny.onnx"), tiny_data(tmp_path / "data.npz")
    out = tmp_path / "out"
    compilers = [shutil.which(name) for name in ("g++", "gcc", "c++", "cc", "ld", "as")]
    folder = tmp_path / "bin"
    folder.mkdir()
    for path in filter(None, compilers):
        (folder / Path(path).name).symlink_to(path)
    monkeypatch.setenv("PATH", str(folder))
    result = tvm_compress("compress", model, "--calib", data, "--target", "cortex-m4", "-o", out)
    assert result.status == 0, result.err
    assert (out / "deploy" / "interface.json").is_file()
    result = tvm_compress("run", out, "--input", data, "-o", tmp_path / "answers.npz")
    assert result.status == 2
    assert "apt-get install" in result.err
