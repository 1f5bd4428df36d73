"""The kernel calls of a compiled library, and what each one computed.

`reference/kernels.json` of an artefact holds one `LibraryInfo` for each library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .report.rows import Bytes

if TYPE_CHECKING:
    from .runtime import Session

OnCall = Callable[[int, tuple[Any, ...]], None]


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

    def stored(self, values: np.ndarray, like: np.ndarray) -> np.ndarray:
        """Real numbers in the graph's axis order, as this tensor holds them: shape and dtype of
        `like`. Inverse of `real`, with the nearest codes."""
        if self.scale is not None:
            limits = np.iinfo(like.dtype)
            codes = np.rint(values / self.scale) + self.zero_point
            values = np.clip(codes, limits.min, limits.max)
        physical = values.reshape(self.shape).transpose(self.perm)
        # Not ascontiguousarray, which turns a scalar into [1].
        return np.asarray(physical.reshape(like.shape).astype(like.dtype), order="C")


@dataclass(frozen=True)
class Call:
    """One kernel call, in execution order: its symbol and the variable it writes.

    `layers` are the layers whose multiply-accumulates it holds (none for a pool or a table).
    """

    symbol: str
    layers: tuple[str, ...]
    output: str
    function: str = "main"  # or the function of a branch


@dataclass(frozen=True)
class LibraryInfo:
    """What is known about one compiled library."""

    calls: tuple[Call, ...]
    tensors: Mapping[str, TensorInfo]  # by the variable that a call writes
    layer_bytes: Mapping[str, int]  # encoded weights, scales, biases and tables of each layer
    bytes: Bytes
    plan_bytes: int
    tuned_kernels: int = 0
    tunable_kernels: int = 0
    layer_macs: Mapping[str, int] = field(default_factory=dict)
    """That the kernels of each layer execute."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LibraryInfo:
        """Inverse of `to_json`."""
        return cls(
            calls=tuple(
                Call(c["symbol"], tuple(c["layers"]), c["output"], c.get("function", "main"))
                for c in value["calls"]
            ),
            tensors={
                name: TensorInfo(
                    tuple(t["shape"]), tuple(t["perm"]), t["source"], t["scale"], t["zero_point"]
                )
                for name, t in value["tensors"].items()
            },
            layer_bytes=dict(value["layer_bytes"]),
            bytes=Bytes(**value["bytes"]),
            plan_bytes=value["plan_bytes"],
            tuned_kernels=value.get("tuned_kernels", 0),
            tunable_kernels=value.get("tunable_kernels", 0),
            layer_macs=dict(value.get("layer_macs", {})),
        )


class Observer:
    """Follows one inference call by call.

    `after(index, arguments)` is called after kernel call `index`, `before` ahead of it; the last
    argument is the tensor that the kernel writes. There is none for the calls of a branch that was
    not taken.
    """

    def __init__(
        self,
        info: LibraryInfo,
        after: OnCall | None = None,
        before: OnCall | None = None,
    ) -> None:
        self._before, self._after = before, after
        self._of_function: dict[str, list[tuple[int, str]]] = {"main": []}
        for index, call in enumerate(info.calls):
            self._of_function.setdefault(call.function, []).append((index, call.symbol))
        self._left: dict[str, list[tuple[int, str]]] = {}  # calls of each function, to come
        self._entered: list[str] = []

    def run(self, session: Session, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One observed inference."""
        self._left = {name: list(calls) for name, calls in self._of_function.items()}
        self._entered = ["main"]
        session.observe(self._hook)
        try:
            return session.run(feed)
        finally:
            session.observe(None)

    def _hook(self, symbol: str, before: bool, arguments: tuple[Any, ...]) -> None:
        if symbol in self._of_function:  # a branch
            if before:
                self._entered.append(symbol)
            else:
                self._entered.pop()
            return
        left = self._left[self._entered[-1]]
        if not left or left[0][1] != symbol:
            return  # no kernel: allocation, reshape, ...
        index, _ = left[0] if before else left.pop(0)
        told = self._before if before else self._after
        if told is not None:
            told(index, arguments)


def capture(
    session: Session,
    info: LibraryInfo,
    feed: Mapping[str, np.ndarray],
    forced: Mapping[str, np.ndarray] | None = None,
    replace: Callable[[str, np.ndarray], np.ndarray | None] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One inference: its outputs, and every tensor that a kernel wrote, by variable, as stored.

    `forced`: variable => real numbers in the graph's axis order, which take the place of what the
    kernel wrote before the next kernel reads it. `replace`(variable, written) gives the same as
    stored; None keeps what was written.
    """
    tensors: dict[str, np.ndarray] = {}

    def keep(index: int, arguments: tuple[Any, ...]) -> None:
        name, result = info.calls[index].output, arguments[-1]
        tensors[name] = result.numpy().copy()
        if forced is not None and name in forced:
            result.copyfrom(info.tensors[name].stored(forced[name], tensors[name]))
        other = replace(name, tensors[name]) if replace is not None else None
        if other is not None:
            result.copyfrom(other.reshape(tensors[name].shape))

    return Observer(info, keep).run(session, feed), tensors
