"""What passes ask about the target: what a layer costs there in one form or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..schedules import Conv2dSpec, MatmulSpec

LayerSpec = Conv2dSpec | MatmulSpec


class LayerCosts(Protocol):
    """Costs of layers on the target that a model is compressed for.

    `layer` is a layer's name in the module, `specs` describe its kernels as they are in that
    module, float32. Costs are of the kernels that ship: in the integers that later steps of the
    recipe give the layer, in the layout and schedule of the target.
    """

    @property
    def unit(self) -> str:
        """ "us" (measured on the target), "instructions" (counted under its emulator) or "cycles"
        (predicted)."""
        ...

    def dense(self, layer: str, specs: Sequence[LayerSpec]) -> float:
        """Of kernels one behind the other that take the place of a layer."""
        ...

    def sparse(self, layer: str, spec: LayerSpec, kept: NDArray[np.bool_]) -> float:
        """Of the best kernel of the target for a layer of which only the weights `kept`
        [groups, K, N] are not zero; at most `dense`: a dense kernel multiplies zeros as well."""
        ...
