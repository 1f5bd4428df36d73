"""What is asked of a quantised layer. The recipe's step `quantize` has these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import RecipeError
from .numerics.granularity import Granularity, PerChannel, PerGroup
from .numerics.ranges import RangeMethod, Sqnr


@dataclass(frozen=True)
class QuantizeConfig:
    """Store a layer's weights, and hand on its activations, as integers.

    Raises `RecipeError` for combinations that no kernel computes.
    """

    weights: Literal["int8", "int7", "int6", "int5", "int4"] | None = field(
        default="int8",
        metadata={
            "help": "integer type of the weights; none leaves the layer alone. int5 to int7 take a "
            "byte each and are faster on x86 without VNNI: their products add up in 16 bits"
        },
    )
    activations: Literal["int8", "uint8", "int16"] | None = field(
        default="int8", metadata={"help": "integer type of the layer's input; none is weight-only"}
    )
    granularity: Granularity = field(
        default=PerChannel(), metadata={"help": "how many weights share one scale"}
    )
    symmetric: bool | None = field(
        default=None,
        metadata={"help": "activation zero point fixed; by default only for int16"},
    )
    scales: Literal["float", "power_of_two"] = field(
        default="float", metadata={"help": "power_of_two is dynamic fixed point"}
    )
    calibrate: RangeMethod = field(
        default=Sqnr(), metadata={"help": "how the activation ranges are chosen"}
    )

    def __post_init__(self) -> None:
        if self.weights is None and self.activations is not None:
            raise RecipeError(
                f"weights: none with activations: {self.activations}: a layer with float weights "
                "computes in float; say `activations: none` as well to leave it alone"
            )
        if self.activations is None:
            if self.weights in ("int5", "int6", "int7"):
                raise RecipeError(
                    f"weights: {self.weights} without activations: a float layer gains nothing "
                    "from it; say int8 or int4, or give the activations a type"
                )
            return
        if isinstance(self.granularity, PerGroup):
            raise RecipeError(
                f"granularity: per_group with activations: {self.activations}: an integer sum has "
                "one scale for each output channel; say per_channel, per_tensor, or "
                "`activations: none`"
            )
        if self.activations == "int16" and self.symmetric is False:
            raise RecipeError(
                "activations: int16 with symmetric: false: 16-bit activations have the zero "
                "point 0; leave `symmetric` out"
            )

    @property
    def is_symmetric(self) -> bool:
        """Whether the activations' zero point is fixed by the type rather than by the data."""
        return self.activations == "int16" if self.symmetric is None else self.symmetric

    @property
    def is_weight_only(self) -> bool:
        return self.weights is not None and self.activations is None
