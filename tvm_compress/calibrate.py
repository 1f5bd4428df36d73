"""Calibration: run the float model on samples, one at a time, and keep statistics of its tensors.

Memory does not depend on the number of samples: every sample only updates observers of fixed size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING

from .errors import DataError, RecipeError
from .progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import tvm
    from tvm import relax

    from .model import Model
    from .relay_passes.numerics.statistics import Statistics
    from .relay_passes.observations import Observations
    from .targets import Target

Sample = Mapping[str, "np.ndarray"]


def calibrate(
    model: Model,
    samples: Iterable[Sample],
    observations: Observations,
    *,
    target: Target,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of what `observations` names, over all `samples` (input name => array).

    The model is compiled once, with the observed tensors as outputs. The result depends on the
    samples and their order alone. Raises `DataError` when there are no samples or when a sample or
    a tensor holds NaN or infinity, `RecipeError` when a name is not in the model.
    """
    watched = list(_watched(model.module, observations))
    total = len(samples) if isinstance(samples, Sized) else 0
    tracked = (progress or Progress()).track(samples, "calibrate", total)
    count = 0
    for count, tensors in enumerate(_observed_runs(model, tracked, watched, target), start=1):
        for watcher, tensor in zip(watched, tensors, strict=True):
            watcher.update(tensor, count - 1)
    if count == 0:
        raise DataError("there are no calibration samples; statistics need at least one")
    return _collect(watched, count)


class _Watcher:
    """What is gathered from one variable of the graph."""

    def __init__(self, variable: relax.Var, observations: Observations) -> None:
        from .relay_passes.numerics.observers import ChannelObserver, TensorObserver

        self.variable = variable
        name = variable.name
        self.tensor = TensorObserver() if name in observations.tensors else None
        self.channels: ChannelObserver | None = None
        if name in observations.channels:
            self.channels = ChannelObserver(observations.channels[name])
        self.layers: list[_LayerWatcher] = []

    def update(self, array: np.ndarray, sample: int) -> None:
        import numpy as np

        if not np.isfinite(array).all():
            kind = "NaN" if np.isnan(array).any() else "an infinite value"
            raise DataError(
                f"tensor {self.variable.name!r} has {kind} for calibration sample {sample}; "
                "remove the sample or check the model's input scaling"
            )
        if self.tensor is not None:
            self.tensor.update(array)
        if self.channels is not None:
            self.channels.update(array)
        for layer in self.layers:
            layer.update(array)


class _LayerWatcher:
    def __init__(self, name: str, call: relax.Call, with_second: bool) -> None:
        from .relay_passes.ir import shape_of
        from .relay_passes.numerics.moments import MomentsObserver
        from .relay_passes.patches import patch_shape

        shape = patch_shape(call, shape_of(call.args[1]) or ())
        if shape is None:
            raise RecipeError(f"layer {name!r} has no input patches to gather moments of")
        self.name = name
        self._call = call
        self.moments = MomentsObserver(shape, with_second)

    def update(self, array: np.ndarray) -> None:
        from .relay_passes.patches import channels_first

        self.moments.update(channels_first(array, self._call))


def _watched(module: tvm.IRModule, observations: Observations) -> Iterator[_Watcher]:
    """A watcher for each variable that has to be looked at, in execution order."""
    from .relay_passes.graph import Graph

    graph = Graph(module["main"])
    layers_of_input: dict[relax.Var, list[str]] = {}
    variables = {item.name: item for item in [*graph.function.params, *graph.values]}
    wanted = {*observations.tensors, *observations.channels}
    layers = observations.first_moments | observations.second_moments
    for name in sorted(wanted | layers):
        if name not in variables:
            raise RecipeError(f"the model has no tensor {name!r} to calibrate")
    for name in variables:
        if name in layers:
            data = graph.values[variables[name]].args[0]
            layers_of_input.setdefault(data, []).append(name)
    for name, variable in variables.items():
        if name not in wanted and variable not in layers_of_input:
            continue
        watcher = _Watcher(variable, observations)
        for layer in layers_of_input.get(variable, []):
            call = graph.values[variables[layer]]
            with_second = layer in observations.second_moments
            watcher.layers.append(_LayerWatcher(layer, call, with_second))
        yield watcher


def _observed_runs(
    model: Model, samples: Iterable[Sample], watched: list[_Watcher], target: Target
) -> Iterator[list[np.ndarray]]:
    """The arrays of the watched variables for one sample after the other."""
    import numpy as np

    from .build import compile_module
    from .model import TensorSpec
    from .relay_passes.ir import dtype_of, shape_of
    from .runtime import Session

    parameters = list(model.module["main"].params)
    inputs = {
        parameter: spec.name for parameter, spec in zip(parameters, model.inputs, strict=True)
    }
    computed = [item.variable for item in watched if item.variable not in inputs]
    outputs = tuple(
        TensorSpec(item.name, shape_of(item) or (), dtype_of(item)) for item in computed
    )
    session = None
    if computed:
        session = Session(
            compile_module(_instrument(model.module, computed), target), model.inputs, outputs
        )
    for index, sample in enumerate(samples):
        for name, array in sample.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                kind = "NaN" if np.isnan(array).any() else "an infinite value"
                raise DataError(f"input {name!r} has {kind} in calibration sample {index}")
        arrays = {} if session is None else session.run(sample)
        yield [
            sample[inputs[item.variable]] if item.variable in inputs else arrays[item.variable.name]
            for item in watched
        ]


def _instrument(module: tvm.IRModule, wanted: list[relax.Var]) -> tvm.IRModule:
    """The module with `main` returning the `wanted` variables instead of its own result."""
    from tvm import relax

    from .relay_passes.graph import Graph, rebuild

    graph = Graph(module["main"])
    # What a dataflow block hands out must be a plain variable: give the wanted ones a second name.
    handed_out = {
        item: relax.Var(f"{item.name}_observed", item.ty)
        for item in wanted
        if isinstance(item, relax.DataflowVar)
    }
    function = rebuild(
        graph.function,
        after={item: [relax.VarBinding(out, item)] for item, out in handed_out.items()},
        result=[handed_out.get(item, item) for item in wanted],
    )
    module = module.clone()
    module["main"] = relax.analysis.remove_all_unused(function)
    return relax.transform.Normalize()(module)


def _collect(watched: list[_Watcher], samples: int) -> Statistics:
    from .relay_passes.numerics.statistics import Statistics

    return Statistics(
        {item.variable.name: item.tensor.result() for item in watched if item.tensor is not None},
        {
            item.variable.name: item.channels.result()
            for item in watched
            if item.channels is not None
        },
        {layer.name: layer.moments.result() for item in watched for layer in item.layers},
        samples,
    )
