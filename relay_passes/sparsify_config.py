"""What is asked of a sparse layer. The recipe's step `sparsify` has these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import RecipeError
from .numerics.sparsity_pattern import Block, KernelShape, SemiStructured, Unstructured

# Fits the vectors of most CPUs: where no target says more.
BLOCKS = Block(16, 1)
CRITERIA_WITHOUT_DATA = ("magnitude",)


@dataclass(frozen=True)
class SparsifyConfig:
    """Set weights to zero; shapes stay, and kernels that skip zeros are used where they pay."""

    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "share of the weights that become zero, 0 to 1; semi_structured and "
            "kernel_shape have their own"
        },
    )
    pattern: Unstructured | Block | SemiStructured | KernelShape | None = field(
        default=None,
        metadata={
            "help": "which weights go together; left out: blocks of as many outputs as the "
            "target's kernels for the layer like best; layers with one output a group (depthwise) "
            "are left alone by patterns of several outputs. Vector-wise: block with inputs: 1, or "
            "semi_structured with outputs: 16"
        },
    )
    criterion: Literal[
        "magnitude", "diagonal_hessian", "activation_aware", "output_correlation", "second_order"
    ] = field(
        default="second_order",
        metadata={
            "help": "what a weight is worth; magnitude with reconstruct: false needs no data"
        },
    )
    scope: Literal["layer", "network", "sensitivity"] = field(
        default="layer",
        metadata={
            "help": "layer: each has the sparsity; network: all selected layers together, by what "
            "a weight is worth relative to its layer's mean; sensitivity: all together, where it "
            "changes the network's outputs least (measured layer by layer on calibration data)"
        },
    )
    total: Literal["weights", "operations"] = field(
        default="weights",
        metadata={"help": "what the sparsity of several layers together is a share of"},
    )
    reconstruct: bool = field(
        default=True,
        metadata={
            "help": "weights that are kept, and biases, make up for those that go and for what "
            "layers before have lost (least squares on the calibration data); always so with "
            "second_order"
        },
    )
    insist: bool = field(
        default=False,
        metadata={"help": "keep the zeros in layers that gain nothing by them on the target"},
    )

    def __post_init__(self) -> None:
        pattern = self.pattern or BLOCKS
        has_own = isinstance(pattern, (SemiStructured, KernelShape))
        if has_own and self.sparsity is not None:
            raise RecipeError(
                f"sparsity: {self.sparsity} with {pattern.words}, which has its own; leave "
                "one of them out"
            )
        if not has_own and self.sparsity is None:
            raise RecipeError(f"sparsity: is missing; with {pattern.words} say 0.8, for example")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise RecipeError(f"sparsity is between 0 and 1, not {self.sparsity}")
        if self.scope != "layer" and has_own:
            raise RecipeError(
                f"scope: {self.scope} with {pattern.words}, which has its own sparsity; it "
                "needs blocks or unstructured"
            )
        if self.scope == "layer" and self.total != "weights":
            raise RecipeError(
                f"total: {self.total} with scope: layer, which has no total; it needs scope: "
                "sensitivity or network"
            )
        if self.scope == "network" and self.criterion == "second_order":
            raise RecipeError(
                "scope: network with criterion: second_order: one threshold for all layers needs "
                "another criterion; scope: sensitivity goes with it"
            )

    @property
    def reconstructs(self) -> bool:
        """Whether the weights that are left are solved for."""
        return self.reconstruct or self.criterion == "second_order"

    @property
    def needs_data(self) -> bool:
        """Whether calibration has to sum X·Xᵀ."""
        return self.reconstruct or self.criterion not in CRITERIA_WITHOUT_DATA
