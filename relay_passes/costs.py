"""What passes ask about the target: what a layer costs there in one form or another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schedules.sparse_form import SparseForm
from .layer_spec import LayerSpec

# A smaller layer may take so many times as long as the dense one; one that is not smaller has to be
# so much faster, which measuring alone does not make it.
TOLERATED, CLEARLY_FASTER = 1.1, 0.95

# How notes begin of what is kept though it is not faster: it is smaller, or the recipe insists.
SMALLER, INSISTED = "smaller, not faster: ", "insisted on: "

MEASURED, COUNTED, PREDICTED = "us", "instructions", "cycles"
HOW = {MEASURED: "measured", COUNTED: "counted", PREDICTED: "predicted"}


@dataclass(frozen=True)
class Cost:
    """What a layer takes in one form, or what several layers take together."""

    time: float
    """In `unit`."""
    bytes: int
    """Of weights and indices as the target stores them, which may be in whole vectors."""
    unit: str
    """`MEASURED` on the target, `COUNTED` under its emulator or `PREDICTED`."""

    def is_faster(self, other: Cost) -> bool:
        """Clearly: by more than measuring alone makes it."""
        return self.time <= CLEARLY_FASTER * other.time

    def is_slower(self, other: Cost) -> bool:
        """More than measuring alone makes it."""
        return self.time > TOLERATED * other.time

    def is_smaller(self, other: Cost) -> bool:
        return self.bytes < other.bytes

    def pays(self, other: Cost) -> bool:
        """In the place of `other`: clearly faster, or smaller and hardly slower."""
        return self.is_faster(other) or (self.is_smaller(other) and not self.is_slower(other))

    def rule(self, other: Cost) -> str:
        """What it would have to keep to pay, in words."""
        if self.is_smaller(other):
            return f"a smaller one may take {TOLERATED:g}x"
        return f"one that is not smaller has to win by {100 * (1 - CLEARLY_FASTER):.0f} %"

    def words(self, other: Cost) -> str:
        """Such as `1.33x the time (28 us instead of 21, measured) and 11 % fewer bytes (4096
        instead of 4608)`."""
        return f"{self.time_words(other)} and {self._bytes_words(other)}"

    def time_words(self, other: Cost) -> str:
        """The first half of `words`."""
        figures = f"{self.time:.3g} {self.unit} instead of {other.time:.3g}, {HOW[self.unit]}"
        shown = HOW[self.unit] if self.unit == PREDICTED else figures
        return f"{self.time / other.time:.2f}x the time ({shown})"

    def _bytes_words(self, other: Cost) -> str:
        if self.bytes == other.bytes:
            return "as many bytes"
        share = 100 * abs(1 - self.bytes / other.bytes)
        few = "fewer" if self.bytes < other.bytes else "more"
        return f"{share:.0f} % {few} bytes ({self.bytes} instead of {other.bytes})"


@dataclass(frozen=True)
class Decoder:
    """The function that decodes stored weights; all weights that are alike share one."""

    kind: str
    bytes: int
    """Of its code."""


@dataclass(frozen=True)
class Stored:
    """A layer with a dense kernel, whose weight is stored without its zeros and decoded before
    every call."""

    cost: Cost
    decoder: Decoder


@dataclass(frozen=True)
class Sparse:
    """A layer in a sparse form."""

    form: SparseForm
    cost: Cost


@dataclass(frozen=True)
class Comparison:
    """What a layer costs on the target with all its weights, in its cheapest sparse form, and
    stored without its zeros. None: the target has no such kernel, or it would skip nothing."""

    dense: Cost
    sparse: Sparse | None = None
    stored: Stored | None = None

    @property
    def pays(self) -> bool:
        """Whether the sparse layer is smaller and hardly slower, or clearly faster."""
        return self.sparse is not None and self.sparse.cost.pays(self.dense)

    @property
    def storing_pays(self) -> bool:
        """Whether decoding hardly slows the dense kernel down. Its code is not counted, which it
        may share (`vain_decoders`)."""
        return self.stored is not None and self.stored.cost.pays(self.dense)

    @property
    def best(self) -> Literal["sparse", "stored", "dense"]:
        """The sparse kernel where it is clearly faster, else the smaller of the forms that pay."""
        if not self.storing_pays:
            return "sparse" if self.pays else "dense"
        if self.sparse is None or self.stored is None or not self.pays:
            return "stored"
        is_better = self.sparse.cost.is_faster(self.dense)
        return (
            "sparse" if is_better or self.sparse.cost.bytes <= self.stored.cost.bytes else "stored"
        )

    @property
    def words(self) -> str:
        """Why its zeros do not pay, such as `kernel 16x1 takes 1.30x the time (39 us instead of 30,
        measured) and 70 % fewer bytes (900 instead of 3000); a smaller one may take 1.1x`."""
        found = []
        if self.sparse is None:
            found.append("no kernel of the target skips such zeros")
        else:
            cost = self.sparse.cost
            found.append(f"kernel {self.sparse.form.words} takes {cost.words(self.dense)}")
            found.append(cost.rule(self.dense))
        if self.stored is not None and not self.storing_pays:
            cost = self.stored.cost
            found.append(f"decoded per call it takes {cost.time_words(self.dense)}")
        return "; ".join(found)


def vain_decoders(compared: Iterable[Comparison]) -> dict[Decoder, int]:
    """Decoding functions whose code is as large as what all layers save by them that are best
    stored => the bytes saved."""
    saved: dict[Decoder, int] = {}
    for item in compared:
        if item.stored is not None and item.best == "stored":
            decoder = item.stored.decoder
            less = item.dense.bytes - item.stored.cost.bytes
            saved[decoder] = saved.get(decoder, 0) + less
    return {decoder: less for decoder, less in saved.items() if less <= decoder.bytes}


@dataclass(frozen=True)
class LayerUse:
    """A layer as it would be, which the network calls so many times."""

    layer: str
    spec: LayerSpec
    calls: int = 1


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

    def totals(self, alternatives: Sequence[Sequence[LayerUse]]) -> list[Cost]:
        """What the layers of each alternative cost together, dense and all in one unit."""
        ...

    def sparse(self, layer: str, spec: LayerSpec, kept: NDArray[np.bool_]) -> Comparison:
        """Of a layer of which only the weights `kept` [groups, K, N] are not zero, in the cheapest
        sparse form of the target, with all weights in the dense one."""
        ...

    def blocks(self, layer: str, spec: LayerSpec) -> tuple[int, ...]:
        """How many neighbouring outputs share their inputs in the target's sparse kernels for the
        layer, the cheapest for a weight first; empty: the target has no such kernel."""
        ...
