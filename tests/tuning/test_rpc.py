"""Measuring through TVM's RPC tracker, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tvm_compress.errors import TargetError
from tvm_compress.runners import rpc
from tvm_compress.runners.rpc import Rpc
from tvm_compress.tuning.database import Database
from tvm_compress.tuning.driver import tune_tasks
from tvm_compress.tuning.ledger import Budget

from .tuning_tasks import TARGET, small_task

pytestmark = pytest.mark.links


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rpc]:
    """A tracker and a server of device `board`, in processes of their own."""
    # TVM imports torch where it is installed, at several seconds for each of them.
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('not needed here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
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


def test_tunes_on_a_server(tmp_path: Path, tracker: Rpc, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task(4)
    database = Database(tmp_path / "db", shipped=False)
    result = tune_tasks([task], TARGET, database, Budget(), cpu="rpc board", rpc=tracker)
    (found,) = result.tasks
    assert (found.trials, found.failures, found.state) == (4, 0, "converged")
    assert found.best_cost is not None
    assert found.best_cost < 1

    monkeypatch.setattr(rpc, "REGISTER_SECONDS", 0.1)
    unknown = Rpc(tracker.tracker, "other")
    with pytest.raises(TargetError, match="no device 'other', it has board"):
        tune_tasks([task], TARGET, database, Budget(), cpu="rpc other", rpc=unknown)


def test_tracker_that_is_not_there(tmp_path: Path) -> None:
    database = Database(tmp_path, shipped=False)
    nobody = Rpc("127.0.0.1:9", "board")
    with pytest.raises(TargetError, match="no RPC tracker answers at 127.0.0.1:9"):
        tune_tasks([small_task(2)], TARGET, database, Budget(), cpu="rpc", rpc=nobody)


@pytest.mark.parametrize("tracker", ["here", ":1", "here:", "here:99999", "here:x"])
def test_address_is_checked(tracker: str) -> None:
    with pytest.raises(TargetError, match="host:port"):
        Rpc(tracker, "board")
