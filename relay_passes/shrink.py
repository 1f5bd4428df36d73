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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from .channel_costs import Asked, counts_that_pay
from .channel_groups import ChannelGroup, Channels, Labels, LayerChannels, find_channels
from .costs import LayerCosts
from .graph import Graph
from .ir import noted_words, op_name, shape_of
from .numerics.channel_budget import counts_within, snap
from .numerics.channel_norms import (
    filter_norms,
    folded_batch_norm_scale,
    keep_best,
    relative,
)
from .numerics.discriminating_selection import select_discriminating
from .numerics.gradient_saliency import taylor
from .numerics.lasso_selection import select_by_lasso
from .numerics.neuron_merging import Merging, merge_similar
from .numerics.second_order import reconstruct
from .numerics.statistics import Statistics
from .numerics.surgeon_selection import removal_errors, select_by_surgeon
from .numerics.thinet_selection import select_greedily
from .observations import Observations
from .placement import channel_axis
from .quantize_weights import weight_layout
from .remove_channels import Keep, bias_at, masked, shrunk
from .shrink_config import RANKED, ChannelShare, ShrinkConfig
from .shrink_problem import (
    ShrinkProblem,
    compensated,
    operation_counts,
    operations_of,
    weight_of,
)
from .weight_layers import weight_layers

SHRUNK_ATTR = "tvm_compress.shrunk"
# Between the parts of a step (JSON): the labels that are zeros by now, and layer => what the
# target's costs had to say.
LEAVING_ATTR = "tvm_compress.leaving"

