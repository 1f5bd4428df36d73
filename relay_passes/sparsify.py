"""conv(x, w) + b => conv(x, w') + b' with zeros in w', the others moved to make up for them

The weight stays a dense constant: every later pass works on it as on any other, zeros survive
symmetric quantisation, and the module runs anywhere. `PackWeights` looks at the zeros, wherever
they came from, and takes a kernel that skips them where the target has one that pays.

`stages` splits a step: each stage's statistics are gathered behind the layers of those before, and
its layers make up for what those lost (`numerics/least_squares.py`).

Sources by criterion: `numerics/saliency.py` and `numerics/second_order.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import tvm
from numpy.typing import NDArray

from .costs import LayerCosts
from .graph import Graph
from .ir import noted_words
from .layer_spec import layer_spec
from .numerics.statistics import Statistics
from .observations import Observations
from .patches import weight_matrix
from .sparse_layers import Layer, Pruned, pattern_of, prune, sparse_layers, with_weights
from .sparsify_config import SparsifyConfig
from .sparsity_shares import decide
from .weight_layers import in_stages

SPARSIFIED_ATTR = "tvm_compress.sparsified"


@tvm.transform.module_pass(opt_level=0, name="Sparsify")
class Sparsify:
    """Set weights of the layers in `schemes` to zero.

    `statistics` holds what `observe` lists, gathered on this very module. Left alone: transposed
    convolutions, weights with a batch axis or already compressed, and layers that do not have the
    pattern. With `scope: sensitivity` each layer's sparsity has to be found before
    (`sparsity_shares.decide`). What each layer got is in the attribute `tvm_compress.sparsified` of
    `main` (JSON: layer => pattern and share of zeros). Raises `DataError` when statistics are
    missing.
    """

    def __init__(
        self,
        schemes: Mapping[str, SparsifyConfig],
        statistics: Statistics,
        costs: LayerCosts | None = None,
    ) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics
        self.costs = costs

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        schemes = decide(module, self.schemes, self.statistics, costs=self.costs)
        notes = read_sparsified(module)
        pruned: list[tuple[Layer, Pruned]] = []
        for layer in sparse_layers(Graph(module["main"]), schemes):
            found = prune(layer, self.statistics)
            reason = self._why_dense(layer, found.weight)
            if reason:
                notes |= {variable.name: f"dense: {reason}" for variable in layer.variables}
                continue
            pruned.append((layer, found))
            zeros = 1 - np.count_nonzero(found.weight) / found.weight.size
            words = f"{pattern_of(layer).words} {100 * zeros:.0f} % zeros"
            notes |= {variable.name: words for variable in layer.variables}
        module = with_weights(module, pruned)
        module["main"] = module["main"].with_attr(SPARSIFIED_ATTR, json.dumps(notes))
        return module

    def _why_dense(self, layer: Layer, weight: NDArray[np.float32]) -> str:
        """Why the layer had better stay as it was on the target; empty: it does not."""
        spec = None if self.costs is None else layer_spec(layer.call)
        if self.costs is None or spec is None or layer.config.insist:
            return ""
        kept = weight_matrix(weight, layer.call).transpose(0, 2, 1) != 0
        comparison = self.costs.sparse(layer.name, spec, kept)
        if comparison.best != "dense":
            return ""
        # The kernel's form need not be the pattern: 2:4 is stored as blocks, for one.
        return f"zeros ({pattern_of(layer).words}) gain nothing: {comparison.words}"


def stages(
    module: tvm.IRModule, schemes: Mapping[str, SparsifyConfig]
) -> list[dict[str, SparsifyConfig]]:
    """`schemes` in parts, in the order of the graph, each to be applied behind those before."""
    layers = [
        layer
        for layer in sparse_layers(Graph(module["main"]), schemes)
        if layer.config.reconstructs
    ]
    return in_stages(layers, schemes)


def observe(module: tvm.IRModule, schemes: Mapping[str, SparsifyConfig]) -> Observations | None:
    """X·Xᵀ of the layers whose criterion or reconstruction needs it."""
    layers = sparse_layers(Graph(module["main"]), schemes)
    names = [v.name for layer in layers if layer.config.needs_data for v in layer.variables]
    return Observations(second_moments=frozenset(names)) if names else None


def read_sparsified(module: tvm.IRModule) -> dict[str, str]:
    """Layer => pattern and zeros in words, of all steps `sparsify` so far."""
    return noted_words(module, SPARSIFIED_ATTR)
