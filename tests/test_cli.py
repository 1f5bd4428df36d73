"""The command line itself: start-up, help, exit status, what goes where. No model is compiled."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from tvm_compress.cli import cli
from tvm_compress.relay_passes.passes import PASSES
from tvm_compress.targets import list_targets

from .command_line import tiny_onnx, tvm_compress

VERBS = sorted(cli.commands)


def in_new_process(
    repository: Path, *arguments: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tvm_compress.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=repository,
        timeout=timeout,
        check=False,
    )


def test_help_starts_within_half_a_second(repository: Path) -> None:
    """Issue: `--help` under 0.5 s. CPU time of the best of three: other jobs may be running."""
    used = []
    for _ in range(3):
        before = os.times()
        done = in_new_process(repository, "--help")
        after = os.times()
        used.append(
            after.children_user - before.children_user
            + after.children_system - before.children_system
        )  # fmt: skip
        assert done.returncode == 0
    assert min(used) < 0.5


def test_the_eight_verbs() -> None:
    assert set(VERBS) == {
        "profile", "compress", "tune", "run", "verify", "benchmark", "report", "list"
    }  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example_and_json(verb: str) -> None:
    result = tvm_compress(verb, "--help")
    assert result.status == 0
    example = result.out.partition("Example:")[2]
    assert example.strip().startswith(f"tvm-compress {verb} ")
    assert "--json" in result.out


def test_version() -> None:
    result = tvm_compress("--version")
    assert result.status == 0 and "0.1" in result.out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["compres"], "No such command"),
        (["profile"], "Missing argument 'MODEL'"),
        (["compress", "m.onnx"], "Missing option"),
        (["profile", "m.onnx", "--shape", "x"], "not of the form name=1x3x224x224"),
        (["profile", "m.onnx", "--shape", "x=1x0"], "every side is from 1"),
        (["profile", "m.onnx", "--shape", "x=1", "--shape", "x=2"], "gives 'x' twice"),
        (["profile", "m.onnx", "--input-value", "sr=fast"], "not of the form name=number"),
        (["profile", "m.onnx", "--input-value", "sr=nan"], "not of the form name=number"),
        (["list", "recipe"], "is not one of"),
        (["list", "passes", "--schema"], "belongs to `list recipes`"),
        (["benchmark", "out", "--threads", "0"], "not in the range"),
        (["benchmark", "out", "--against", "onnxruntime"], "--model"),
        (["benchmark", "out", "--calib", "x.npz"], "--against"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: list[str], part: str) -> None:
    result = tvm_compress(*arguments)
    assert result.status == 2
    assert part in result.error
    assert result.out == ""


def test_internal_error_is_one_line_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr("tvm_compress.recipe.shipped_recipes", broken)
    result = tvm_compress("list", "recipes")
    assert result.status == 2
    assert "internal error" in result.error and "KeyError" in result.error
    result = tvm_compress("list", "recipes", "--debug")
    assert "Traceback" in result.err and result.err.splitlines()[-1].startswith("error: ")


def test_interrupt_that_a_callback_turns_into_another_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TVM does this to a KeyboardInterrupt that is raised inside one of its callbacks."""

    def callback() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise IndexError from None

    monkeypatch.setattr("tvm_compress.recipe.shipped_recipes", callback)
    before = signal.getsignal(signal.SIGINT)
    try:
        result = tvm_compress("list", "recipes")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.status == 130
    assert result.error == "interrupted; the same command goes on from here"


def test_list_of_recipes_and_its_schema() -> None:
    names = [row["name"] for row in tvm_compress("list", "recipes", "--json").json]
    assert {"int8", "int8_w_only", "w4_group", "int16x8"} <= set(names)
    assert "int8_w_only" in tvm_compress("list", "recipes").out
    schema = tvm_compress("list", "recipes", "--schema").json
    recipe = yaml.safe_load("version: 1\nsteps: [{quantize: {layers: all}}]")
    jsonschema.validate(recipe, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**recipe, "stepps": []}, schema)


def test_list_of_passes_and_targets() -> None:
    passes = {row["name"]: row["options"] for row in tvm_compress("list", "passes", "--json").json}
    for name, entry in PASSES.items():
        fields = [field.name for field in dataclasses.fields(entry.config)]
        assert passes[name].split(", ") == ["layers", *fields]
    targets = tvm_compress("list", "targets", "--json").json
    assert targets[0]["name"] == "host" and targets[0]["runs_here"] is True


