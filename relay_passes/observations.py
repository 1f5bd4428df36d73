"""What a pass wants calibration to gather."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Observations:
    """Tensors and layers by name.

    `tensors`: ranges and histograms. `channels`: tensor => channel axis, for extremes and means by
    channel as well. `gradients`: tensor => channel axis, for what a labelled loss makes of each
    channel (`statistics.ChannelGradients`); the samples need labels. `first_moments` and
    `second_moments`: layers whose input patches are averaged, and whose X·Xᵀ is summed. `patches`:
    layer of `second_moments` => how many of its patches are sampled.
    """

    tensors: frozenset[str] = frozenset()
    channels: Mapping[str, int] = field(default_factory=dict)
    first_moments: frozenset[str] = frozenset()
    second_moments: frozenset[str] = frozenset()
    gradients: Mapping[str, int] = field(default_factory=dict)
    patches: Mapping[str, int] = field(default_factory=dict)

    def __or__(self, other: Observations) -> Observations:
        """Everything that either asks for."""
        return Observations(
            self.tensors | other.tensors,
            {**self.channels, **other.channels},
            self.first_moments | other.first_moments,
            self.second_moments | other.second_moments,
            {**self.gradients, **other.gradients},
            {**self.patches, **other.patches},
        )

    def __bool__(self) -> bool:
        return bool(self.names())

    def names(self) -> frozenset[str]:
        """Every tensor and layer that is named."""
        layers = self.first_moments | self.second_moments
        return self.tensors | frozenset(self.channels) | frozenset(self.gradients) | layers
