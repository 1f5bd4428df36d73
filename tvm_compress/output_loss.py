"""How far the outputs of a changed model are from those that it had, on some samples."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .calibrate import Sample, Tensors
from .relay_passes.graph import Graph

if TYPE_CHECKING:
    import tvm
    from numpy.typing import NDArray
    from tvm import relax

    from .kernel_cache import KernelCache
    from .model import Model
    from .targets import Target


class OutputLoss:
    """The mean squared difference of the float outputs, each relative to its variance.

    Nothing is computed before a module is asked about.
    """

    def __init__(
        self,
        model: Model,
        samples: Iterable[Sample],
        *,
        target: Target,
        cached: KernelCache | None = None,
    ) -> None:
        self._model, self._target, self._cached = model, target, cached
        self._given = samples

    def __call__(self, module: tvm.IRModule) -> float:
        """Of `module`, which has the inputs and outputs of the model."""
        found = self._run(module)
        losses = []
        for output, expected in zip(found, self._expected, strict=True):
            spread = float(expected.var())
            difference = float(np.mean((output - expected) ** 2))
            losses.append(difference / spread if spread > 0 else difference)
        return float(np.mean(losses)) if losses else 0.0

    @cached_property
    def _samples(self) -> list[Sample]:
        return [dict(sample) for sample in self._given]

    @cached_property
    def _expected(self) -> list[NDArray[np.float64]]:
        return self._run(self._model.module)

    def _run(self, module: tvm.IRModule) -> list[NDArray[np.float64]]:
        """The float outputs, [samples, ...] each."""
        outputs = _outputs(module)
        tensors = Tensors(module, outputs, self._model.inputs, self._target, self._cached)
        runs = [tensors.run(sample) for sample in self._samples]
        arrays = [np.stack([run[output] for run in runs]) for output in outputs]
        return [array.astype(np.float64) for array in arrays if array.dtype.kind == "f"]


def _outputs(module: tvm.IRModule) -> list[relax.Var]:
    from tvm import relax

    function = module["main"]
    result = function.body.body
    graph = Graph(function)
    if isinstance(result, relax.Var) and isinstance(graph.values.get(result), relax.Tuple):
        result = graph.values[result]
    found = result.fields if isinstance(result, relax.Tuple) else [result]
    return [item for item in found if isinstance(item, relax.Var)]
