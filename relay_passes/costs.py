"""What passes ask about the target: what a layer costs there in one form or another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schedules.sparse_form import SparseForm
from .layer_spec import LayerSpec

# A smaller layer may take so many times as long as the dense one; one that is not smaller has to be
# so much faster, which measuring alone does not make it.
TOLERATED, CLEARLY_FASTER = 1.1, 0.95

MEASURED, COUNTED, PREDICTED = "us", "instructions", "cycles"
HOW = {MEASURED: "measured", COUNTED: "counted", PREDICTED: "predicted"}


@dataclass(frozen=True)
class StoredCost:
    """What a layer costs that is stored without its zeros and decoded before every dense call."""

    cost: float
    bytes: int


@dataclass(frozen=True)
class Comparison:
    """What a layer costs on the target in its cheapest sparse form, and with all its weights."""

    form: SparseForm | None
    """None: the target has no kernel that skips such zeros."""
    cost: float
    dense_cost: float
    bytes: int
    """Stored, indices included."""
    dense_bytes: int
    unit: str
    """`MEASURED` on the target, `COUNTED` under its emulator or `PREDICTED`."""
    stored: StoredCost | None = None
    """With a dense kernel and without its zeros in memory; None: hardly smaller, or not to be
    had."""

    @property
    def pays(self) -> bool:
        """Whether the sparse layer is smaller and hardly slower, or clearly faster."""
        limit = TOLERATED if self.bytes < self.dense_bytes else CLEARLY_FASTER
        return self.form is not None and self.cost <= limit * self.dense_cost

    @property
    def storing_pays(self) -> bool:
        """Whether decoding hardly slows the dense kernel down; it is smaller always."""
        return self.stored is not None and self.stored.cost <= TOLERATED * self.dense_cost

    @property
    def best(self) -> Literal["sparse", "stored", "dense"]:
        """The sparse kernel where it is clearly faster, else the smaller of the forms that pay."""
        if self.pays and (
            self.stored is None
            or not self.storing_pays
            or self.cost <= CLEARLY_FASTER * self.dense_cost
            or self.bytes <= self.stored.bytes
        ):
            return "sparse"
        return "stored" if self.storing_pays else "dense"

    @property
    def words(self) -> str:
        """Such as `sparse 16x1 takes 1.30x of dense's time (measured)`."""
        if self.form is None:
            return "no kernel of the target skips such zeros"
        share = self.cost / self.dense_cost
        return f"sparse {self.form.words} takes {share:.2f}x of dense's time ({HOW[self.unit]})"


@dataclass(frozen=True)
class LayerUse:
    """A layer as it would be, which the network calls so many times."""

    layer: str
    spec: LayerSpec
    calls: int = 1


@dataclass(frozen=True)
class Total:
    """What some dense layers cost together on the target, and the bytes of their weights as it
    stores them, which may be in whole vectors."""

    cost: float
    bytes: int
    unit: str
    """As in `Comparison`."""

    def is_faster(self, other: Total) -> bool:
        """Clearly: by more than measuring alone makes it."""
        return self.cost <= CLEARLY_FASTER * other.cost

    def is_slower(self, other: Total) -> bool:
        """More than measuring alone makes it."""
        return self.cost > TOLERATED * other.cost

    def words(self, other: Total) -> str:
        """Such as `take 28 us instead of 21 us (measured) and 4096 bytes instead of 4608`."""
        if self.unit == PREDICTED:
            time = f"{self.cost / other.cost:.2f}x of the time"
        else:
            time = f"{self.cost:.3g} {self.unit} instead of {other.cost:.3g} {self.unit}"
        size = "as many bytes"
        if self.bytes != other.bytes:
            size = f"{self.bytes} bytes instead of {other.bytes}"
        return f"take {time} ({HOW[self.unit]}) and {size}"


class LayerCosts(Protocol):
    """Costs of layers on the target that a model is compressed for.

    `layer` is a layer's name in the module; specs describe kernels as they are in that module,
    float32 (`layer_spec.layer_spec`). Costs are of the kernels that ship: in the integers that
    later steps of the recipe give the layer, in the layout and schedule of the target.
    """

    @property
    def lanes(self) -> int:
        """Sums of 32 bits that a register of the target holds."""
        ...

    def compare(self, layer: str, chains: Sequence[Sequence[LayerSpec]]) -> list[float]:
        """Costs of alternatives, each of them dense kernels one behind the other that take the
        place of `layer`; the first may be the layer as it is. All in one unit."""
        ...

    def totals(self, alternatives: Sequence[Sequence[LayerUse]]) -> list[Total]:
        """What the layers of each alternative cost together, all in one unit."""
        ...

    def sparse(self, layer: str, spec: LayerSpec, kept: NDArray[np.bool_]) -> Comparison:
        """Of a layer of which only the weights `kept` [groups, K, N] are not zero, in the cheapest
        sparse form of the target, with all weights in the dense one."""
        ...

    def blocks(self, layer: str, spec: LayerSpec) -> tuple[int, ...]:
        """How many neighbouring outputs share their inputs in the target's sparse kernels for the
        layer, the cheapest for a weight first; empty: the target has no such kernel."""
        ...
