"""What is asked of a quantised layer. The recipe's step `quantize` has these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import RecipeError
from .numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from .numerics.ranges import RangeMethod, Sqnr

GROUPABLE = ("int8", "int4")  # weights that may have a scale for each group, with float activations


@dataclass(frozen=True)
class QuantizeConfig:
    """Store a layer's weights, and hand on its activations, as integers.

    Raises `RecipeError` for combinations that no kernel computes.
    """

    weights: Literal["int8", "int7", "int6", "int5", "int4", "codebook4", "normal4"] | None = field(
        default="int8",
        metadata={
            "help": "integer type of the weights; none leaves the layer alone. int5 to int7 take a "
            "byte each and are faster on x86 without VNNI: their products add up in 16 bits. "
            "codebook4 and normal4 are 4-bit indices into tables of 16 values, fitted to the "
            "weights or those of a normal distribution; layers that no kernel reads so (depthwise, "
            "grouped, transposed, kernel rows of an odd number of words, 16-bit inputs) get int8"
        },
    )
    activations: Literal["int8", "uint8", "int16"] | None = field(
        default="int8", metadata={"help": "integer type of the layer's input; none is weight-only"}
    )
    granularity: Granularity = field(
        default=PerChannel(),
        metadata={
            "help": "how many weights share one scale; with int4 in groups, layers with fewer "
            "weights a channel than a group get int8 by channel. With integer activations only "
            "4-bit weights have groups: whole multiples of their channel's scale, so that sums "
            "stay integers; the same layers as with tables get int8"
        },
    )
    zero_points: bool = field(
        default=False,
        metadata={"help": "groups of weight-only layers have a zero point as well as a scale"},
    )
    table_channels: int | None = field(
        default=None,
        metadata={"help": "output channels that share a table, 4 or a multiple; none: all of them"},
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
        self._check_tables()
        if self.zero_points and (self.activations is not None or self.weights not in GROUPABLE):
            raise RecipeError(
                f"zero_points: true with weights: {self.weights}, activations: {self.activations}: "
                "zero points are for int4 or int8 weights with `activations: none`"
            )
        if self.zero_points and (
            isinstance(self.granularity, PerTensor) or self.scales == "power_of_two"
        ):
            raise RecipeError(
                "zero_points: true with one scale for the tensor or powers of two; say "
                "granularity: per_channel or per_group, and leave `scales` out"
            )
        if self.activations is None:
            if self.weights in ("int5", "int6", "int7"):
                raise RecipeError(
                    f"weights: {self.weights} without activations: a float layer gains nothing "
                    "from it; say int8 or int4, or give the activations a type"
                )
            return
        if isinstance(self.granularity, PerGroup):
            self._check_integer_groups(self.granularity)
        if self.activations == "int16" and self.symmetric is False:
            raise RecipeError(
                "activations: int16 with symmetric: false: 16-bit activations have the zero "
                "point 0; leave `symmetric` out"
            )

    def _check_tables(self) -> None:
        if not self.has_tables:
            if self.table_channels is not None:
                raise RecipeError(
                    f"table_channels: {self.table_channels} with weights: {self.weights}: only "
                    "codebook4 and normal4 have tables"
                )
            return
        if self.activations is None:
            raise RecipeError(
                f"weights: {self.weights} without activations: tables hold integers, for sums of "
                "integers; say `activations: int8`, or `weights: int4` for weights alone"
            )
        if self.activations == "int16":
            raise RecipeError(
                f"weights: {self.weights} with activations: int16: kernels that read tables "
                "multiply bytes; say int8 or uint8"
            )
        if isinstance(self.granularity, PerTensor) or self.scales == "power_of_two":
            raise RecipeError(
                f"weights: {self.weights} with one scale for the tensor or powers of two: a table "
                "needs a float scale for each output channel; say per_channel or per_group"
            )
        channels = self.table_channels
        if channels is not None and (channels < 4 or channels % 4):
            raise RecipeError(
                f"table_channels: {channels}: a table serves 4 output channels or a multiple, "
                "which is what a register looks up at once; leave it out for one table a layer"
            )

    def _check_integer_groups(self, granularity: PerGroup) -> None:
        if self.weights not in ("int4", "codebook4", "normal4") or self.scales != "float":
            raise RecipeError(
                f"granularity: per_group with weights: {self.weights}, activations: "
                f"{self.activations}, scales: {self.scales}: in integer sums only 4-bit weights "
                "(int4, codebook4, normal4) with float scales have groups; say per_channel, "
                "per_tensor, or `activations: none`"
            )
        if granularity.size % 8:
            raise RecipeError(
                f"granularity: per_group: {granularity.size} with activations: {self.activations}: "
                "kernels read 4-bit weights eight at a time; the size must be a multiple of 8"
            )
        if self.activations == "int16":
            raise RecipeError(
                "granularity: per_group with activations: int16: kernels that read 4-bit weights "
                "multiply bytes; say int8 or uint8"
            )

    @property
    def has_tables(self) -> bool:
        """Whether the weights are indices."""
        return self.weights in ("codebook4", "normal4")

    @property
    def is_symmetric(self) -> bool:
        """Whether the activations' zero point is fixed by the type rather than by the data."""
        return self.activations == "int16" if self.symmetric is None else self.symmetric

    @property
    def is_weight_only(self) -> bool:
        return self.weights is not None and self.activations is None
