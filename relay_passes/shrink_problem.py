"""What the parts of `shrink` work on: channels that leave together, the layers that read them and
what calibration knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..errors import DataError
from .channel_groups import ChannelGroup, Channels, LayerChannels, find_channels
from .numerics.channel_budget import OperationCounts
from .numerics.channel_consumer import Consumer, bias_change, centred, reconstruct_kept
from .numerics.statistics import ChannelGradients, Statistics
from .patches import weight_of_matrix
from .remove_channels import Keep
from .select import describe_layer
from .shrink_config import ShrinkConfig
from .weight_layers import WeightLayer, weight_layers

Array = NDArray[np.float64]


@dataclass(eq=False)
class ShrinkProblem:
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
    ) -> ShrinkProblem:
        channels = find_channels(module["main"])
        groups = []
        for group in channels.groups():
            makers = [layer for layer in group.producers if not layer.is_depthwise]
            if all(call.name in schemes for layer in makers for call in layer.calls):
                groups.append((group, schemes[makers[0].name]))
        names = {call.name: None for layer in channels.layers for call in layer.calls}
        found = weight_layers(channels.graph, names)
        matrices = {item.name: layer for layer in found for item in layer.variables}
        problem = ShrinkProblem(channels, groups, schemes, statistics, matrices)
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

    def squared_gradients(self, group: ChannelGroup) -> list[Array]:
        """Of the outputs of each of `consumers`, of all calls together. [N]"""
        found = []
        for layer in group.consumers:
            if layer.name in self.matrices:
                total = sum(self.gradients(v).gradient_squared for v in layer.calls)
                found += np.split(np.asarray(total), self.matrices[layer.name].patches.groups)
        return found

    def gradients(self, tensor: relax.Var) -> ChannelGradients:
        """Raises `DataError` when they were not gathered."""
        found = self.statistics.gradients.get(tensor.name)
        if found is None:
            raise DataError(
                f"the calibration statistics lack the gradients of {tensor.name!r}; calibrate the "
                "very module that the step changes, with what its `observe` lists"
            )
        return found


def weight_of(layer: LayerChannels, matrices: Sequence[Array]) -> NDArray[np.float32]:
    """[K, N] of each group => the layer's weight."""
    rows = np.stack(matrices).transpose(0, 2, 1)
    return weight_of_matrix(rows, layer.call, layer.weight.shape).astype(np.float32)


def operations_of(problem: ShrinkProblem, config: ShrinkConfig) -> float:
    graph = problem.channels.graph
    layers = [
        describe_layer(graph, v) for v in graph.values if problem.schemes.get(v.name) == config
    ]
    return float(sum(layer.macs for layer in layers if layer is not None))


def operation_counts(
    problem: ShrinkProblem,
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


def compensated(
    problem: ShrinkProblem, keep: Keep, merged: Mapping[LayerChannels, NDArray]
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
        weights[layer] = weight_of(layer, solved)
        if has_bias:
            shifts[layer] = np.concatenate(shift)
    return weights, shifts
