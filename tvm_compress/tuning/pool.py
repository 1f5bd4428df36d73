"""Worker processes that live long, and what happens when one of them does not.

A worker answers one request at a time. Crash, hang and error are results like any other: the driver
gets a sentence, and the next request a worker that works.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import TargetError

COMMAND = (sys.executable, "-m", f"{__package__}.worker")
START_SECONDS = 180.0  # importing TVM on a machine that is busy with other things


class Worker:
    """One process, pinned to `cores`; started when the first request comes.

    `setup` are requests that a fresh process gets before any other.
    """

    def __init__(
        self, cores: Iterable[int], threads: int, setup: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.cores = sorted(cores)
        self._threads = threads
        self._setup = [{"op": "start", "threads": threads}, *setup]
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._deadline = 0.0
        self._limit = 0.0
        self._paused_at: float | None = None
        self._waits_for = 0  # answers: those of `setup`, then the request's
        self.job: Any = None
        """What the driver gave with the request in flight; None: idle."""

    @property
    def is_idle(self) -> bool:
        return self.job is None

    @property
    def is_paused(self) -> bool:
        return self._paused_at is not None

    def shares(self, other: Worker) -> bool:
        """Whether the two have a core in common, be it as two hardware threads of it."""
        return not siblings(self.cores).isdisjoint(other.cores)

    @property
    def connection(self) -> Connection:
        assert self._connection is not None
        return self._connection

    @property
    def seconds_left(self) -> float:
        """Of the time limit of the request in flight, which stands still while we are paused."""
        if self._paused_at is not None:
            return self._deadline - self._paused_at
        return max(0.0, self._deadline - time.monotonic())

    def send(self, job: Any, request: Mapping[str, Any], seconds: float) -> None:
        """Begin a request; it may take `seconds`."""
        assert self.is_idle
        deadline = time.monotonic() + seconds
        requests: list[Mapping[str, Any]] = [request]
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._start()
            deadline += START_SECONDS
            requests = [*self._setup, request]
        self.job, self._limit, self._deadline = job, seconds, deadline
        self._waits_for = len(requests)
        try:
            for message in requests:
                self.connection.send_bytes(json.dumps(message).encode())
        except OSError:
            pass  # it died just now: `receive` sees that

    def receive(self) -> dict[str, Any] | None:
        """The answer to the request, when there is one; `{"error": ...}` for a worker that crashed
        or whose time is over. None: not yet."""
        try:
            while self.connection.poll():
                answer = json.loads(self.connection.recv_bytes())
                self._waits_for -= 1
                if self._waits_for == 0:
                    self.job = None
                    return answer
                if "error" in answer:  # of the setup
                    self.stop()
                    raise TargetError(f"tuning cannot start: {answer['error']}")
                if self._waits_for == 1:  # the request's own time begins
                    self._deadline = time.monotonic() + self._limit
        except (EOFError, OSError):
            answer = {"error": self._how_it_ended()}
            self.stop()
            return answer
        if self.seconds_left == 0:
            self.stop()
            return {"error": f"timeout: no answer within {self._limit:.0f} s"}
        return None

    def pause(self) -> None:
        """Leave the cores to somebody else until `resume`."""
        if self._process is not None and self._paused_at is None:
            self._paused_at = time.monotonic()
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        if self._paused_at is not None:
            self._deadline += time.monotonic() - self._paused_at
            self._paused_at = None
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """To the worker and the linker it may have started."""
        with contextlib.suppress(ProcessLookupError):
            if self._process is not None:
                os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """Kill the process, whatever it does, and forget its request."""
        self.job = None
        self._paused_at = None
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        package_parent = str(Path(__file__).resolve().parents[2])
        paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TVM_NUM_THREADS": str(self._threads),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the driver
            )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, self.cores)
        self._connection = Connection(ours.detach())

    def _how_it_ended(self) -> str:
        if self._process is None:
            return "crashed"
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "crashed"
        if status < 0:
            return f"crashed: {signal.Signals(-status).name}"
        return f"crashed: exit status {status}"


def siblings(cores: Iterable[int]) -> set[int]:
    """`cores` and the hardware threads that they share physical cores with."""
    found = set(cores)
    for core in cores:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        with contextlib.suppress(OSError, ValueError):
            for part in path.read_text(encoding="ascii").strip().split(","):
                first, _, last = part.partition("-")
                found.update(range(int(first), int(last or first) + 1))
    return found


def wait_for(workers: Iterable[Worker], seconds: float) -> None:
    """Return when a worker has something to receive, or runs out of time, or after `seconds`."""
    busy = [worker for worker in workers if not worker.is_idle]
    if busy:
        limit = min([seconds, *(worker.seconds_left for worker in busy)])
        wait([worker.connection for worker in busy], timeout=limit)
    else:
        time.sleep(min(seconds, 0.05))
