"""Pairs of layers between which channels may be scaled: layer -> bias -> ReLU, pooling -> layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from .channels import scale_inputs, scale_outputs
from .graph import Graph, rebuild
from .op_kinds import ANCHORS
from .placement import bias_vector, spread_bias
from .quantize_weights import repeats_of_output_channels, weight_layout

# f(s x) = s f(x) for s > 0, channel by channel.
HOMOGENEOUS = {
    "relax.nn.relu",
    "relax.nn.leakyrelu",
    "relax.nn.max_pool1d",
    "relax.nn.max_pool2d",
    "relax.nn.avg_pool1d",
    "relax.nn.avg_pool2d",
    "relax.nn.adaptive_avg_pool1d",
    "relax.nn.adaptive_avg_pool2d",
}


@dataclass
class FloatLayer:
    """Weight and bias of a layer while they are being scaled; `bias_at` adds the bias."""

    call: relax.Call
    weight: NDArray[np.float32]
    bias_at: relax.Var | None = None
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class LayerPair:
    """`second` alone reads what `first` computes: `value`, clipped to `bound` if there is one."""

    first: FloatLayer
    second: FloatLayer
    value: relax.Var
    bound: float | None

    def scale(self, scales: NDArray[np.float64]) -> None:
        """Multiply each channel between the two layers by its scale. [C]"""
        self.first.weight = scale_outputs(self.first.weight, self.first.call, scales)
        self.second.weight = scale_inputs(self.second.weight, self.second.call, 1.0 / scales)
        if self.first.bias is not None:
            bias = self.first.bias * scales.reshape(self.first.bias.shape)
            self.first.bias = bias.astype(np.float32)


def float_layers(graph: Graph, names: Collection[str]) -> dict[relax.Var, FloatLayer]:
    """The named layers whose weight is a float constant by channel."""
    layers = {}
    for variable, call in graph.values.items():
        if variable.name not in names or graph.op(variable) not in ANCHORS:
            continue
        weight = graph.constant(call.args[1])
        if weight is None or weight.dtype != np.float32:
            continue
        if repeats_of_output_channels(call) > 1:  # its scales would be shared between groups
            continue
        if weight.ndim == len(weight_layout(call)):
            layers[variable] = FloatLayer(call, weight)
    return layers


def find_pairs(graph: Graph, layers: Mapping[relax.Var, FloatLayer]) -> list[LayerPair]:
    """All pairs, in execution order; also notes the biases of their first layers."""
    found = []
    for first in layers:
        pair = _follow(graph, layers, first)
        if pair is not None:
            found.append(pair)
    return found


def _follow(
    graph: Graph, layers: Mapping[relax.Var, FloatLayer], first: relax.Var
) -> LayerPair | None:
    current, layer, bound = first, layers[first], None
    while True:
        readers = graph.readers[current]
        if len(readers) != 1 or readers[0] is None:
            return None
        reader = readers[0]
        if reader in layers:
            call = graph.values[reader]
            is_input = isinstance(call.args[0], relax.Var) and call.args[0].same_as(current)
            return LayerPair(layer, layers[reader], current, bound) if is_input else None
        if graph.op(reader) == "relax.add" and current.same_as(first):
            arrays = [graph.constant(item) for item in graph.operands(reader)]
            array = next((item for item in arrays if item is not None), None)
            if array is None or bias_vector(array, layer.call, first) is None:
                return None
            layer.bias_at, layer.bias = reader, spread_bias(array, layer.call, first)
        elif graph.op(reader) not in HOMOGENEOUS:
            upper = _upper_clip(graph, reader)
            if upper is None:
                return None
            bound = upper if bound is None else min(bound, upper)
        current = reader


def _upper_clip(graph: Graph, variable: relax.Var) -> float | None:
    """Upper bound of a clip to [0, bound]; `None` for anything else."""
    if graph.op(variable) == "relax.nn.relu6":
        return 6.0
    if graph.op(variable) != "relax.clip":
        return None
    low, high = (float(item.value) for item in graph.values[variable].args[1:3])
    return high if low == 0.0 and high > 0.0 else None


def write_layers(graph: Graph, layers: Mapping[relax.Var, FloatLayer]) -> relax.Function:
    """The function with the layers' present weights and biases."""
    replace: dict[relax.Var, tvm.ir.Expr] = {}
    for variable, layer in layers.items():
        call = layer.call
        replace[variable] = relax.Call(
            call.op,
            [call.args[0], relax.const(layer.weight), *call.args[2:]],
            call.attrs,
            call.ty_args,
        )
        if layer.bias_at is not None and layer.bias is not None:
            add = graph.values[layer.bias_at]
            arguments = [
                item if graph.constant(item) is None else relax.const(layer.bias)
                for item in add.args
            ]
            replace[layer.bias_at] = relax.Call(add.op, arguments, add.attrs, add.ty_args)
    return relax.analysis.remove_all_unused(rebuild(graph.function, replace=replace))
