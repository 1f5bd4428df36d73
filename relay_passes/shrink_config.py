"""What is asked of layers that lose channels. The recipe's step `shrink` has these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import RecipeError

DEFAULT_MULTIPLE = 8
# Channels that integer kernels load together on cores without vectors.
WORD = 4

# Scores that are compared from group to group by how they stand to their group's.
RANKED = ("l1", "l2", "batch_norm", "taylor")
# Those that look at nothing but the model.
WITHOUT_DATA = ("l1", "l2", "merging")


@dataclass(frozen=True)
class Operations:
    """As many channels as take a share of the selected layers' multiply-accumulates."""

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"a share is between 0 and 1, not {self.share}")


@dataclass(frozen=True)
class ChannelShare:
    """A share of the channels of each group."""

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"a share is between 0 and 1, not {self.share}")


@dataclass(frozen=True)
class ShrinkConfig:
    """Remove whole channels; what is left is an ordinary, smaller network."""

    keep: Operations | ChannelShare = field(
        default=Operations(0.5), metadata={"help": "how much of the selected layers stays"}
    )
    criterion: Literal[
        "l1",
        "l2",
        "batch_norm",
        "merging",
        "lasso",
        "thinet",
        "surgeon",
        "taylor",
        "discrimination",
    ] = field(
        default="surgeon",
        metadata={
            "help": "what a channel is worth. l1, l2: the weights that compute it; merging: "
            "whether another channel can stand for it; batch_norm: the spread of its values, which "
            "is the batch-norm's factor; lasso, thinet, surgeon: what the layers that read it "
            "lose; discrimination: the same by what a labelled loss makes of it; taylor: what that "
            "loss changes by. All but the first three need calibration data, the last two labels"
        },
    )
    scope: Literal["auto", "sensitivity", "group", "network"] = field(
        default="auto",
        metadata={
            "help": "sensitivity: what the network's outputs lose by channels of each group is "
            "measured, and the total spent where that is least; group: all groups of channels keep "
            "the same share; network: channels of all groups are ranked together, by their worth "
            "relative to their group's, or by what their readers lose (surgeon); auto: sensitivity "
            "where the step looks at calibration data, else group"
        },
    )
    reconstruct: bool = field(
        default=True,
        metadata={
            "help": "layers that read fewer channels get the weights and biases that come nearest "
            "to what they computed, by least squares on the calibration data"
        },
    )
    multiple: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": "channels that stay are a multiple of this, groups with no more stay whole; "
            "auto: of the sums that a register of the target holds, since a kernel takes as long "
            "for a part of a register as for all of it, or of half, a quarter .. where the "
            "operations asked for need it"
        },
    )
    insist: bool = field(
        default=False,
        metadata={"help": "channels leave also where the target gets neither faster nor smaller"},
    )

    def __post_init__(self) -> None:
        if self.multiple != "auto" and self.multiple < 1:
            raise RecipeError(f"multiple is from 1 on, not {self.multiple}")
        ranked = (*RANKED, "surgeon")
        if self.scope == "network" and self.criterion not in ranked:
            raise RecipeError(
                f"scope: network with criterion: {self.criterion}: channels are ranked across "
                f"groups by {', '.join(ranked)}"
            )

    def multiples_for(self, lanes: int | None) -> list[int]:
        """To be tried in turn, on a target with so many sums to a register; `None`: on most."""
        if self.multiple != "auto":
            return [self.multiple]
        largest = max(WORD, DEFAULT_MULTIPLE if lanes is None else lanes)
        return [largest >> shift for shift in range(largest.bit_length())]

    @property
    def is_by_loss(self) -> bool:
        """Whether what the network's outputs lose says how many channels of a group stay."""
        return self.scope == "sensitivity" or (self.scope == "auto" and self._looks_at_consumers)

    @property
    def reads_consumers(self) -> bool:
        """Whether calibration has to sum X·Xᵀ of the layers that read the channels."""
        return self.is_by_loss or self._looks_at_consumers

    @property
    def _looks_at_consumers(self) -> bool:
        return self.reconstruct or self.criterion not in (*WITHOUT_DATA, *RANKED)
