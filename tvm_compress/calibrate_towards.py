"""Calibration of a model of which some layers have changed, with what the others should still do.

A layer that comes after compressed ones gets other inputs x' than in the model as it was. What it
should give is what it gave there for x: He et al. 2017, "Channel Pruning for Accelerating Very Deep
Neural Networks", section 3.2, and Nagel et al. 2020, "Up or Down?", section 3.3. Where its output
is added to a shortcut, it can make up for what the shortcut has lost as well (He 2017, section
3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import TYPE_CHECKING

from .calibrate import Sample, Tensors, require_finite
from .errors import DataError
from .progress import Progress

if TYPE_CHECKING:
    import tvm

    from .kernel_cache import KernelCache
    from .model import Model
    from .relay_passes.numerics.statistics import LayerMoments, Statistics
    from .targets import Target


def calibrate_towards(
    reference: tvm.IRModule,
    model: Model,
    layers: Iterable[str],
    samples: Iterable[Sample],
    *,
    target: Target,
    rows: Mapping[str, int] | None = None,
    progress: Progress | None = None,
    cached: KernelCache | None = None,
) -> Statistics:
    """Moments of the `layers` of `model`, `wanted` included: what they gave in `reference`, which
    is the model before any of it changed and has layers of the same names. `rows`: layer => how
    many patches are sampled.

    Raises `DataError` as `calibrate` does.
    """
    from .relay_passes.numerics.statistics import Statistics

    gathered = _Towards(reference, model, frozenset(layers), rows or {}, target, cached)
    total = len(samples) if isinstance(samples, Sized) else 0
    count = 0
    for index, sample in enumerate((progress or Progress()).track(samples, "calibrate", total)):
        require_finite(sample, index)
        gathered.update(sample)
        count = index + 1
    if count == 0:
        raise DataError("there are no calibration samples; statistics need at least one")
    return Statistics(moments=gathered.result(), samples=count)


class _Towards:
    def __init__(
        self,
        reference: tvm.IRModule,
        model: Model,
        names: frozenset[str],
        rows: Mapping[str, int],
        target: Target,
        cached: KernelCache | None,
    ) -> None:
        from .relay_passes.graph import Graph
        from .relay_passes.ir import shape_of
        from .relay_passes.numerics.moments import MomentsObserver
        from .relay_passes.patches import patch_shape
        from .relay_passes.shortcuts import shortcuts

        graph, before = Graph(model.module["main"]), Graph(reference["main"])
        self._twins = {item.name: item for item in [*before.function.params, *before.values]}
        self._calls = {item: call for item, call in graph.values.items() if item.name in names}
        # A bias that is new since has no twin; the shortcut behind it is left as it is.
        self._shortcuts = {
            layer: [item for item in items if item.name in self._twins]
            for layer, items in shortcuts(graph, self._calls).items()
        }
        self._observers = {}
        for layer, call in self._calls.items():
            patches = patch_shape(call, shape_of(call.args[1]) or ())
            assert patches is not None, f"{layer.name} has no patches"
            count = rows.get(layer.name, 0)
            self._observers[layer] = MomentsObserver(patches, with_second=True, rows=count)
        added = [item for items in self._shortcuts.values() for item in items]
        needed = [*(call.args[0] for call in self._calls.values()), *added]
        self._now = Tensors(model.module, needed, model.inputs, target, cached)
        twins = [self._twins[item.name] for item in [*self._calls, *added]]
        self._before = Tensors(reference, twins, model.inputs, target, cached)

    def update(self, sample: Sample) -> None:
        from .relay_passes.patches import channels_first, outputs_by_patch

        now, before = self._now.run(sample), self._before.run(sample)
        for layer, call in self._calls.items():
            wanted = before[self._twins[layer.name]]
            for item in self._shortcuts[layer]:
                wanted = wanted + (before[self._twins[item.name]] - now[item])
            inputs = channels_first(now[call.args[0]], call)
            self._observers[layer].update(inputs, outputs_by_patch(wanted, call))

    def result(self) -> dict[str, LayerMoments]:
        return {layer.name: observer.result() for layer, observer in self._observers.items()}
