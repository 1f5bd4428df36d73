"""b => b - (mean of conv(x, decode(w)) - mean of conv(x, w)) for each output channel

Bias correction (Nagel et al. 2019, section 4.2, with means from calibration as in appendix D):
quantised weights shift the mean of each output channel by ΔW·E[x], and the bias takes the shift
back. Runs after the weights were compressed, with statistics of the float original. Costs nothing
at run time; a layer without a bias gets one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..errors import DataError
from .biases import BiasWriter
from .encodings import match_encoding
from .graph import Graph
from .ir import constant, op_name, shape_of
from .numerics.statistics import Statistics
from .observations import Observations
from .op_kinds import ANCHORS
from .patches import patch_shape, weight_matrix
from .placement import channel_axis


@dataclass(frozen=True)
class CorrectBiasConfig:
    """Correct the selected layers' biases for what their compressed weights do to the mean."""


def observe(module: tvm.IRModule, schemes: Mapping[str, CorrectBiasConfig]) -> Observations:
    """Means of the layers' input patches and of their output channels, on the float module."""
    graph = Graph(module["main"])
    layers = [item for item in graph.values if item.name in schemes and _has_patches(graph, item)]
    return Observations(
        channels={item.name: channel_axis(graph.values[item]) for item in layers},
        first_moments=frozenset(item.name for item in layers),
    )


def _has_patches(graph: Graph, variable: relax.Var) -> bool:
    if graph.op(variable) not in ANCHORS:
        return False
    call = graph.values[variable]
    is_weight = not graph.tensor_operands(variable)[1:]
    return is_weight and patch_shape(call, shape_of(call.args[1]) or ()) is not None


@tvm.transform.module_pass(opt_level=0, name="CorrectBias")
class CorrectBias:
    """Correct the biases of the layers in `schemes` that have a compressed weight.

    `statistics` is what `observe` asks for, gathered on the module before its weights were
    compressed. Transposed convolutions and weights with a batch axis are left alone, and so are the
    steps of a loop: one bias serves all of them, and none has the mean of all.
    Raises `DataError` when statistics are missing.
    """

    def __init__(self, schemes: Mapping[str, CorrectBiasConfig], statistics: Statistics) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        graph = Graph(module["main"])
        writer = BiasWriter(graph, module)
        layers = [
            item for item in graph.values if item.name in self.schemes and graph.op(item) in ANCHORS
        ]
        kernels = Counter(_kernel(graph, layer) for layer in layers)
        for layer in layers:
            if kernels[_kernel(graph, layer)] == 1:
                shift = _mean_shift(graph, layer, module, self.statistics)
                if shift is not None:
                    writer.subtract(layer, shift)
        module = module.clone()
        module["main"] = writer.write()
        return relax.transform.Normalize()(module)


def _kernel(graph: Graph, layer: relax.Var) -> Hashable:
    """Equal for layers with the same scale in and the same weights: the steps of a loop."""
    found: list[Hashable] = []
    for operand in graph.values[layer].args[:2]:
        value = graph.values.get(operand) if isinstance(operand, relax.Var) else None
        if value is None or not _is_decoded(value):
            return layer
        arrays = [constant(item) for item in value.args]
        found += [None if array is None else (array.shape, array.tobytes()) for array in arrays]
    return tuple(found)


def _is_decoded(value: tvm.ir.Expr) -> bool:
    """Whether it is a weight or a tensor of codes as a float: dequantised, or in an encoding."""
    is_function = isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.GlobalVar)
    return is_function or op_name(value) == "relax.dequantize"


def _mean_shift(
    graph: Graph, variable: relax.Var, module: tvm.IRModule, statistics: Statistics
) -> NDArray[np.float64] | None:
    """How much further each output channel's mean lies than the float original's. [O]"""
    call = graph.values[variable]
    weight = decoded_weight(graph, call.args[1], module)
    if weight is None or patch_shape(call, weight.shape) is None:
        return None
    observed = statistics.channels.get(variable.name)
    moments = statistics.moments.get(variable.name)
    if observed is None or moments is None:
        raise DataError(
            f"the calibration statistics lack the means of layer {variable.name!r}; calibrate the "
            "float module with what `correct_bias.observe` lists"
        )
    rows = weight_matrix(weight, call).astype(np.float64)  # [G, O/G, K]
    mean = np.einsum("gok,gk->go", rows, moments.mean).reshape(-1)
    return mean - observed.mean


def decoded_weight(
    graph: Graph, weight: tvm.ir.Expr, module: tvm.IRModule
) -> NDArray[np.float32] | None:
    """The float values of a compressed weight; `None` for a plain constant or a computed tensor."""
    value = graph.values.get(weight) if isinstance(weight, relax.Var) else weight
    if value is None:
        return None
    if op_name(value) == "relax.dequantize":
        return _dequantized(value)
    encoding = match_encoding(value, module)
    return None if encoding is None else encoding.decode()


def _dequantized(call: relax.Call) -> NDArray[np.float32] | None:
    codes, scale, zero_point = (constant(item) for item in call.args)
    if codes is None or scale is None or zero_point is None:
        return None
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[int(call.attrs.axis)] = scale.size
    scale = scale.reshape(shape)
    zero_point = zero_point.reshape(shape) if zero_point.size > 1 else zero_point
    return (codes.astype(np.int32) - zero_point.astype(np.int32)).astype(np.float32) * scale
