"""The verb `tune`, in processes of its own: killed, resumed, exported, used by `compress`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.command_line import tiny_data, tiny_onnx, tvm_compress
from tvm_compress.tuning.database import RECORDS, Database, read_export, write_export

pytestmark = pytest.mark.links


def lines(folder: Path) -> int:
    path = folder / RECORDS
    return path.read_text().count("\n") if path.exists() else 0


def processes_of(group: int) -> list[str]:
    """Command lines that still run in children of a process that is gone."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                status = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"TUNE_TEST={group}".encode() in status:
                found.append(command)
    return found


def test_kill_9_loses_nothing_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "db"
    model = tiny_onnx(tmp_path / "model.onnx")
    arguments = ["tune", str(model), "--recipe", "none", "--threads", "1", "--trials", "14",
                 "--database", str(folder)]  # fmt: skip
    command = [
        sys.executable, "-c", "from tvm_compress.cli import main; main()", *arguments,
    ]  # fmt: skip
    root, temporary = str(Path(__file__).parents[2]), tmp_path / "temporary"
    temporary.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": root,
        "TUNE_TEST": str(os.getpid()),
        "TMPDIR": str(temporary),
    }
    run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while lines(folder) < 3 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    measured = lines(folder)
    assert measured >= 3
    while processes_of(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(os.getpid()) == []  # the workers ended with it
    assert len(list(temporary.iterdir())) == 1

    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    result = tvm_compress(*arguments, "--json")
    assert list(temporary.iterdir()) == []  # what the killed run left is gone as well
    assert result.status == 0, result.err
    said = result.json
    assert said["trials_before"] + said["trials"] == 14
    assert 3 <= said["trials_before"] <= measured
    assert {task["state"] for task in said["tasks"]} <= {"open", "converged"}

    exported = tmp_path / "records.json"
    assert tvm_compress("tune", "--export", exported, "--database", folder).status == 0
    winners = Database(folder, shipped=False).winners()
    assert len(json.loads(exported.read_text())["records"]) >= len(winners)
    listed = tvm_compress("tune", "--list", "--database", folder, "--json")
    assert {record["workload"] for record in listed.json["records"]} >= {
        record.workload for record in winners
    }


def test_compress_tunes_and_says_so(tmp_path: Path) -> None:
    model, data = tiny_onnx(tmp_path / "model.onnx"), tiny_data(tmp_path / "data.npz")
    folder, out = tmp_path / "db", tmp_path / "out"
    options = ("--calib", data, "--threads", 1, "--trials", 6, "--database", folder, "--json")
    first = tvm_compress("compress", model, "-o", out, *options)
    assert first.status == 0, first.err
    assert first.json["after"]["tunable_kernels"] == 2
    assert "tune" in [step["name"] for step in first.json["steps"]]
    assert lines(folder) >= 6

    # Somebody else found that the second choice is a hundred times faster.
    measured = Database(folder, shipped=False)._measured.values()
    record = next(r for found in measured for r in found[1:] if r.seconds and not r.is_verified)
    default = next(f[0].choice for f in measured if f[0].workload == record.workload)
    seconds = 100 * (record.seconds or 0)
    faster = dataclasses.replace(record, default_seconds=seconds, default=default)
    write_export(tmp_path / "records.json", [faster])
    imported = tvm_compress("tune", "--import", tmp_path / "records.json", "--database", folder)
    assert imported.status == 0, imported.err
    second = tvm_compress("compress", model, "-o", out, *options)
    assert second.status == 0, second.err
    assert second.json["after"]["tuned_kernels"] >= 1
    assert all(check["passed"] for check in second.json["checks"])
    assert faster in read_export(out / "tuning" / "records.json")
    steps = {step["name"]: step for step in second.json["steps"]}
    assert steps["calibrate"]["cached"] and steps["build reference"]["cached"]
    assert not steps["build compressed"]["cached"]
    # One kernel has another choice now; the others are those of the first run.
    assert re.search(r"from cache, [12] compiled", steps["build compressed"]["detail"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "give a MODEL"),
        (["--list", "--rpc-key", "x"], "belong together"),
        (["--import", "nothing.json"], "nothing.json: cannot be read: No such file"),
        (["nothing.onnx"], "nothing.onnx"),
        (["--list", "--trials", "0"], "--trials"),
        (["model.onnx", "--target", "nowhere"], "no target 'nowhere'"),
        (["model.onnx", "--threads", "1000"], "give --threads"),
        (["model.onnx", "--rpc-tracker", "x", "--rpc-key", "y"], "host:port"),
    ],
)
def test_wrong_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_onnx(tmp_path / "model.onnx")
    result = tvm_compress("tune", "--database", tmp_path / "db", *arguments)
    assert result.status == 2
    assert error in result.error
    assert not (tmp_path / "db").exists()


def test_database_must_be_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "db"
    path.write_text("x")
    result = tvm_compress("tune", "--list", "--database", path)
    assert result.status == 2
    assert "is a folder" in result.error
