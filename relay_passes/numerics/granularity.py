"""How many weights share one scale: a type each, so that only groups have a size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole weight."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for every `size` weights of one output channel; the last group may be ragged."""

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"group size {self.size!r} must be a positive integer")


Granularity = PerTensor | PerChannel | PerGroup
