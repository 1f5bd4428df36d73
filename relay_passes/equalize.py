"""conv(relu(conv(x, w1) + b1), w2) => conv(relu(conv(x, w1 / s) + b1 / s), w2 * s)

Cross-layer equalisation (Nagel et al. 2019, section 4.1): the function stays the same, and the
weight ranges of the channels between two layers become equal, so that quantisation with one scale
for many channels loses less. Costs nothing at run time and needs no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..errors import RecipeError
from .channels import input_ranges, output_ranges, scale_inputs, scale_outputs
from .graph import Graph, rebuild
from .numerics.equalization import equalizing_scales
from .op_kinds import ANCHORS
from .placement import bias_vector, spread_bias
from .quantize_weights import repeats_of_output_channels, weight_layout

# f(s x) = s f(x) for s > 0, channel by channel. ReLU6 and other clips are not: their bound would
# have to differ by channel.
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


@dataclass(frozen=True)
class EqualizeConfig:
    """Even out the weight ranges of neighbouring layers; both must be selected."""

    sweeps: int = field(
        default=20, metadata={"help": "times that all pairs are equalised; chains settle slowly"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.sweeps <= 1000:
            raise RecipeError(f"sweeps is from 1 to 1000, not {self.sweeps}")


@dataclass
class _Layer:
    """Weight and bias of a layer while they are being scaled; `bias_at` adds the bias."""

    call: relax.Call
    weight: NDArray[np.float32]
    bias_at: relax.Var | None = None
    bias: NDArray[np.float32] | None = None


@tvm.transform.module_pass(opt_level=0, name="Equalize")
class Equalize:
    """Equalise every pair of selected layers with only ReLU-like operators between them.

    `schemes` maps layer names to configs. Pairs whose first output has another reader, or passes a
    branch, a clip or a reshape, are left alone.
    """

    def __init__(self, schemes: Mapping[str, EqualizeConfig]) -> None:
        self.schemes = dict(schemes)

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        graph = Graph(module["main"])
        layers = _float_layers(graph, self.schemes)
        pairs = [
            (layers[first], layers[second])
            for first in layers
            if (second := _next_layer(graph, layers, first)) is not None
        ]
        sweeps = max((config.sweeps for config in self.schemes.values()), default=0)
        for _ in range(sweeps):
            changes = [_equalize(first, second) for first, second in pairs]
            if not any(changes):
                break
        module = module.clone()
        module["main"] = _write(graph, layers)
        return relax.transform.Normalize()(module)


def _float_layers(graph: Graph, schemes: Mapping[str, EqualizeConfig]) -> dict[relax.Var, _Layer]:
    layers = {}
    for variable, call in graph.values.items():
        if variable.name not in schemes or graph.op(variable) not in ANCHORS:
            continue
        weight = graph.constant(call.args[1])
        if weight is None or weight.dtype != np.float32:
            continue
        if repeats_of_output_channels(call) > 1:  # its scales would be shared between groups
            continue
        if weight.ndim == len(weight_layout(call)):
            layers[variable] = _Layer(call, weight)
    return layers


def _next_layer(
    graph: Graph, layers: Mapping[relax.Var, _Layer], first: relax.Var
) -> relax.Var | None:
    """The layer that alone reads the output of `first`; notes the bias of `first` on the way."""
    current, layer = first, layers[first]
    while True:
        readers = graph.readers[current]
        if len(readers) != 1 or readers[0] is None:
            return None
        reader = readers[0]
        if reader in layers:
            call = graph.values[reader]
            is_input = isinstance(call.args[0], relax.Var) and call.args[0].same_as(current)
            return reader if is_input else None
        if graph.op(reader) == "relax.add" and current.same_as(first):
            arrays = [graph.constant(item) for item in graph.operands(reader)]
            array = next((item for item in arrays if item is not None), None)
            if array is None or bias_vector(array, layer.call, first) is None:
                return None
            layer.bias_at, layer.bias = reader, spread_bias(array, layer.call, first)
        elif graph.op(reader) not in HOMOGENEOUS:
            return None
        current = reader


def _equalize(first: _Layer, second: _Layer) -> bool:
    """Scale the channels between two layers; whether anything still changed by over 0.1 %."""
    above = output_ranges(first.weight, first.call)
    below = input_ranges(second.weight, second.call)
    if above.shape != below.shape:  # e.g. a matmul that reads flattened positions
        return False
    scales = equalizing_scales(above, below)
    first.weight = scale_outputs(first.weight, first.call, 1.0 / scales)
    second.weight = scale_inputs(second.weight, second.call, scales)
    if first.bias is not None:
        first.bias = (first.bias / scales.reshape(first.bias.shape)).astype(np.float32)
    return bool(np.abs(np.log(scales)).max(initial=0.0) > 1e-3)


def _write(graph: Graph, layers: Mapping[relax.Var, _Layer]) -> relax.Function:
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
    function = rebuild(graph.function, replace=replace)
    return relax.analysis.remove_all_unused(function)
