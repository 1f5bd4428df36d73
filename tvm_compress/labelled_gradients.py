"""What a labelled loss makes of tensors' channels, sample by sample: cross-entropy of the output
that the labels are of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .errors import DataError

if TYPE_CHECKING:
    from .data import Run
    from .kernel_cache import KernelCache
    from .model import Model
    from .relay_passes.numerics.statistics import ChannelGradients
    from .targets import Target


class LabelledGradients:
    """Sums over samples of activations and dL/d activations by channel; memory is that of one run.

    `axes`: tensor => channel axis. Raises `DataError` when `samples` are not a data set with
    labels or no output has their classes, `RecipeError` naming an operator without a gradient.
    """

    def __init__(
        self,
        model: Model,
        samples: Iterable[object],
        axes: Mapping[str, int],
        target: Target,
        cached: KernelCache | None,
    ) -> None:
        from .accuracy import scores_output
        from .build import compile_module
        from .data import Dataset
        from .model import TensorSpec
        from .relay_passes.gradients import with_gradients
        from .relay_passes.ir import dtype_of, shape_of
        from .relay_passes.numerics.gradient_saliency import GradientObserver
        from .runtime import Session

        if not isinstance(samples, Dataset) or not samples.has_labels:
            source = f"{samples.source}: " if isinstance(samples, Dataset) else ""
            raise DataError(
                f"{source}the criterion looks at the loss, and the calibration data have no "
                "labels: add class numbers as `labels` to the .npz, or sort images into a folder a "
                "class"
            )
        self._scores = scores_output(model.outputs, samples)
        self._source = samples.source
        self._observers = {
            name: GradientObserver(axis, samples.batch) for name, axis in axes.items()
        }
        module = with_gradients(model.module, list(axes), model.outputs.index(self._scores))
        param, results = module["main"].params[-1], module["main"].ret_ty.fields
        one_hot = TensorSpec("one_hot", shape_of(param) or (), dtype_of(param))
        outputs = tuple(
            TensorSpec(f"{index}", tuple(int(size) for size in item.shape.values), str(item.dtype))
            for index, item in enumerate(results)
        )
        executable = compile_module(module, target, cached)
        self._session = Session(executable, (*model.inputs, one_hot), outputs)

    def update(self, run: Run) -> None:
        """Take in one run; those of its samples that only fill it up do not count."""
        import numpy as np

        from .accuracy import check_labels

        assert run.labels is not None
        check_labels(int(run.labels.min()), int(run.labels.max()), self._scores, self._source)
        batch, classes = self._scores.shape[0], math.prod(self._scores.shape[1:])
        one_hot = np.zeros((batch, classes), np.float32)
        one_hot[np.arange(run.count), run.labels] = 1.0
        arrays = list(self._session.run({**run.feed, "one_hot": one_hot}).values())
        half = len(self._observers)
        for observer, activation, gradient in zip(
            self._observers.values(), arrays[:half], arrays[half:], strict=True
        ):
            observer.update(activation, gradient, run.count)

    def result(self) -> dict[str, ChannelGradients]:
        """By tensor."""
        return {name: observer.result() for name, observer in self._observers.items()}
