"""conv(x, w) => conv(x[kept], w'[kept, kept]): channels leave, and w' makes up for them

Channels that only leave together come from `channel_groups.py`, what they are worth from
`numerics/` (each criterion names its paper there). Layers that read fewer channels are solved for
the outputs that they had, with the mean of what is missing in their biases (He et al. 2017,
"Channel Pruning for Accelerating Very Deep Neural Networks", section 3.1). Then the channels are
cut out of every tensor: `remove_channels.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from .channel_groups import ChannelGroup, Channels, LayerChannels, find_channels
from .numerics.channel_budget import OperationCounts, counts_within, snap
from .numerics.channel_consumer import Consumer, bias_change, centred, reconstruct_kept
from .numerics.channel_norms import (
    filter_norms,
    folded_batch_norm_scale,
    keep_best,
    relative,
)
from .numerics.lasso_selection import select_by_lasso
from .numerics.neuron_merging import Merging, merge_similar
from .numerics.statistics import Statistics
from .numerics.surgeon_selection import select_by_surgeon
from .numerics.thinet_selection import select_greedily
from .observations import Observations
from .patches import weight_of_matrix
from .quantize_weights import weight_layout
from .remove_channels import Keep, bias_at, masked, shrunk
from .select import describe_layer
from .shrink_config import RANKED, ChannelShare, ShrinkConfig
from .weight_layers import WeightLayer, weight_layers

SHRUNK_ATTR = "tvm_compress.shrunk"

# Of a group's channels that stay whatever the ranking across groups says: a layer that nearly
# vanishes cuts the network in two, which no score of single channels tells.
_LEAST_SHARE = 0.125

Array = NDArray[np.float64]


@tvm.transform.module_pass(opt_level=0, name="Shrink")
class Shrink:
    """Remove channels that the layers in `schemes` compute.

    A group of channels loses some when all layers that compute it are in `schemes`; it takes the
    config of the first of them. The model's inputs and outputs stay, and so do channels of
    operators that `channel_groups.py` has no rule for. `statistics` holds what `observe` lists,
    gathered on this very module; `DataError` when it does not. What each layer lost is in the
    attribute `tvm_compress.shrunk` of `main` (JSON: layer => words).
    """

    def __init__(self, schemes: Mapping[str, ShrinkConfig], statistics: Statistics) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        zeros, channels, keep = mask(module, self.schemes, self.statistics)
        main = shrunk(channels, keep)
        notes = {**read_shrunk(module), **_notes(channels, keep)}
        result = zeros.clone()
        result["main"] = main.with_attr(SHRUNK_ATTR, json.dumps(notes))
        return relax.transform.Normalize()(result)


def mask(
    module: tvm.IRModule, schemes: Mapping[str, ShrinkConfig], statistics: Statistics
) -> tuple[tvm.IRModule, Channels, Keep]:
    """The module with zeros for what `Shrink` removes, which computes what the shrunk one does; the
    labels of its tensors; and which labels stay."""
    problem = _Problem.of(module, schemes, statistics)
    keep = np.ones(len(problem.channels.atoms), bool)
    merged: dict[LayerChannels, NDArray] = {}
    for config in dict.fromkeys(config for _, config in problem.groups):
        groups = [group for group, own in problem.groups if own == config]
        counts = _counts(problem, config, groups, keep)
        for group, count in zip(groups, counts.tolist(), strict=True):
            if count < len(group.labels):
                _choose(problem, config, group, count, keep, merged)
    weights, shifts = _compensated(problem, keep, merged)
    function, channels = masked(problem.channels, keep, weights, shifts)
    result = module.clone()
    result["main"] = function
    return relax.transform.Normalize()(result), channels, keep


def observe(module: tvm.IRModule, schemes: Mapping[str, ShrinkConfig]) -> Observations | None:
    """X·Xᵀ of the layers that read channels which may leave; of those that compute them where that
    is what the criterion looks at."""
    problem = _Problem.of(module, schemes, Statistics())
    wanted = set()
    for group, config in problem.groups:
        if config.needs_data and (config.reconstruct or config.criterion != "batch_norm"):
            wanted |= set(group.consumers)
        if config.criterion == "batch_norm":
            wanted |= set(group.producers)
    names = [v.name for x in wanted if x.name in problem.matrices for v in x.calls]
    return Observations(second_moments=frozenset(names)) if names else None


def read_shrunk(module: tvm.IRModule) -> dict[str, str]:
    """Layer => what it lost in words, of all steps `shrink` so far."""
    attributes = module["main"].attrs or {}
    if SHRUNK_ATTR not in attributes:
        return {}
    return {str(k): str(v) for k, v in json.loads(str(attributes[SHRUNK_ATTR])).items()}


@dataclass(eq=False)
class _Problem:
    """A function's channels, and the groups that may lose some with their config."""

    channels: Channels
    groups: list[tuple[ChannelGroup, ShrinkConfig]]
    schemes: Mapping[str, ShrinkConfig]
    statistics: Statistics
    matrices: dict[str, WeightLayer[None]]
    """By the name of each call, of layers that have patches."""
    configs: dict[LayerChannels, ShrinkConfig] = field(default_factory=dict)
    """Of layers that are read differently."""

    @staticmethod
    def of(
        module: tvm.IRModule, schemes: Mapping[str, ShrinkConfig], statistics: Statistics
    ) -> _Problem:
        channels = find_channels(module["main"])
        groups = []
        for group in channels.groups():
            makers = [layer for layer in group.producers if not layer.is_depthwise]
            if all(call.name in schemes for layer in makers for call in layer.calls):
                groups.append((group, schemes[makers[0].name]))
        names = {call.name: None for layer in channels.layers for call in layer.calls}
        found = weight_layers(channels.graph, names)
        matrices = {item.name: layer for layer in found for item in layer.variables}
        problem = _Problem(channels, groups, schemes, statistics, matrices)
        for group, config in groups:
            for layer in group.consumers:
                problem.configs.setdefault(layer, config)
        return problem

    def moments(self, layer: LayerChannels) -> tuple[Array, Array, int]:
        return self.matrices[layer.name].moments(self.statistics)

    def consumers(self, group: ChannelGroup) -> list[Consumer]:
        """Readers of the group's channels, a grouped convolution as several."""
        found = []
        for layer in group.consumers:
            if layer.name not in self.matrices:
                continue
            second, mean, count = self.moments(layer)
            place = np.searchsorted(group.labels, layer.inputs)
            place = np.minimum(place, len(group.labels) - 1)
            owner = np.where(group.labels[place] == layer.inputs, place, -1)
            for index, matrix in enumerate(self.matrices[layer.name].matrices()):
                moments = centred(second[index], mean[index], count)
                owners = np.tile(owner, len(matrix) // len(owner))
                found.append(Consumer(matrix, moments, len(group.labels), owners))
        return found


# --- how many --------------------------------------------------------------------------------


def _counts(
    problem: _Problem, config: ShrinkConfig, groups: Sequence[ChannelGroup], keep: Keep
) -> NDArray[np.int64]:
    """Labels of each group that stay."""
    sizes = np.array([len(group.labels) for group in groups])
    multiples = np.array([config.multiple // math.gcd(config.multiple, g.unit) for g in groups])
    wanted_at = _wanted_at(problem, config, groups, sizes)
    if isinstance(config.keep, ChannelShare):
        return snap(wanted_at(config.keep.share), sizes, multiples)
    operations = _operations(problem, config, groups, sizes, keep)
    limit = config.keep.share * _operations_of(problem, config)
    return counts_within(operations, limit, multiples, wanted_at)


def _wanted_at(
    problem: _Problem,
    config: ShrinkConfig,
    groups: Sequence[ChannelGroup],
    sizes: NDArray[np.int64],
) -> Callable[[float], Array]:
    """level 0 to 1 => labels of each group that stay."""
    if config.scope == "group":
        return lambda level: np.asarray(level * sizes, np.float64)
    scores = [relative(_scores(problem, config, group)) for group in groups]
    every = np.sort(np.concatenate(scores))[::-1]

    def ranked(level: float) -> Array:
        wanted = round(level * len(every))
        threshold = every[wanted - 1] if wanted else np.inf
        counts = np.array([np.count_nonzero(score >= threshold) for score in scores])
        return np.asarray(np.maximum(counts, _LEAST_SHARE * sizes), np.float64)

    return ranked


def _operations_of(problem: _Problem, config: ShrinkConfig) -> float:
    graph = problem.channels.graph
    layers = [
        describe_layer(graph, v) for v in graph.values if problem.schemes.get(v.name) == config
    ]
    return float(sum(layer.macs for layer in layers if layer is not None))


def _operations(
    problem: _Problem,
    config: ShrinkConfig,
    groups: Sequence[ChannelGroup],
    sizes: NDArray[np.int64],
    keep: Keep,
) -> OperationCounts:
    """Of the layers with `config`, as what has left so far leaves them."""
    graph = problem.channels.graph
    whole, outputs, inputs = [], [], []
    for layer in problem.channels.layers:
        mine = [v for v in layer.calls if problem.schemes.get(v.name) == config]
        described = [describe_layer(graph, v) for v in mine]
        macs = sum(item.macs for item in described if item is not None)
        left_out, left_in = keep[layer.outputs], keep[layer.inputs]
        whole.append(macs * left_out.mean() * left_in.mean())
        out, into = layer.outputs[left_out], layer.inputs[left_in]
        outputs.append([np.isin(out, g.labels).sum() / len(g.labels) / len(out) for g in groups])
        inputs.append([np.isin(into, g.labels).sum() / len(g.labels) / len(into) for g in groups])
    return OperationCounts(np.array(whole), np.array(outputs), np.array(inputs), sizes)


# --- which -----------------------------------------------------------------------------------


def _choose(
    problem: _Problem,
    config: ShrinkConfig,
    group: ChannelGroup,
    count: int,
    keep: Keep,
    merged: dict[LayerChannels, NDArray],
) -> None:
    """Clear `keep` for the labels of `group` that leave."""
    if config.criterion == "merging":
        merging = _merging(problem, group, count, merged)
        keep[group.labels[~merging.kept]] = False
        return
    consumers = [] if config.criterion in RANKED else problem.consumers(group)
    if consumers:
        select = {
            "lasso": select_by_lasso,
            "thinet": select_greedily,
            "surgeon": select_by_surgeon,
        }[config.criterion]
        kept = select(consumers, count)
    else:
        kept = keep_best(_scores(problem, config, group), count)
    keep[group.labels[~kept]] = False


def _scores(problem: _Problem, config: ShrinkConfig, group: ChannelGroup) -> Array:
    """What each label is worth by what computes it; of several layers the sum. [C]"""
    total = np.zeros(len(group.labels))
    for layer in group.producers:
        if layer.is_depthwise and config.criterion != "batch_norm":
            continue  # it passes on what others compute
        if config.criterion == "batch_norm" and layer.name in problem.matrices:
            second, mean, count = problem.moments(layer)
            matrices = problem.matrices[layer.name].matrices()
            scores = np.concatenate(
                [
                    folded_batch_norm_scale(*item, count)
                    for item in zip(matrices, second, mean, strict=True)
                ]
            )
        else:
            scores = filter_norms(_filters(layer), 2 if config.criterion == "l2" else 1)
        total += relative(_by_label(scores, layer.outputs, group))
    return total


def _filters(layer: LayerChannels) -> Array:
    """[K, O]"""
    axis = weight_layout(layer.call).index("O")
    moved = np.moveaxis(layer.weight.astype(np.float64), axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def _by_label(scores: Array, labels: NDArray[np.int64], group: ChannelGroup) -> Array:
    """Scores of channels added up by label. [C]"""
    mine = np.isin(labels, group.labels)
    places = np.searchsorted(group.labels, labels[mine])
    return np.bincount(places, scores[mine], len(group.labels)).astype(np.float64)


def _merging(
    problem: _Problem,
    group: ChannelGroup,
    count: int,
    merged: dict[LayerChannels, NDArray],
) -> Merging:
    """Which channel stands for which; the readers' weights with those taken on go to `merged`."""
    graph = problem.channels.graph
    incoming, outgoing = [], []
    for layer in group.producers:
        filters, found = _filters(layer), bias_at(graph, layer.calls[0])
        if found is not None:
            array = graph.constant(graph.values[found[0]].args[found[1]])
            assert array is not None
            bias = np.broadcast_to(array.reshape(-1), filters.shape[1:])
            filters = np.vstack([filters, bias])
        columns = [filters[:, layer.outputs == label].reshape(-1) for label in group.labels]
        incoming.append(np.stack(columns, axis=1))
    readers = [layer for layer in group.consumers if layer.name in problem.matrices]
    for layer in readers:
        axis = weight_layout(layer.call).index("I")
        rows = np.moveaxis(merged.get(layer, layer.weight), axis, 0).astype(np.float64)
        outgoing.append(np.stack([rows[layer.inputs == label] for label in group.labels]))
    merging = merge_similar(
        np.concatenate(incoming), outgoing or [np.ones((len(group.labels), 1))], count
    )
    for layer in readers:
        axis = weight_layout(layer.call).index("I")
        weight = merged.get(layer, layer.weight).copy()
        rows = np.moveaxis(weight, axis, 0)  # a view
        for label, into in zip(group.labels, group.labels[merging.into], strict=True):
            if label != into:
                rows[layer.inputs == into] += rows[layer.inputs == label]
        merged[layer] = weight
    return merging


# --- what the others become ------------------------------------------------------------------


def _compensated(
    problem: _Problem, keep: Keep, merged: Mapping[LayerChannels, NDArray]
) -> tuple[dict[LayerChannels, NDArray], dict[LayerChannels, Array]]:
    """New weights of the layers that read fewer channels, and what to add to their biases."""
    weights, shifts = dict(merged), {}
    for layer, config in problem.configs.items():
        kept = keep[layer.inputs]
        if kept.all() or not config.reconstruct or layer.name not in problem.matrices:
            continue
        matrices = problem.matrices[layer.name]
        second, mean, count = problem.moments(layer)
        # The steps of a loop share their weight but have no mean in common.
        has_bias = len(layer.calls) == 1
        solved, shift = [], []
        for matrix, xx, x in zip(matrices.matrices(), second, mean, strict=True):
            moments = centred(xx, x, count) if has_bias else xx
            found = reconstruct_kept(Consumer(matrix, moments, len(kept)), kept)
            solved.append(found)
            shift.append(bias_change(matrix, found, x))
        rows = np.stack(solved).transpose(0, 2, 1)  # [G, N, K]
        weights[layer] = weight_of_matrix(rows, layer.call, layer.weight.shape).astype(np.float32)
        if has_bias:
            shifts[layer] = np.concatenate(shift)
    return weights, shifts


def _notes(channels: Channels, keep: Keep) -> dict[str, str]:
    """Layer => `64 -> 40 channels`, or inputs where it computes as many as before."""
    notes = {}
    for layer in channels.layers:
        for labels, what in ((layer.outputs, "channels"), (layer.inputs, "inputs")):
            left = int(keep[labels].sum())
            if left < len(labels):
                for variable in layer.calls:
                    notes[variable.name] = f"{len(labels)} -> {left} {what}"
                break
    return notes
