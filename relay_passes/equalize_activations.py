"""conv(relu(conv(x, w1) + b1), w2) => conv(relu(conv(x, w1 * s) + b1 * s), w2 / s), s >= 1

All channels of an activation share one scale, so a channel with a small range gets few of the 256
levels. Scaling it up beforehand and its reader's weights down costs nothing at run time. Weights
have one scale for each output channel, so the layer that produces the channel loses nothing; for
the layer that reads it the difficulty moves from activations to weights, as in SmoothQuant (Xiao et
al. 2023, section 4), all the way for a depthwise reader, whose channels have their own scales too.

Behind a clip to [0, bound] (ReLU6) a channel is scaled up at most until its observed range reaches
half of the bound: only data far outside the calibrated range meet the clip earlier than before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..errors import DataError, RecipeError
from .channels import input_ranges
from .graph import Graph
from .ir import op_name
from .layer_pairs import LayerPair, find_pairs, float_layers, write_layers
from .numerics.equalization import activation_scales
from .numerics.statistics import Statistics
from .observations import Observations


@dataclass(frozen=True)
class EqualizeActivationsConfig:
    """Even out the activation ranges of the channels between two selected layers."""

    strength: float = field(
        default=0.5,
        metadata={"help": "0 leaves activations as they are, 1 gives all channels one range"},
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise RecipeError(f"strength is from 0 to 1, not {self.strength}")


def observe(module: tvm.IRModule, schemes: Mapping[str, EqualizeActivationsConfig]) -> Observations:
    """The extremes by channel of every value between two layers."""
    graph = Graph(module["main"])
    pairs = find_pairs(graph, float_layers(graph, schemes))
    return Observations(channels={pair.value.name: _channel_axis(pair) for pair in pairs})


def _channel_axis(pair: LayerPair) -> int:
    call = pair.second.call
    if op_name(call) == "relax.matmul":
        return len(pair.value.ty.shape) - 1
    return str(call.attrs.data_layout).index("C")


@tvm.transform.module_pass(opt_level=0, name="EqualizeActivations")
class EqualizeActivations:
    """Equalise the channels of every value that one selected layer computes and one reads.

    `schemes` maps layer names to configs (that of the reading layer counts); `statistics` is what
    `observe` asks for. Raises `DataError` when statistics are missing.
    """

    def __init__(
        self, schemes: Mapping[str, EqualizeActivationsConfig], statistics: Statistics
    ) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        graph = Graph(module["main"])
        layers = float_layers(graph, self.schemes)
        names = {id(layer): variable.name for variable, layer in layers.items()}
        for pair in find_pairs(graph, layers):
            config = self.schemes[names[id(pair.second)]]
            scales = self._scales(pair, config.strength)
            if scales is not None:
                pair.scale(scales)
        module = module.clone()
        module["main"] = write_layers(graph, layers)
        return relax.transform.Normalize()(module)

    def _scales(self, pair: LayerPair, strength: float) -> NDArray[np.float64] | None:
        observed = self.statistics.channels.get(pair.value.name)
        if observed is None:
            raise DataError(
                f"the calibration statistics lack the channels of {pair.value.name!r}; calibrate "
                "this module with what `equalize_activations.observe` lists"
            )
        ranges = np.maximum(np.abs(observed.low), np.abs(observed.high))
        weights = input_ranges(pair.second.weight, pair.second.call)
        if ranges.shape != weights.shape:  # e.g. a matmul that reads flattened positions
            return None
        if _is_depthwise(pair.second.call, ranges):
            strength = 1.0
        return activation_scales(ranges, strength, pair.bound)


def _is_depthwise(call: relax.Call, ranges: NDArray[np.float64]) -> bool:
    return op_name(call) != "relax.matmul" and int(call.attrs.groups) == ranges.size
