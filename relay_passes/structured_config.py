"""What is asked of a linear layer of few numbers. The recipe's step `structured` has these."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Circulant:
    """Blocks of which each row is the one before, moved by one: a number for each `block` weights,
    multiplied in the frequency domain."""

    block: int = 8

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ValueError(f"a block is from 2 on, not {self.block}")


@dataclass(frozen=True)
class Hadamard:
    """Three diagonals between two Hadamard transforms and a permutation: numbers in proportion to
    inputs plus outputs. Of little use without training."""

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"a seed is from 0 on, not {self.seed}")


@dataclass(frozen=True)
class StructuredConfig:
    """Give linear layers a weight of few numbers, multiplied by fast transforms; no layer that
    would take longer is changed."""

    form: Circulant | Hadamard = field(
        default=Circulant(),
        metadata={
            "help": "circulant: {block: 8}: the largest block up to this that divides inputs and "
            "outputs; hadamard: diagonals between Hadamard transforms (Fastfood)"
        },
    )
    data_aware: bool = field(
        default=True,
        metadata={
            "help": "nearest to the layer's outputs on the calibration data, not to its weight"
        },
    )
    insist: bool = field(
        default=False, metadata={"help": "also where the target is not faster for it"}
    )
