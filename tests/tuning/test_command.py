"""The verb `tune`, in processes of its own: killed, resumed, exported, used by `compress`."""

from __future__ import annotations

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
from tvm_compress.flow import compress_job
from tvm_compress.progress import Progress
from tvm_compress.tuning.database import RECORDS, Database, read_export, write_export
from tvm_compress.tuning.record import Conditions, Record
from tvm_compress.tuning.scratch import PREFIX
from tvm_compress.tuning.tasks import extract_tasks
from tvm_compress.tuning.tune import job_of, this_cpu

pytestmark = pytest.mark.links


def lines(folder: Path) -> int:
    path = folder / RECORDS
    return path.read_text().count("\n") if path.exists() else 0


def of_folder(folder: Path) -> list[Record]:
    measured = Database(folder, shipped=False)._measured.values()
    return [record for found in measured for record in found]


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
    assert len(list(temporary.glob(f"{PREFIX}*"))) == 1  # a killed linker may leave files as well

    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    result = tvm_compress(*arguments, "--json")
    assert list(temporary.glob(f"{PREFIX}*")) == []  # what the killed run left is gone as well
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
    # Both sides: what is compared afterwards was tuned alike.
    assert first.json["before"]["tunable_kernels"] == 2
    workloads = {record.workload for record in of_folder(folder)}
    assert len(workloads) == 4

    # Somebody else found that a choice which did not win here is a hundred times faster.
    job = job_of(model, "int8", None, data, threads=1)
    task = extract_tasks(compress_job(job, Progress()), job.target)[0]
    assert task.key in workloads
    known = [task.space.default, *(record.choice for record in of_folder(folder))]
    faster = Record(
        workload=task.key,
        template=task.space.template,
        choice=next(choice for choice in task.space if choice not in known),
        conditions=Conditions.of(job.target, this_cpu()),
        cost=1e-9,
        default_cost=1e-7,
        default=dict(task.space.default),
    )
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

    refused = tvm_compress("tune", out, "--trials", 3, "--database", folder)
    assert refused.status == 2
    assert "is an artefact" in refused.error
    assert f"tvm-compress tune MODEL --recipe {out / 'recipe.yaml'}" in refused.error


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "give a MODEL"),
        (["--list", "--rpc-key", "x"], "belong together"),
        (["--import", "nothing.json"], "nothing.json: cannot be read: No such file"),
        (["nothing.onnx"], "nothing.onnx"),
        (["--list", "--trials", "-1"], "--trials"),
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
