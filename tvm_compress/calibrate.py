"""Calibration: run the float model on samples, one at a time, and keep statistics of its tensors.

Memory does not depend on the number of samples: every sample only updates observers of fixed size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import DataError, RecipeError
from .progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import tvm
    from tvm import relax

    from .data import Run
    from .kernel_cache import KernelCache
    from .labelled_gradients import LabelledGradients
    from .model import Model, TensorSpec
    from .relay_passes.graph import Graph
    from .relay_passes.numerics.statistics import ChannelGradients, Statistics
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
    cached: KernelCache | None = None,
) -> Statistics:
    """Statistics of what `observations` names, over all `samples` (input name => array).

    The model is compiled once, with the observed tensors as outputs; kernels that are in `cached`
    are taken from there. The result depends on the samples and their order alone. Raises
    `DataError` when there are no samples, when a sample or a tensor holds NaN or infinity, or when
    gradients are asked for without labels, `RecipeError` when a name is not in the model.
    """
    main = model.module.get_global_var("main")
    observed = _Observed(model.module, main, model.inputs, observations, target, cached)
    found = {watcher.variable.name for watcher in observed.all_watchers()}
    layers = {layer.name for watcher in observed.all_watchers() for layer in watcher.layers}
    for name in sorted(observations.names() - found - layers - set(observations.gradients)):
        raise RecipeError(f"the model has no tensor {name!r} to calibrate")
    labelled: LabelledGradients | None = None
    if observations.gradients:
        from .labelled_gradients import LabelledGradients

        labelled = LabelledGradients(model, samples, observations.gradients, target, cached)
    total = len(samples) if isinstance(samples, Sized) else 0
    tracked = (progress or Progress()).track(_runs(samples), "calibrate", total)
    count = 0
    for index, run in enumerate(tracked):
        require_finite(run.feed, index)
        observed.run([run.feed[spec.name] for spec in model.inputs], index)
        if labelled is not None:
            labelled.update(run)
        count = index + 1
    if count == 0:
        raise DataError("there are no calibration samples; statistics need at least one")
    gradients = {} if labelled is None else labelled.result()
    return _collect(observed.all_watchers(), count, gradients)


def _runs(samples: Iterable[Sample]) -> Iterator[Run]:
    """With labels where there are any."""
    from .data import Dataset, Run

    if isinstance(samples, Dataset):
        yield from samples.runs()
    else:
        yield from (Run(dict(sample), 1, None) for sample in samples)


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
        self.updates = 0

    def update(self, array: np.ndarray, sample: int) -> None:
        import numpy as np

        if not np.isfinite(array).all():
            kind = "NaN" if np.isnan(array).any() else "an infinite value"
            raise DataError(
                f"tensor {self.variable.name!r} has {kind} for calibration sample {sample}; "
                "remove the sample or check the model's input scaling"
            )
        self.updates += 1
        if self.tensor is not None:
            self.tensor.update(array)
        if self.channels is not None:
            self.channels.update(array)
        for layer in self.layers:
            layer.update(array)


class _LayerWatcher:
    def __init__(self, name: str, call: relax.Call, with_second: bool, rows: int) -> None:
        from .relay_passes.ir import shape_of
        from .relay_passes.numerics.moments import MomentsObserver
        from .relay_passes.patches import patch_shape

        shape = patch_shape(call, shape_of(call.args[1]) or ())
        if shape is None:
            raise RecipeError(f"layer {name!r} has no input patches to gather moments of")
        self.name = name
        self._call = call
        self.moments = MomentsObserver(shape, with_second, rows)

    def update(self, array: np.ndarray) -> None:
        from .relay_passes.patches import channels_first

        self.moments.update(channels_first(array, self._call))


class Tensors:
    """What some variables of `main` are for an input: compiled to return them."""

    def __init__(
        self,
        module: tvm.IRModule,
        variables: Iterable[relax.Var],
        inputs: Sequence[TensorSpec],
        target: Target,
        cached: KernelCache | None,
    ) -> None:
        from .model import TensorSpec
        from .relay_passes.ir import dtype_of, shape_of

        self._params = dict(zip(module["main"].params, inputs, strict=True))
        computed = list(dict.fromkeys(item for item in variables if item not in self._params))
        self._computed = {variable: f"{i}" for i, variable in enumerate(computed)}
        self._session = None
        if computed:
            from .build import compile_module
            from .runtime import Session

            outputs = tuple(
                TensorSpec(name, shape_of(variable) or (), dtype_of(variable))
                for variable, name in self._computed.items()
            )
            executable = compile_module(_instrument(module, computed), target, cached)
            self._session = Session(executable, tuple(inputs), outputs)

    def run(self, feed: Sample) -> dict[relax.Var, np.ndarray]:
        """One inference: the values of the variables, and of all inputs."""
        arrays = {} if self._session is None else self._session.run(feed)
        values = {variable: arrays[name] for variable, name in self._computed.items()}
        return values | {param: feed[spec.name] for param, spec in self._params.items()}


class _Observed:
    """A function of the module, compiled to return what is watched in it, and its branches.

    A branch of an `If` is a program of its own: it runs for the samples that take it, on the values
    that it has then.
    """

    def __init__(
        self,
        module: tvm.IRModule,
        global_var: tvm.ir.GlobalVar,
        inputs: Sequence[TensorSpec],
        observations: Observations,
        target: Target,
        cached: KernelCache | None,
    ) -> None:
        from .relay_passes.branches import as_main
        from .relay_passes.graph import Graph

        graph = Graph(module[global_var])
        self._inputs = inputs
        self.watchers = list(_watched(graph, observations))
        self._branches = [
            branch
            for value in graph.values.values()
            for branch in _branches_of(module, value, observations, target, cached)
        ]
        needed = [watcher.variable for watcher in self.watchers]
        needed += [variable for branch in self._branches for variable in branch.reads()]
        self._tensors = Tensors(as_main(module, global_var), needed, inputs, target, cached)

    def all_watchers(self) -> list[_Watcher]:
        """Those of the function and of its branches."""
        inner = [w for branch in self._branches for w in branch.program.all_watchers()]
        return self.watchers + inner

    def run(self, arguments: Sequence[np.ndarray], sample: int) -> None:
        """One inference; every watcher of what ran is updated."""
        feed = {spec.name: array for spec, array in zip(self._inputs, arguments, strict=True)}
        values = self._tensors.run(feed)
        for watcher in self.watchers:
            watcher.update(values[watcher.variable], sample)
        for branch in self._branches:
            if bool(values[branch.condition]) == branch.is_then:
                branch.program.run([values[item] for item in branch.arguments], sample)


@dataclass(frozen=True)
class _Branch:
    """One branch of an `If`: when it runs, and on what."""

    condition: relax.Var
    is_then: bool
    arguments: tuple[relax.Var, ...]
    program: _Observed

    def reads(self) -> tuple[relax.Var, ...]:
        return (self.condition, *self.arguments)


def _branches_of(
    module: tvm.IRModule,
    value: tvm.ir.Expr,
    observations: Observations,
    target: Target,
    cached: KernelCache | None,
) -> Iterator[_Branch]:
    """The branches of an `If` in which anything is watched, of those that take tensors."""
    from tvm import relax

    from .model import TensorSpec
    from .relay_passes.branches import branch_call
    from .relay_passes.ir import dtype_of, shape_of

    if not isinstance(value, relax.If):
        return
    for is_then, body in ((True, value.true_branch), (False, value.false_branch)):
        call = branch_call(module, body)
        if call is None or any(shape_of(argument) is None for argument in call.args):
            continue
        specs = tuple(
            TensorSpec(param.name, shape_of(param) or (), dtype_of(param))
            for param in module[call.op].params
        )
        program = _Observed(module, call.op, specs, observations, target, cached)
        if program.all_watchers():
            yield _Branch(value.cond, is_then, tuple(call.args), program)


def _watched(graph: Graph, observations: Observations) -> Iterator[_Watcher]:
    """A watcher for each variable that has to be looked at, in execution order."""
    layers_of_input: dict[relax.Var, list[str]] = {}
    variables = {item.name: item for item in [*graph.function.params, *graph.values]}
    wanted = {*observations.tensors, *observations.channels}
    layers = observations.first_moments | observations.second_moments
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
            rows = observations.patches.get(layer, 0)
            watcher.layers.append(_LayerWatcher(layer, call, with_second, rows))
        yield watcher


def require_finite(sample: Sample, index: int) -> None:
    import numpy as np

    for name, array in sample.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            kind = "NaN" if np.isnan(array).any() else "an infinite value"
            raise DataError(f"input {name!r} has {kind} in calibration sample {index}")


def _instrument(module: tvm.IRModule, wanted: list[relax.Var]) -> tvm.IRModule:
    """The module with `main` returning the `wanted` variables instead of its own result."""
    from tvm import relax

    from .relay_passes.graph import Graph, rebuild
    from .relay_passes.sparse_choices import all_dense

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
    module["main"] = all_dense(relax.analysis.remove_all_unused(function))
    return relax.transform.Normalize()(module)


def _collect(
    watched: list[_Watcher], samples: int, gradients: Mapping[str, ChannelGradients]
) -> Statistics:
    """What was gathered; nothing of branches that no sample took."""
    from .relay_passes.numerics.statistics import Statistics

    seen = [watcher for watcher in watched if watcher.updates]
    return Statistics(
        {item.variable.name: item.tensor.result() for item in seen if item.tensor is not None},
        {item.variable.name: item.channels.result() for item in seen if item.channels is not None},
        {layer.name: layer.moments.result() for item in seen for layer in item.layers},
        samples,
        gradients,
    )