def test_list_of_targets_has_the_facts() -> None:
    rows = {row["name"]: row for row in tvm_compress("list", "targets", "--json").json}
    assert list(rows) == [target.name for target in list_targets()]
    for row in rows.values():
        assert row["description"] and row["capabilities"] == sorted(row["capabilities"])
        assert row["vector_bits"] in (32, 64, 128, 256, 512)
        assert row["tvm_options"]["kind"] == "llvm"
        assert row["runs_here"] is not bool(row["missing"])
        assert (row["compiler"] is None) == (row["packages"] == []) == (row["runner"] == "local")
    board = rows["nucleo-l4r5zi"]
    assert (board["flash_bytes"], board["ram_bytes"]) == (2 * 1024 * 1024, 640 * 1024)
    assert "dsp" in board["capabilities"] and board["tvm_options"]["mcpu"] == "cortex-m4"
    assert (board["runner"], board["machine"]) == ("qemu_system", "mps2-an386")
    assert board["compiler"] == "arm-none-eabi-gcc" and "gcc-arm-none-eabi" in board["packages"]
    assert rows["cortex-m4"]["flash_bytes"] is rows["x86-64-v3"]["ram_bytes"] is None
    assert rows["raspberry-pi-4"]["runner"] == "qemu_user"


def test_list_of_targets_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    rows = {row["name"]: row for row in tvm_compress("list", "targets", "--json").json}
    assert rows["host"]["runs_here"] is True
    assert rows["cortex-m4"]["runs_here"] is False
    assert rows["cortex-m4"]["missing"] == ["arm-none-eabi-gcc", "qemu-system-arm"]
    out = " ".join(tvm_compress("list", "targets").out.split())
    assert "missing here: arm-none-eabi-gcc, qemu-system-arm (apt-get install gcc-arm" in out


def test_table_of_targets_has_memories_and_fits_100_columns() -> None:
    lines = tvm_compress("list", "targets").out.splitlines()
    assert max(map(len, lines)) <= 100
    head = next(line for line in lines if "name" in line)
    assert "flash kB" in head and "RAM kB" in head
    board = next(line.split() for line in lines if "bluepill-f103c8" in line)
    assert "66" in board and "20" in board  # 64 KiB, 20 KiB


def test_profile_says_where_parameters_and_operations_are(tmp_path: Path) -> None:
    model = tiny_onnx(tmp_path / "tiny.onnx")
    result = tvm_compress("profile", model, "--json")
    assert result.status == 0
    profile = result.json
    layers = {layer["name"]: layer for layer in profile["layers"]}
    assert layers["conv"]["macs"] == 8 * 8 * 8 * 9
    assert layers["conv"]["parameters"] == 8 * 9 + 8
    assert layers["fc"]["macs"] == 4 * 128
    assert layers["fc"]["weight_bytes"] == 4 * (4 * 128 + 4)
    assert profile["macs"] == 8 * 8 * 8 * 9 + 4 * 128
    assert profile["peak_activation_bytes"] == 4 * (8 * 64 + 8 * 16)  # ReLU's and the pool's result
    text = tvm_compress("profile", model).out
    assert "% of the parameters sit in the fully connected layers" in text
    assert "% of the operations in the conv2d layers" in text


def test_profile_of_a_small_model_takes_seconds(repository: Path, tmp_path: Path) -> None:
    """Issue: under 6 s. CPU time, since other jobs may be running; the best of two."""
    model = str(tiny_onnx(tmp_path / "tiny.onnx"))
    used = []
    for _ in range(2):
        before = os.times()
        started = time.perf_counter()
        done = in_new_process(repository, "profile", model, "--json")
        wall = time.perf_counter() - started
        after = os.times()
        cpu = (
            after.children_user - before.children_user
            + after.children_system - before.children_system
        )  # fmt: skip
        used.append(min(wall, cpu))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"] == "tiny"
    assert min(used) < 6


def test_output_cut_off_by_a_pipe_is_no_error(repository: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m tvm_compress.cli list recipes --schema | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=repository,
        check=False,
    )
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr and "error" not in done.stderr
