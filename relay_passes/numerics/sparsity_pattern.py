"""Which weights of a matrix [K, N] may become zero together, and which of them do.

K is summed in kernel order (kernel row, kernel column, input channel), N are the outputs. A pattern
cuts the matrix into units that are kept or removed whole; `pool` and `spread` are the two
directions between weights and units.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]


class SparsityPattern(ABC):
    """How zeros lie. Frozen dataclasses, each one a choice of a recipe; `outputs` neighbouring
    outputs share theirs."""

    outputs: int

    @property
    @abstractmethod
    def words(self) -> str:
        """What it is, for reports."""

    def of_layer(self, positions: int, outputs: int) -> SparsityPattern | None:
        """The pattern for a layer whose kernel has that many spatial positions, its groups that
        many outputs; None: it has none, or one output where several are to share theirs."""
        return None if outputs == 1 < self.outputs else self

    @abstractmethod
    def pool(self, scores: Scores) -> Scores:
        """Scores of weights [K, N] => scores of units, each the sum of its weights'."""

    @abstractmethod
    def spread(self, kept: Mask, shape: tuple[int, int]) -> Mask:
        """Units that are kept => weights [K, N] that are kept."""

    def choose(self, scores: Scores, sparsity: float) -> Mask:
        """The weights that are kept, [K, N], when a `sparsity` of the units go: those of the
        smallest scores, the earlier of two alike."""
        units = self.pool(scores)
        return self.spread(keep_largest(units, sparsity), (scores.shape[0], scores.shape[1]))


def keep_largest(units: Scores, sparsity: float) -> Mask:
    """All but the `sparsity` (0 to 1, rounded to whole units) with the smallest scores."""
    removed = round(units.size * sparsity)
    kept = np.ones(units.size, bool)
    kept[np.argsort(units, axis=None, kind="stable")[:removed]] = False
    return kept.reshape(units.shape)


# Inputs that choose together: more of them than a layer has would empty it.
LONGEST_GROUP = 64


@dataclass(frozen=True)
class Block(SparsityPattern):
    """Blocks of `outputs` x `inputs` weights. The last ones may be smaller."""

    outputs: int = 16
    inputs: int = 1

    def __post_init__(self) -> None:
        if min(self.outputs, self.inputs) < 1:
            raise ValueError(f"a block of {self.outputs} x {self.inputs} weights; both from 1 on")

    @property
    def words(self) -> str:
        if self.outputs == self.inputs == 1:
            return "unstructured"
        return f"blocks {self.outputs}x{self.inputs}"

    def pool(self, scores: Scores) -> Scores:
        rows = np.arange(0, scores.shape[0], self.inputs)
        columns = np.arange(0, scores.shape[1], self.outputs)
        by_row = np.add.reduceat(scores, rows, axis=0)  # [K/i, N]
        return np.asarray(np.add.reduceat(by_row, columns, axis=1))  # [K/i, N/o]

    def spread(self, kept: Mask, shape: tuple[int, int]) -> Mask:
        full = kept.repeat(self.inputs, axis=0).repeat(self.outputs, axis=1)
        return full[: shape[0], : shape[1]]


@dataclass(frozen=True)
class Unstructured(Block):
    """Every weight for itself."""

    outputs: int = field(default=1, init=False)
    inputs: int = field(default=1, init=False)


