"""Boards behind TVM's RPC tracker, here on loopback: tuned, run, verified and timed there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import tiny_data, tiny_onnx, tvm_compress
from tests.tuning.tuning_tasks import TARGET, small_task
from tvm_compress.artefact import Artefact
from tvm_compress.board_file import find_target
from tvm_compress.errors import TargetError
from tvm_compress.kernel_bench import Kernel, RemoteBench, bench_of
from tvm_compress.runners import rpc
from tvm_compress.runners.rpc import Rpc
from tvm_compress.schedules import MatmulSpec
from tvm_compress.targets import get_target
from tvm_compress.tuning.database import Database
from tvm_compress.tuning.driver import tune_tasks
from tvm_compress.tuning.ledger import Budget
from tvm_compress.tuning.tune import device_of

pytestmark = pytest.mark.links


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rpc]:
    """A tracker and a server of device `board`, in processes of their own."""
    # TVM imports torch where it is installed, at several seconds for each of them.
    folder = tmp_path_factory.mktemp("no-torch")
    (folder / "torch.py").write_text("raise ModuleNotFoundError('not needed here')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        from tvm.rpc.server import Server
        from tvm.rpc.tracker import Tracker

        tracker = Tracker(host="127.0.0.1", port=9190, port_end=9290)
        server = Server(
            host="127.0.0.1",
            port=9291,
            port_end=9391,
            key="board",
            tracker_addr=("127.0.0.1", tracker.port),
        )
    yield Rpc(f"127.0.0.1:{tracker.port}", "board")
    server.terminate()
    tracker.terminate()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is not there is missed sooner."""
    monkeypatch.setattr(rpc, "REGISTER_SECONDS", 1.0)


def board_file(folder: Path, cpu: str, *lines: str) -> Path:
    path = folder / "pc.yaml"
    path.write_text("\n".join(["version: 1", f"cpu: {cpu}", "runner: rpc", *lines, ""]))
    return path


def test_tunes_on_a_server(tmp_path: Path, tracker: Rpc) -> None:
    task = small_task(4)
    database = Database(tmp_path / "db", shipped=False)
    result = tune_tasks([task], TARGET, database, Budget(), cpu="rpc board", rpc=tracker)
    (found,) = result.tasks
    assert (found.trials, found.failures, found.state) == (4, 0, "converged")
    assert found.best_cost is not None
    assert found.best_cost < 1

    unknown = Rpc(tracker.tracker, "other")
    with pytest.raises(TargetError, match="no device 'other', it has board"):
        tune_tasks([task], TARGET, database, Budget(), cpu="rpc other", rpc=unknown)


def test_kernels_are_compared_on_a_server(tmp_path: Path, tracker: Rpc) -> None:
    lines = (f"tracker: {tracker.tracker}", f"key: {tracker.key}")
    target = find_target(str(board_file(tmp_path, "x86-64-v2", *lines)))
    bench = bench_of(target)
    assert isinstance(bench, RemoteBench)
    small, large = (
        Kernel(spec, (np.ones(spec.weight_shape, "float32"),))
        for spec in (MatmulSpec(rows=rows, in_features=64, out_features=48) for rows in (1, 256))
    )
    few, many = bench.costs([small, large])
    assert 0 < few < many < 1e6

    nobody = RemoteBench(replace(target, rpc_key="other"))
    with pytest.raises(TargetError, match="no device 'other'"):
        nobody.costs([small])


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_an_artefact_is_checked_run_and_timed_on_a_board(tmp_path: Path, tracker: Rpc) -> None:
    lines = (f"tracker: {tracker.tracker}", f"key: {tracker.key}")
    board = board_file(tmp_path, "x86-64-v2", *lines)
    model, data = tiny_onnx(tmp_path / "model.onnx"), tiny_data(tmp_path / "data.npz")
    out, there = tmp_path / "out", tmp_path / "there.npz"
    made = tvm_compress("compress", model, "--calib", data, "--target", board, "-o", out, "--json")
    assert made.status == 0, made.err
    assert {check["name"]: check["passed"] for check in made.json["checks"]}  # on the board
    assert all(check["passed"] for check in made.json["checks"])

    # The artefact does not say whom to connect to: it may come from anybody.
    assert tracker.tracker not in (out / "manifest.json").read_text()
    nobody = tvm_compress("run", out, "--input", data, "-o", there)
    assert nobody.status == 2
    assert "name it: --rpc-tracker HOST:PORT --rpc-key KEY" in nobody.error

    device = ("--rpc-tracker", tracker.tracker, "--rpc-key", tracker.key)
    assert tvm_compress("verify", out, *device).status == 0
    assert tvm_compress("run", out, "--input", data, "-o", there, *device).status == 0
    original = Artefact.open(out).session("original")
    with np.load(data) as inputs, np.load(there) as outputs:
        wanted = [original.run({"image": image[None]})["scores"][0] for image in inputs["image"]]
        assert outputs["scores"].shape == (40, 4)
        np.testing.assert_allclose(outputs["scores"], wanted, atol=0.1 * np.ptp(wanted))
    timed = tvm_compress("benchmark", out, *device, "--seconds", 0.1, "--json")
    assert timed.status == 0, timed.err
    assert timed.json["instructions"] is None
    latency = timed.json["latency"]
    assert 0 < latency["least_us"] <= latency["median_us"] <= latency["p90_us"] < 1e6

    other = tvm_compress("verify", out, *device[:3], "other")
    assert other.status == 2 and "no device 'other', it has board" in other.error
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["target"]["board"] |= {"cpu": "cortex-m4", "runner": "emulator"}
    (out / "manifest.json").write_text(json.dumps(manifest))
    bare = tvm_compress("verify", out, *device)
    assert bare.status == 2 and "without an operating system" in bare.error
    (out / "deploy" / "model.so").touch()
    library = tvm_compress("verify", out, *device)
    assert library.status == 2 and "is a shared library for this machine's CPU" in library.error


