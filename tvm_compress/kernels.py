"""The kernel calls of a compiled library, and what each one computed and how long it took.

`reference/kernels.json` of an artefact holds one `LibraryInfo` for each library.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .report.rows import Bytes

if TYPE_CHECKING:
    from .runtime import Session


@dataclass(frozen=True)
class TensorInfo:
    """How a tensor inside a library relates to the model's graph.

    Physical axis i is axis `perm[i]` of `shape`. Codes have real values
    `scale * (code - zero_point)` and stand for the graph's tensor `source`.
    """

    shape: tuple[int, ...]
    perm: tuple[int, ...]
    source: str
    scale: float | None = None
    zero_point: int = 0

    def logical(self, array: np.ndarray) -> np.ndarray:
        """In the axis order of the graph, as stored (codes stay codes)."""
        physical = array.reshape([self.shape[axis] for axis in self.perm])
        return physical.transpose(np.argsort(self.perm))

    def real(self, array: np.ndarray) -> np.ndarray:
        """In the axis order of the graph, as real numbers."""
        values = self.logical(array)
        if self.scale is None:
            return values
        return (values.astype(np.float64) - self.zero_point) * self.scale


@dataclass(frozen=True)
class Call:
    """One kernel call: its symbol, the layers it computes and the variable it writes."""

    symbol: str
    layers: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class LibraryInfo:
    """What is known about one compiled library."""

    calls: tuple[Call, ...]
    tensors: Mapping[str, TensorInfo]  # by the variable that a call writes
    layer_bytes: Mapping[str, int]  # encoded weights, scales, biases and tables of each layer
    bytes: Bytes
    plan_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LibraryInfo:
        """Inverse of `to_json`."""
        return cls(
            calls=tuple(Call(c["symbol"], tuple(c["layers"]), c["output"]) for c in value["calls"]),
            tensors={
                name: TensorInfo(
                    tuple(t["shape"]), tuple(t["perm"]), t["source"], t["scale"], t["zero_point"]
                )
                for name, t in value["tensors"].items()
            },
            layer_bytes=dict(value["layer_bytes"]),
            bytes=Bytes(**value["bytes"]),
            plan_bytes=value["plan_bytes"],
        )


class Observer:
    """Follows one inference call by call.

    `on_call(index, result, seconds)` is called after kernel call `index` with the tensor that it
    wrote. Calls of a branch that was not taken are skipped.
    """

    def __init__(self, info: LibraryInfo, on_call: Callable[[int, Any, float], None]) -> None:
        self._symbols = [call.symbol for call in info.calls]
        self._on_call = on_call
        self._next = 0
        self._started = 0.0

    def run(self, session: Session, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One observed inference."""
        self._next = 0
        session.observe(self._hook)
        try:
            return session.run(feed)
        finally:
            session.observe(None)

    def _hook(self, symbol: str, before: bool, arguments: tuple[Any, ...]) -> None:
        now = time.perf_counter()
        if before:
            self._started = time.perf_counter()
            return
        try:
            index = self._symbols.index(symbol, self._next)
        except ValueError:
            return  # not a kernel: allocation, reshape, ...
        self._next = index + 1
        self._on_call(index, arguments[-1], now - self._started)


def capture(
    session: Session, info: LibraryInfo, feed: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One inference: its outputs, and every tensor that a kernel wrote, by variable, as stored."""
    tensors: dict[str, np.ndarray] = {}

    def keep(index: int, result: Any, _seconds: float) -> None:
        tensors[info.calls[index].output] = result.numpy().copy()

    return Observer(info, keep).run(session, feed), tensors