@dataclass(frozen=True)
class SemiStructured(SparsityPattern):
    """`kept` of every `of` consecutive inputs, one choice for `outputs` neighbouring outputs.

    With one output it is what sparse tensor cores read (Mishra et al. 2021, section 3); shared by a
    vector of outputs it is the vector-wise pattern that ordinary vector units read. Its sparsity is
    1 - kept / of.
    """

    kept: int = 2
    of: int = 4
    outputs: int = 1

    @staticmethod
    def suggested(text: str) -> str:
        """How a recipe says `2:4`; empty where `text` is nothing of that kind."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        return f"semi_structured: {{kept: {found[1]}, of: {found[2]}}}" if found else ""

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.of <= LONGEST_GROUP or self.outputs < 1:
            raise ValueError(
                f"{self.kept} of {self.of} inputs for {self.outputs} outputs; "
                f"kept is from 1 to of - 1, of at most {LONGEST_GROUP}, outputs from 1 on"
            )

    @property
    def sparsity(self) -> float:
        """The only one it has."""
        return 1 - self.kept / self.of

    @property
    def words(self) -> str:
        shared = f" by {self.outputs} outputs" if self.outputs > 1 else ""
        return f"{self.kept}:{self.of}{shared}"

    def pool(self, scores: Scores) -> Scores:
        return Block(self.outputs, 1).pool(scores)

    def spread(self, kept: Mask, shape: tuple[int, int]) -> Mask:
        return Block(self.outputs, 1).spread(kept, shape)

    def choose(self, scores: Scores, sparsity: float | None = None) -> Mask:
        """`sparsity` is the pattern's own. A last, shorter window keeps its share, rounded up."""
        units = self.pool(scores)  # [K, N/o]
        kept = np.zeros(units.shape, bool)
        for start in range(0, len(units), self.of):
            window = units[start : start + self.of]
            count = -(-self.kept * len(window) // self.of)
            largest = np.argsort(-window, axis=0, kind="stable")[:count]
            np.put_along_axis(kept[start : start + self.of], largest, True, axis=0)
        return self.spread(kept, (scores.shape[0], scores.shape[1]))


@dataclass(frozen=True)
class KernelShape(SparsityPattern):
    """Every spatial kernel keeps `entries` of its positions, in one of `shapes` shapes.

    Ma et al. 2020, "PCONV", section 4: the shapes are those that most kernels would choose for
    themselves. `outputs` neighbouring kernels share a shape. `positions` is the kernel's area,
    known for a layer (`of_layer`).
    """

    entries: int = 4
    shapes: int = 8
    outputs: int = 1
    positions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if min(self.entries, self.shapes, self.outputs) < 1:
            raise ValueError(
                f"{self.shapes} shapes of {self.entries} entries for {self.outputs} outputs; all "
                "are from 1 on"
            )

    def of_layer(self, positions: int, outputs: int) -> KernelShape | None:
        if self.entries >= positions or super().of_layer(positions, outputs) is None:
            return None
        bound = replace(self)
        object.__setattr__(bound, "positions", positions)
        return bound

    @property
    def sparsity(self) -> float:
        """The only one it has."""
        return 1 - self.entries / self.positions

    @property
    def words(self) -> str:
        return f"{self.shapes} kernel shapes of {self.entries} entries"

    def pool(self, scores: Scores) -> Scores:
        """[K, N] => [positions, I, N/o]."""
        units = Block(self.outputs, 1).pool(scores)
        return units.reshape(self.positions, -1, units.shape[1])

    def spread(self, kept: Mask, shape: tuple[int, int]) -> Mask:
        return Block(self.outputs, 1).spread(kept.reshape(shape[0], -1), shape)

    def choose(self, scores: Scores, sparsity: float | None = None) -> Mask:
        """`sparsity` is the pattern's own."""
        units = self.pool(scores)  # [positions, I, N/o]
        flat = units.reshape(self.positions, -1)
        order = np.argsort(-flat, axis=0, kind="stable")[: self.entries]
        wanted = np.zeros(flat.shape, bool)
        np.put_along_axis(wanted, order, True, axis=0)
        found, counts = np.unique(wanted.T, axis=0, return_counts=True)  # [shapes, positions]
        common = found[np.argsort(-counts, kind="stable")[: self.shapes]]
        best = (common.astype(np.float64) @ flat).argmax(axis=0)
        kept = common[best].T.reshape(units.shape)
        return self.spread(kept, (scores.shape[0], scores.shape[1]))