def test_board_of_another_cpu(tmp_path: Path, tracker: Rpc) -> None:
    from tvm_compress.runners.project import build_library
    from tvm_compress.targets.toolchains import missing_tools

    from .test_runners import samples, toy

    lines = (f"tracker: {tracker.tracker}", f"key: {tracker.key}")
    target = find_target(board_file(tmp_path, "cortex-a72", *lines))
    if missing_tools(target):
        pytest.skip(f"{', '.join(missing_tools(target))} not installed")
    program = build_library(toy(tmp_path / "model"), target, tmp_path)
    with pytest.raises(TargetError, match="cannot load a program for aarch64.*another CPU"):
        rpc.run_remote(program, samples([1]))


def test_device_that_somebody_else_uses(tracker: Rpc, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm.rpc import connect_tracker

    monkeypatch.setattr(rpc, "_BUSY_SECONDS", 0.5)
    session = connect_tracker(*tracker.address).request(tracker.key)
    with pytest.raises(TargetError, match="device 'board' .* is busy"):
        tracker.require()
    del session
    monkeypatch.undo()
    tracker.require()


def test_board_file_names_the_device(tmp_path: Path) -> None:
    board = find_target(board_file(tmp_path, "cortex-a72", "tracker: pi.local:9190", "key: pi"))
    assert Rpc.of(board) == Rpc("pi.local:9190", "pi")
    assert device_of(board) == "rpc pi"
    plain = find_target(board_file(tmp_path, "cortex-a72"))
    assert plain.fingerprint() == board.fingerprint()  # where it runs changes no byte
    with pytest.raises(TargetError, match="behind an RPC tracker; name it"):
        Rpc.of(plain)
    assert find_target(board_file(tmp_path, "x86-64-v3")).is_cross
    assert not get_target("x86-64-v3").is_cross


@pytest.mark.parametrize(
    ("cpu", "lines", "message"),
    [
        ("cortex-a72", ["tracker: pi:9190"], "tracker and key belong together"),
        ("cortex-a72", ["tracker: pi", "key: pi"], "host:port"),
        ("cortex-m4", [], "'cortex-m4' has no operating system"),
    ],
)
def test_wrong_board_file(tmp_path: Path, cpu: str, lines: list[str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        find_target(board_file(tmp_path, cpu, *lines))


def test_tracker_that_is_not_there(tmp_path: Path) -> None:
    database = Database(tmp_path, shipped=False)
    nobody = Rpc("127.0.0.1:9", "board")
    with pytest.raises(TargetError, match="no RPC tracker answers at 127.0.0.1:9"):
        tune_tasks([small_task(2)], TARGET, database, Budget(), cpu="rpc", rpc=nobody)


@pytest.mark.parametrize("tracker", ["here", ":1", "here:", "here:99999", "here:x"])
def test_address_is_checked(tracker: str) -> None:
    with pytest.raises(TargetError, match="host:port"):
        Rpc(tracker, "board")