# Parts of a step that calibration runs between: each is two inferences a sample.
STAGES = 24

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
    gathered on this very module; `DataError` when it does not. `costs` say which numbers of
    channels the target likes, and which groups gain nothing there: those stay whole, unless their
    config insists (`channel_costs.py`). What each layer lost, or why not, is in the attribute
    `tvm_compress.shrunk` of `main` (JSON: layer => words).

    A part of a step, as `stages` gives them, is applied the same way.
    """

    def __init__(
        self,
        schemes: Mapping[str, ShrinkConfig | Choose | Refit],
        statistics: Statistics,
        costs: LayerCosts | None = None,
    ) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics
        self.costs = costs

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        parts = list(self.schemes.values())
        if any(isinstance(part, Refit) for part in parts):
            zeros, channels, keep = _refitted(module, self.schemes, self.statistics)
        else:
            configs = {
                name: part.config if isinstance(part, Choose) else part
                for name, part in self.schemes.items()
                if not isinstance(part, Refit)
            }
            zeros, channels, keep = mask(module, configs, self.statistics, self.costs)
        if any(not getattr(part, "is_last", True) for part in parts):
            return zeros
        notes = {**read_shrunk(module), **_notes(channels, keep, _leaving(zeros)["words"])}
        main = shrunk(channels, keep).with_attr(SHRUNK_ATTR, json.dumps(notes))
        main = main.without_attr(LEAVING_ATTR)
        result = zeros.clone()
        result["main"] = main
        return relax.transform.Normalize()(result)


@dataclass(frozen=True)
class Choose:
    """First part of a step: channels that leave become zeros, shapes stay."""

    config: ShrinkConfig
    is_last: bool = False


@dataclass(frozen=True)
class Refit:
    """A later part: a layer makes up for what it has lost with the inputs that those before it, as
    they are by now, give it. After the last one the zeros are cut out."""

    is_last: bool = False


def stages(
    module: tvm.IRModule, schemes: Mapping[str, ShrinkConfig]
) -> list[dict[str, ShrinkConfig | Choose | Refit]]:
    """The choice, then the layers that read what is left, in the order of the graph, each behind
    those before it; all as one where nothing is solved for."""
    problem = ShrinkProblem.of(module, schemes, Statistics())
    solved = [
        [call.name for call in layer.calls]
        for layer in problem.channels.layers
        if layer in problem.configs
        and problem.configs[layer].reconstruct
        and layer.name in problem.matrices
    ]
    if not solved:
        return [dict(schemes)]
    bounds = np.linspace(0, len(solved), min(len(solved), STAGES) + 1).round().astype(int)
    parts: list[dict[str, ShrinkConfig | Choose | Refit]] = [
        {name: Choose(config) for name, config in schemes.items()}
    ]
    for start, end in pairwise(bounds):
        refit = Refit(end == len(solved))
        parts.append({name: refit for names in solved[start:end] for name in names})
    return parts


def mask(
    module: tvm.IRModule,
    schemes: Mapping[str, ShrinkConfig],
    statistics: Statistics,
    costs: LayerCosts | None = None,
) -> tuple[tvm.IRModule, Channels, Keep]:
    """The module with zeros for what `Shrink` removes, which computes what the shrunk one does; the
    labels of its tensors; and which labels stay. In `LEAVING_ATTR`: which do not."""
    problem = ShrinkProblem.of(module, schemes, statistics)
    groups, configs, counts = _group_counts(problem, costs)
    words: dict[str, str] = {}
    if costs is not None:
        asked = [Asked(c.multiple if c.multiple != "auto" else None, c.insist) for c in configs]
        counts, words = counts_that_pay(problem.channels, groups, counts, asked, costs)
    keep = np.ones(len(problem.channels.atoms), bool)
    merged: dict[LayerChannels, NDArray] = {}
    for group, config, count in zip(groups, configs, counts, strict=True):
        if count < len(group.labels):
            _choose(problem, config, group, count, keep, merged)
    weights, shifts = compensated(problem, keep, merged)
    function, channels = masked(problem.channels, keep, weights, shifts)
    leaving = {"labels": np.flatnonzero(~keep).tolist(), "words": words}
    result = module.clone()
    result["main"] = function.with_attr(LEAVING_ATTR, json.dumps(leaving))
    return relax.transform.Normalize()(result), channels, keep


def _refitted(
    module: tvm.IRModule, layers: Collection[str], statistics: Statistics
) -> tuple[tvm.IRModule, Channels, Keep]:
    """The masked `module` with new weights for `layers`: what `statistics` want of them, from the
    inputs that stay."""
    channels = find_channels(module["main"])
    keep = np.ones(len(channels.atoms), bool)
    keep[_leaving(module)["labels"]] = False
    members = [layer for layer in channels.layers if layer.name in layers]
    names = {call.name: None for layer in members for call in layer.calls}
    found = {item.name: item for item in weight_layers(channels.graph, names)}
    weights: dict[LayerChannels, NDArray] = {}
    shifts: dict[LayerChannels, Array] = {}
    for layer in members:
        solved, shift = [], []
        kept = keep[layer.inputs]
        for problem in found[layer.name].problems(statistics):
            rows = np.tile(kept, len(problem.best) // len(kept))
            support = np.broadcast_to(rows[:, None], problem.best.shape)
            weight = reconstruct(problem.best, problem.hessian, support)
            solved.append(weight)
            shift.append(problem.bias_shift(weight))
        weights[layer] = weight_of(layer, solved)
        if all(item is not None for item in shift):
            shifts[layer] = -np.concatenate([item for item in shift if item is not None])
    function, channels = masked(channels, keep, weights, shifts)
    result = module.clone()
    result["main"] = function
    return relax.transform.Normalize()(result), channels, keep


def _leaving(module: tvm.IRModule) -> dict[str, Any]:
    return dict(json.loads(str(module["main"].attrs[LEAVING_ATTR])))


def observe(
    module: tvm.IRModule, schemes: Mapping[str, ShrinkConfig | Choose | Refit]
) -> Observations | None:
    """X·Xᵀ of the layers that read channels which may leave; of those that compute them where that
    is what the criterion looks at."""
    if any(isinstance(part, Refit) for part in schemes.values()):
        return Observations(second_moments=frozenset(schemes))
    configs = {
        name: part.config if isinstance(part, Choose) else part
        for name, part in schemes.items()
        if not isinstance(part, Refit)
    }
    problem = ShrinkProblem.of(module, configs, Statistics())
    wanted: set[LayerChannels] = set()
    gradients: dict[str, int] = {}
    for group, config in problem.groups:
        if config.reads_consumers:
            wanted |= set(group.consumers)
        if config.criterion == "batch_norm":
            wanted |= set(group.producers)
        if config.criterion == "discrimination":
            gradients |= {
                call.name: channel_axis(layer.call)
                for layer in group.consumers
                for call in layer.calls
            }
        if config.criterion == "taylor":
            gradients |= {
                tensor.name: axis
                for tensor, axis, _ in _read_tensors(problem.channels.graph, group)
            }
    names = [v.name for x in wanted if x.name in problem.matrices for v in x.calls]
    if not names and not gradients:
        return None
    return Observations(second_moments=frozenset(names), gradients=gradients)


def read_shrunk(module: tvm.IRModule) -> dict[str, str]:
    """Layer => what it lost in words, of all steps `shrink` so far."""
    return noted_words(module, SHRUNK_ATTR)


# --- how many --------------------------------------------------------------------------------


def _group_counts(
    problem: ShrinkProblem, costs: LayerCosts | None
) -> tuple[list[ChannelGroup], list[ShrinkConfig], list[int]]:
    """The groups, those of one config together, and how many labels of each were asked for."""
    lanes = None if costs is None else costs.lanes
    groups: list[ChannelGroup] = []
    configs: list[ShrinkConfig] = []
    counts: list[int] = []
    keep = np.ones(len(problem.channels.atoms), bool)  # of as many labels, not yet the very ones
    for config in dict.fromkeys(config for _, config in problem.groups):
        mine = [group for group, own in problem.groups if own == config]
        found = _counts(problem, config, mine, keep, config.multiples_for(lanes)).tolist()
        for group, count in zip(mine, found, strict=True):
            keep[group.labels[count:]] = False
        groups, counts = groups + mine, counts + found
        configs += [config] * len(mine)
    return groups, configs, counts


def _counts(
    problem: ShrinkProblem,
    config: ShrinkConfig,
    groups: Sequence[ChannelGroup],
    keep: Keep,
    multiples: Sequence[int],
) -> NDArray[np.int64]:
    """Labels of each group that stay: of the first of the `multiples` with which as few operations
    are left as were asked for, else of the last."""
    sizes = np.array([len(group.labels) for group in groups])
    wanted_at = _wanted_at(problem, config, groups, sizes)
    counts = sizes
    for multiple in multiples:
        units = np.array([multiple // math.gcd(multiple, group.unit) for group in groups])
        if isinstance(config.keep, ChannelShare):
            return snap(wanted_at(config.keep.share), sizes, units)
        operations = operation_counts(problem, config, groups, sizes, keep)
        limit = config.keep.share * operations_of(problem, config)
        counts = counts_within(operations, limit, units, wanted_at)
        if operations.total(counts) <= limit:
            break
    return counts


def _wanted_at(
    problem: ShrinkProblem,
    config: ShrinkConfig,
    groups: Sequence[ChannelGroup],
    sizes: NDArray[np.int64],
) -> Callable[[float], Array]:
    """level 0 to 1 => labels of each group that stay."""
    if config.scope != "network":
        return lambda level: np.asarray(level * sizes, np.float64)
    scores = [_ranks(problem, config, group) for group in groups]
    every = np.sort(np.concatenate(scores))[::-1]

    def ranked(level: float) -> Array:
        wanted = round(level * len(every))
        threshold = every[wanted - 1] if wanted else np.inf
        counts = np.array([np.count_nonzero(score >= threshold) for score in scores])
        return np.asarray(np.maximum(counts, _LEAST_SHARE * sizes), np.float64)

    return ranked


def _ranks(problem: ShrinkProblem, config: ShrinkConfig, group: ChannelGroup) -> Array:
    """What the labels of a group are worth next to those of others. [C]"""
    if config.criterion in RANKED:
        return relative(_scores(problem, config, group))
    consumers = problem.consumers(group)
    return removal_errors(consumers) if consumers else np.full(len(group.labels), np.inf)


# --- which -----------------------------------------------------------------------------------


def _choose(
    problem: ShrinkProblem,
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
        if config.criterion == "discrimination":
            kept = select_discriminating(consumers, problem.squared_gradients(group), count)
        else:
            select = {
                "lasso": select_by_lasso,
                "thinet": select_greedily,
                "surgeon": select_by_surgeon,
            }[config.criterion]
            kept = select(consumers, count)
    else:
        kept = keep_best(_scores(problem, config, group), count)
    keep[group.labels[~kept]] = False


def _scores(problem: ShrinkProblem, config: ShrinkConfig, group: ChannelGroup) -> Array:
    """What each label is worth by what computes it; of several layers the sum. [C]"""
    total = np.zeros(len(group.labels))
    if config.criterion == "taylor":
        for tensor, _, labels in _read_tensors(problem.channels.graph, group):
            total += _by_label(taylor(problem.gradients(tensor), 2), labels, group)
        return total
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


def _read_tensors(graph: Graph, group: ChannelGroup) -> list[tuple[relax.Var, int, Labels]]:
    """The tensors in which layers read a group's channels, their channel axis and its labels."""
    found = {}
    for layer in group.consumers:
        for variable in layer.calls:
            data = graph.values[variable].args[0]
            is_matmul = op_name(layer.call) == "relax.matmul"
            rank = len(shape_of(data) or ())
            axis = rank - 1 if is_matmul else str(layer.call.attrs.data_layout).index("C")
            side = (shape_of(data) or ())[axis]
            found[data] = (data, axis, np.tile(layer.inputs, side // len(layer.inputs)))
    return list(found.values())


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
    problem: ShrinkProblem,
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


def _notes(channels: Channels, keep: Keep, words: Mapping[str, str]) -> dict[str, str]:
    """Layer => `64 -> 40 channels`, or inputs where it computes as many as before, and the `words`
    that there are about it."""
    notes = dict(words)
    for layer in channels.layers:
        for labels, what in ((layer.outputs, "channels"), (layer.inputs, "inputs")):
            left = int(keep[labels].sum())
            if left < len(labels):
                for variable in layer.calls:
                    lost = f"{len(labels)} -> {left} {what}"
                    said = words.get(variable.name)
                    notes[variable.name] = lost if said is None else f"{lost}; {said}"
                break
    return notes
