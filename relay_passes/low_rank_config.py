"""What is asked of a layer that is split. The recipe's step `lowrank` has these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import RecipeError
from .numerics.sparsity_pattern import (
    Block,
    KernelShape,
    SemiStructured,
    SparsityPattern,
    Unstructured,
)

_RESIDUAL_ZEROS = 0.95


@dataclass(frozen=True)
class Energy:
    """The smallest rank that holds a share of the squared norm: of the outputs on the calibration
    data, or of the weight."""

    share: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"a share is between 0 and 1, not {self.share}")


@dataclass(frozen=True)
class Operations:
    """The largest rank whose layers together take at most a share of the layer's
    multiply-accumulates."""

    share: float = 0.5

    def __post_init__(self) -> None:
        _require_share(self.share)


@dataclass(frozen=True)
class Bytes:
    """The largest rank whose weights together take at most a share of the layer's."""

    share: float = 0.5

    def __post_init__(self) -> None:
        _require_share(self.share)


@dataclass(frozen=True)
class Latency:
    """The largest rank whose kernels together take at most a share of what the layer's kernel costs
    on the target."""

    share: float = 0.5

    def __post_init__(self) -> None:
        _require_share(self.share)


@dataclass(frozen=True)
class Network:
    """Ranks with which all layers of the step together have a share of their multiply-accumulates
    or weights, and keep as much of the product of their energies as a greedy choice finds."""

    share: float = 0.5
    of: Literal["operations", "bytes"] = "operations"

    def __post_init__(self) -> None:
        _require_share(self.share)


@dataclass(frozen=True)
class Rank:
    """This rank."""

    value: int

    def __post_init__(self) -> None:
        if self.value < 1:
            raise ValueError(f"a rank is from 1 on, not {self.value}")


@dataclass(frozen=True)
class SharedOut(Rank):
    """The rank that a total for the network left for a layer; no recipe says this."""

    of: Literal["operations", "bytes"] = "operations"


def _require_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"a share is between 0 and 1, not {share}")


@dataclass(frozen=True)
class Residual:
    """A sparse weight beside the parts: what they lose most of."""

    sparsity: float | None = field(
        default=None,
        metadata={
            "help": f"share of its weights that are zero, {_RESIDUAL_ZEROS} where left out; "
            "semi_structured and kernel_shape have their own"
        },
    )
    pattern: Unstructured | Block | SemiStructured | KernelShape = field(
        default=Block(16, 1), metadata={"help": "as in sparsify"}
    )

    def __post_init__(self) -> None:
        if self.sparsity is None:
            return
        if isinstance(self.pattern, (SemiStructured, KernelShape)):
            raise ValueError(
                f"sparsity: {self.sparsity} with {self.pattern.words}, which has its own; leave "
                "one of them out"
            )
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is between 0 and 1, not {self.sparsity}")

    def zeros(self, pattern: SparsityPattern) -> float:
        """Share of the weights that are zero; `pattern`: as it is for a layer."""
        if isinstance(pattern, (SemiStructured, KernelShape)):
            return pattern.sparsity
        return _RESIDUAL_ZEROS if self.sparsity is None else self.sparsity


@dataclass(frozen=True)
class LowRankConfig:
    """Split a layer into smaller ones, one behind the other; no layer that would grow is split."""

    form: Literal["channels", "rows_and_columns", "tucker", "canonical"] = field(
        default="channels",
        metadata={
            "help": "channels: fewer output channels, then 1x1 (linear layers: two linear ones); "
            "rows_and_columns: k x 1, then 1 x k; tucker: 1x1, k x k, 1x1; canonical: 1x1, "
            "depthwise k x 1 and 1 x k, 1x1. Layers without the kernel for a form take channels"
        },
    )
    rank: Energy | Operations | Bytes | Latency | Network | Rank = field(
        default=Operations(0.5), metadata={"help": "how many channels lie between the parts"}
    )
    data_aware: bool = field(
        default=True,
        metadata={
            "help": "nearest to the layer's outputs on the calibration data, not to its weight"
        },
    )
    nonlinear: bool = field(
        default=False,
        metadata={
            "help": "layer by layer, on the inputs that the layers split before leave, nearest to "
            "what the original has behind the activation; biases change as well (form channels)"
        },
    )
    residual: Residual | None = field(
        default=None,
        metadata={"help": "a sparse layer added to the parts; what it takes counts for the rank"},
    )
    multiple: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": "ranks are multiples of this (of 1 below it); auto: of the sums that a "
            "register of the target holds, and at least 4"
        },
    )
    insist: bool = field(
        default=False, metadata={"help": "split layers that are slower on the target as well"}
    )

    def __post_init__(self) -> None:
        if self.multiple != "auto" and self.multiple < 1:
            raise RecipeError(f"multiple is from 1 on, not {self.multiple}")
        if self.nonlinear and (self.form != "channels" or not self.data_aware or self.residual):
            raise RecipeError(
                "nonlinear: true is for form: channels with data_aware: true and without a residual"
            )
