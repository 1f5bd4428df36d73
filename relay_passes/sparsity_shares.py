"""Which sparsity each layer gets where a step gives one for several layers together.

`scope: network` compares what weights are worth, `scope: sensitivity` measures what the network's
outputs lose when one layer alone is pruned (Han et al. 2015, "Learning both Weights and Connections
for Efficient Neural Networks", section 4.2) and spends the total where it costs least.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import tvm

from ..errors import DataError
from .costs import LayerCosts
from .graph import Graph
from .ir import shape_of
from .numerics.sparsity_budget import loss_prices, split_sparsity
from .numerics.statistics import Statistics
from .sparse_layers import (
    Layer,
    pattern_of,
    prune,
    scores_of,
    sparse_layers,
    with_patterns,
    with_weights,
)
from .sparsify_config import SparsifyConfig

Loss = Callable[[tvm.IRModule], float]


def undecided(schemes: Mapping[str, SparsifyConfig]) -> dict[str, SparsifyConfig]:
    """Those whose sparsity is that of several layers together."""
    return {name: item for name, item in schemes.items() if item.scope != "layer"}


def decide(
    module: tvm.IRModule,
    schemes: Mapping[str, SparsifyConfig],
    statistics: Statistics,
    loss: Loss | None = None,
    costs: LayerCosts | None = None,
) -> dict[str, SparsifyConfig]:
    """`schemes` with a pattern and a sparsity for each layer; without the layers that get no
    zeros.

    `statistics`: what `sparsify.observe` lists for the undecided ones. `loss`: how far the outputs
    of a module are from those of this one; only `scope: sensitivity` needs it. `costs` know the
    patterns that the target likes. Raises `DataError` without.
    """
    open_ones = undecided(schemes)
    schemes = with_patterns(module, schemes, costs)
    decided = dict(schemes)
    groups: dict[SparsifyConfig, list[Layer]] = defaultdict(list)
    patterned = {name: schemes[name] for name in open_ones}
    for layer in sparse_layers(Graph(module["main"]), patterned):
        groups[open_ones[layer.name]].append(layer)
    for name in open_ones:
        del decided[name]
    for config, layers in groups.items():
        assert config.sparsity is not None
        if config.scope == "sensitivity":
            if loss is None:
                raise DataError(
                    "sparsify with scope: sensitivity measures losses on calibration data; give "
                    "some (--calib)"
                )
            prices = [_measured(module, layer, statistics, loss) for layer in layers]
        else:
            prices = [_relative(layer, statistics) for layer in layers]
        weights = [_counted(layer) for layer in layers]
        shares = split_sparsity(prices, weights, config.sparsity)
        for layer, share in zip(layers, shares, strict=True):
            if share > 0:
                own = replace(
                    layer.config, scope="layer", total="weights", sparsity=min(share, 1 - 1e-9)
                )
                decided |= {variable.name: own for variable in layer.variables}
    return decided


def _measured(module: tvm.IRModule, layer: Layer, statistics: Statistics, loss: Loss) -> np.ndarray:
    """Prices of the layer's units in what the network's outputs lose."""
    assert layer.config.sparsity is not None
    pruned = prune(layer, statistics)
    trial = with_weights(module, [(layer, pruned)])
    return loss_prices(pruned.prices, layer.config.sparsity, loss(trial))


def _relative(layer: Layer, statistics: Statistics) -> np.ndarray:
    """A unit's worth is counted by weight, relative to the mean of its layer: a threshold on the
    sums themselves would empty layers whose weights are small all over."""
    scores, pattern = scores_of(layer, statistics), pattern_of(layer)
    mean = max(float(np.mean([score.mean() for score in scores])), 1e-300)
    by_weight = [pattern.pool(score) / pattern.pool(np.ones(score.shape)) for score in scores]
    prices = np.sort(np.concatenate([price.ravel() for price in by_weight]))
    return np.asarray(prices / mean * _counted(layer) / len(prices))


def _counted(layer: Layer) -> float:
    """What the layer counts in the total: weights, or the multiplications with them."""
    if layer.config.total == "weights":
        return float(layer.weight.size)
    positions = sum(
        np.prod(shape_of(variable) or ()) / (layer.outputs * layer.patches.groups)
        for variable in layer.variables
    )
    return float(layer.weight.size * positions)
