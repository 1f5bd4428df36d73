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
from tvm import relax

from ..errors import RecipeError
from .channels import input_ranges, output_ranges
from .graph import Graph
from .layer_pairs import LayerPair, find_pairs, float_layers, write_layers
from .numerics.equalization import equalizing_scales


@dataclass(frozen=True)
class EqualizeConfig:
    """Even out the weight ranges of neighbouring layers; both must be selected."""

    sweeps: int = field(
        default=20, metadata={"help": "times that all pairs are equalised; chains settle slowly"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.sweeps <= 1000:
            raise RecipeError(f"sweeps is from 1 to 1000, not {self.sweeps}")


@tvm.transform.module_pass(opt_level=0, name="Equalize")
class Equalize:
    """Equalise every pair of selected layers with only ReLU-like operators between them.

    `schemes` maps layer names to configs. Pairs whose first output has another reader, or passes a
    branch, a clip (its bound would have to differ by channel) or a reshape, are left alone.
    """

    def __init__(self, schemes: Mapping[str, EqualizeConfig]) -> None:
        self.schemes = dict(schemes)

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        graph = Graph(module["main"])
        layers = float_layers(graph, self.schemes)
        pairs = [pair for pair in find_pairs(graph, layers) if pair.bound is None]
        sweeps = max((config.sweeps for config in self.schemes.values()), default=0)
        for _ in range(sweeps):
            changes = [_equalize(pair) for pair in pairs]
            if not any(changes):
                break
        module = module.clone()
        module["main"] = write_layers(graph, layers)
        return relax.transform.Normalize()(module)


def _equalize(pair: LayerPair) -> bool:
    """Scale the channels between two layers; whether anything still changed by over 0.1 %."""
    above = output_ranges(pair.first.weight, pair.first.call)
    below = input_ranges(pair.second.weight, pair.second.call)
    if above.shape != below.shape:  # e.g. a matmul that reads flattened positions
        return False
    scales = 1.0 / equalizing_scales(above, below)
    pair.scale(scales)
    return bool(np.abs(np.log(scales)).max(initial=0.0) > 1e-3)
