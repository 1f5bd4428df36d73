"""What is asked of a layer that is split. The recipe's step `lowrank` has these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import RecipeError


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
        if not 0 < self.share < 1:
            raise ValueError(f"a share is between 0 and 1, not {self.share}")


@dataclass(frozen=True)
class Rank:
    """This rank."""

    value: int

    def __post_init__(self) -> None:
        if self.value < 1:
            raise ValueError(f"a rank is from 1 on, not {self.value}")


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
    rank: Energy | Operations | Rank = field(
        default=Operations(0.5), metadata={"help": "how many channels lie between the parts"}
    )
    data_aware: bool = field(
        default=True,
        metadata={
            "help": "nearest to the layer's outputs on the calibration data, not to its weight; "
            "tucker and canonical are nearest to the weight"
        },
    )
    multiple: int = field(
        default=8,
        metadata={"help": "ranks are multiples of this (of 1 below it): a vector's lanes"},
    )

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise RecipeError(f"multiple is from 1 on, not {self.multiple}")

    @property
    def needs_data(self) -> bool:
        """Whether calibration has to sum X·Xᵀ."""
        return self.data_aware and self.form in ("channels", "rows_and_columns")
