"""A Linux board behind TVM's RPC tracker: its C project as a shared library, called from here.

The library is what the board's own program would be linked from, with one function around it
(`targets/runtime/rpc/tvm_call.c`) that TVM's server can load and call. Nothing is connected to but
the tracker that the user named in this call or in the board's file, and the devices it hands out.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import ArtefactError, TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..targets import Target
    from .project import Program

_CONNECT_SECONDS = 5.0
REGISTER_SECONDS = 10.0  # a server that was started just now has not told the tracker yet
_BUSY_SECONDS = 60.0
_SESSION_SECONDS = 600  # then the server ends a session that hangs
_MOST_REPEATS = 10_000
NAME_IT = "name it: --rpc-tracker HOST:PORT --rpc-key KEY"

T = TypeVar("T")


@dataclass(frozen=True)
class Rpc:
    """Where to run instead of here."""

    tracker: str
    """host:port"""
    key: str

    def __post_init__(self) -> None:
        host, _, port = self.tracker.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
            raise TargetError(f"RPC tracker {self.tracker!r} is not of the form host:port")
        if not self.key:
            raise TargetError("the key of a device on an RPC tracker is not empty")

    @classmethod
    def of(cls, target: Target) -> Rpc:
        """The device that a target's programs run on. Raises `TargetError`: none is named."""
        if not target.rpc_tracker:
            raise TargetError(f"target {target.name!r} runs behind an RPC tracker; {NAME_IT}")
        return cls(target.rpc_tracker, target.rpc_key)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.tracker.rpartition(":")
        return host, int(port)

    def require(self) -> None:
        """Raise `TargetError` when there is no such tracker, or no such device on it."""
        try:  # TVM's own client keeps trying for a minute
            socket.create_connection(self.address, _CONNECT_SECONDS).close()
        except OSError as error:
            raise TargetError(
                f"no RPC tracker answers at {self.tracker} ({error.strerror or error}); start one "
                "with `python -m tvm.exec.rpc_tracker`"
            ) from None
        from tvm import rpc

        started = time.monotonic()
        try:
            tracker = rpc.connect_tracker(*self.address)
            while True:
                summary = tracker.summary()
                devices = {str(s["key"]).removeprefix("server:") for s in summary["server_info"]}
                is_free = summary["queue_info"].get(self.key, {}).get("free", 0) > 0
                seconds = _BUSY_SECONDS if self.key in devices else REGISTER_SECONDS
                if (is_free and self.key in devices) or time.monotonic() >= started + seconds:
                    break
                time.sleep(0.2)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise TargetError(
                f"what answers at {self.tracker} is no RPC tracker of TVM's ({_line(error)})"
            ) from None
        if self.key not in devices:
            has = ", ".join(sorted(devices)) or "no device"
            server = f"python -m tvm.exec.rpc_server --tracker {self.tracker} --key {self.key}"
            raise TargetError(
                f"the RPC tracker at {self.tracker} has no device {self.key!r}, it has {has}; "
                f"start one with `{server}`"
            )
        if not is_free:  # TVM's own client would wait for ever
            raise TargetError(
                f"device {self.key!r} of the RPC tracker at {self.tracker} is busy since "
                f"{_BUSY_SECONDS:.0f} s; try again when nobody uses it, or start its server again"
            )


class _Model:
    """The library on the board."""

    def __init__(self, program: Program, rpc: Rpc) -> None:
        from tvm import rpc as tvm_rpc

        self.project = program.project
        tracker = tvm_rpc.connect_tracker(*rpc.address)
        session = tracker.request(rpc.key, session_timeout=_SESSION_SECONDS)
        self.session = session
        self.device = session.cpu(0)
        session.upload(str(program.elf))
        self.module = session.load_module(program.elf.name)
        self.outputs = [
            self._tensor(np.zeros(spec.shape, spec.dtype)) for spec in self.project.outputs
        ]

    def _tensor(self, array: np.ndarray) -> Any:
        import tvm

        return tvm.runtime.tensor(array, self.device)

    def inputs(self, feed: Mapping[str, np.ndarray]) -> list[Any]:
        return [
            self._tensor(np.asarray(feed[spec.name], order="C")) for spec in self.project.inputs
        ]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.module["run"](*self.inputs(feed), *self.outputs)
        return {
            spec.name: tensor.numpy()
            for spec, tensor in zip(self.project.outputs, self.outputs, strict=True)
        }

    def times(self, feed: Mapping[str, np.ndarray], seconds: float) -> list[float]:
        """Seconds of one call each, measured on the board, until `seconds` are over."""
        arguments = [*self.inputs(feed), *self.outputs]

        def measure(repeat: int) -> list[float]:
            timer = self.module.time_evaluator("run", self.device, number=1, repeat=repeat)
            return [float(t) for t in timer(*arguments).results]

        once = min(measure(3))
        return measure(max(3, min(_MOST_REPEATS, round(seconds / max(once, 1e-6)))))


def run_remote(
    program: Program,
    feeds: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Outputs of every sample. Raises `TargetError`: no tracker, no device, one of another
    architecture; `ArtefactError`: the program failed."""

    def work(model: _Model) -> list[dict[str, np.ndarray]]:
        found = []
        for feed in feeds:
            found.append(model.run(feed))
            if progress is not None:
                progress(len(found))
        return found

    return _on_board(program, work)


def time_remote(program: Program, feed: Mapping[str, np.ndarray], seconds: float) -> list[float]:
    """Seconds of single calls with one sample, for about `seconds`; errors as of `run_remote`."""
    return _on_board(program, lambda model: model.times(feed, seconds))


def _on_board(program: Program, work: Callable[[_Model], T]) -> T:
    target = program.target
    rpc = Rpc.of(target)
    rpc.require()
    # Not raised within `except`: as long as a traceback holds the session, the device is taken.
    failed: TargetError | ArtefactError
    try:
        model = _Model(program, rpc)
    except Exception as error:  # noqa: BLE001 - whatever a foreign server does
        detail = _line(error)
        if "model.so" in detail or "dlopen" in detail:
            failed = TargetError(
                f"device {rpc.key!r} cannot load a program for {target.architecture} "
                f"({target.name}); is it another CPU? ({detail})"
            )
        else:
            failed = TargetError(f"device {rpc.key!r} at {rpc.tracker} failed: {detail}")
    else:
        try:
            return work(model)
        except Exception as error:  # noqa: BLE001 - the same
            failed = ArtefactError(f"device {rpc.key!r} failed while it ran: {_line(error)}")
    raise failed


def _line(error: Exception) -> str:
    """The line of TVM's message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[-300:]
