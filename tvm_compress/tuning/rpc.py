"""A device behind TVM's RPC tracker."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from ..errors import TargetError

_CONNECT_SECONDS = 5.0
REGISTER_SECONDS = 10.0  # a server that was started just now has not told the tracker yet


@dataclass(frozen=True)
class Rpc:
    """Where to measure instead of here."""

    tracker: str
    """host:port"""
    key: str

    def __post_init__(self) -> None:
        host, _, port = self.tracker.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
            raise TargetError(f"RPC tracker {self.tracker!r} is not of the form host:port")

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

        tracker = rpc.connect_tracker(*self.address)
        deadline = time.monotonic() + REGISTER_SECONDS
        while self.key not in (known := tracker.summary()["queue_info"]):
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            has = ", ".join(sorted(known)) or "no device"
            server = f"python -m tvm.exec.rpc_server --tracker {self.tracker} --key {self.key}"
            raise TargetError(
                f"the RPC tracker at {self.tracker} has no device {self.key!r}, it has {has}; "
                f"start one with `{server}`"
            )
