"""What a target's kernels are to the dispatcher: a function being written, and who writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from tvm import tirx

    from ..targets import Target
    from .choice import Choice, SearchSpace
    from .fused import FusedFunction


class WrittenKernel(Protocol):
    """One fused function in one form."""

    def build(self) -> tirx.PrimFunc:
        """The whole function, scheduled."""

    def space(self) -> SearchSpace | None:
        """What the form leaves open, its default first; None: nothing."""


class Template(NamedTuple):
    """One way to schedule functions around an anchor. `kernel_of(fused, target, choice)` answers
    None for functions it cannot take; without a choice the kernel decides by itself."""

    name: str
    kernel_of: Callable[[FusedFunction, Target, Choice | None], WrittenKernel | None]
