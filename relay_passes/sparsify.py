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
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from .biases import BiasWriter
from .costs import LayerCosts
from .graph import Graph
from .layer_spec import layer_spec
from .numerics import saliency
from .numerics.least_squares import LeastSquares
from .numerics.second_order import prune_greedily, prune_in_order, reconstruct
from .numerics.sparsity_pattern import Block, KernelShape, SemiStructured, SparsityPattern
from .numerics.statistics import Statistics
from .observations import Observations
from .patches import weight_matrix, weight_of_matrix
from .sparsify_config import SparsifyConfig
from .weight_layers import WeightLayer, weight_layers

SPARSIFIED_ATTR = "tvm_compress.sparsified"

# Operations of the greedy solver beyond which inputs are decided in order: about a minute.
_GREEDY_OPERATIONS = 2e12
# Updates of the prices for a group of outputs, whatever the number of inputs.
_GREEDY_UPDATES = 64
# Parts of a step that calibration runs between: each is two inferences a sample.
STAGES = 24

Layer = WeightLayer[SparsifyConfig]


@tvm.transform.module_pass(opt_level=0, name="Sparsify")
class Sparsify:
    """Set weights of the layers in `schemes` to zero.

    `statistics` holds what `observe` lists, gathered on this very module. Left alone: transposed
    convolutions, weights with a batch axis or already compressed, and layers that do not have the
    pattern. What each layer got is in the attribute `tvm_compress.sparsified` of `main` (JSON:
    layer => pattern and share of zeros). Raises `DataError` when statistics are missing.
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
        graph = Graph(module["main"])
        layers = _layers(graph, self.schemes)
        sparsities = _network_sparsities(layers, self.statistics)
        biases = BiasWriter(graph, module)
        replace: dict[relax.Var, tvm.ir.Expr] = {}
        notes = read_sparsified(module)
        for layer in layers:
            pruned = _sparsified(layer, sparsities.get(layer.name), self.statistics)
            reason = self._why_dense(layer, pruned.weight)
            if reason:
                notes |= {variable.name: f"dense: {reason}" for variable in layer.variables}
                continue
            if pruned.bias_shift is not None:
                biases.subtract(layer.variables[0], pruned.bias_shift)
            # One for all: that is how later passes see a loop.
            constant = relax.const(pruned.weight)
            for variable in layer.variables:
                call = graph.values[variable]
                arguments = [call.args[0], constant, *call.args[2:]]
                replace[variable] = relax.Call(call.op, arguments, call.attrs, call.ty_args)
                zeros = 1 - np.count_nonzero(pruned.weight) / pruned.weight.size
                notes[variable.name] = f"{_pattern_of(layer).words} {100 * zeros:.0f} % zeros"
        module = module.clone()
        module["main"] = biases.write(replace).with_attr(SPARSIFIED_ATTR, json.dumps(notes))
        return relax.transform.Normalize()(module)

    def _why_dense(self, layer: Layer, weight: NDArray[np.float32]) -> str:
        """Why the layer had better stay as it was on the target; empty: it does not."""
        spec = None if self.costs is None else layer_spec(layer.call)
        if self.costs is None or spec is None or layer.config.insist:
            return ""
        kept = weight_matrix(weight, layer.call).transpose(0, 2, 1) != 0
        comparison = self.costs.sparse(layer.name, spec, kept)
        return "" if comparison.pays else comparison.words


def stages(
    module: tvm.IRModule, schemes: Mapping[str, SparsifyConfig]
) -> list[dict[str, SparsifyConfig]]:
    """`schemes` in parts, in the order of the graph, each to be applied behind those before."""
    layers = [
        layer for layer in _layers(Graph(module["main"]), schemes) if layer.config.reconstructs
    ]
    if not layers:
        return [dict(schemes)]
    names = [[variable.name for variable in layer.variables] for layer in layers]
    bounds = np.linspace(0, len(names), min(len(names), STAGES) + 1).round().astype(int)
    parts = [
        {name: schemes[name] for group in names[start:end] for name in group}
        for start, end in pairwise(bounds)
    ]
    in_parts = {name for part in parts for name in part}
    parts[0] |= {name: item for name, item in schemes.items() if name not in in_parts}
    return parts


def observe(module: tvm.IRModule, schemes: Mapping[str, SparsifyConfig]) -> Observations | None:
    """X·Xᵀ of the layers whose criterion or reconstruction needs it."""
    layers = _layers(Graph(module["main"]), schemes)
    names = [v.name for layer in layers if layer.config.needs_data for v in layer.variables]
    return Observations(second_moments=frozenset(names)) if names else None


def read_sparsified(module: tvm.IRModule) -> dict[str, str]:
    """Layer => pattern and zeros in words, of all steps `sparsify` so far."""
    attributes = module["main"].attrs or {}
    if SPARSIFIED_ATTR not in attributes:
        return {}
    return {str(k): str(v) for k, v in json.loads(str(attributes[SPARSIFIED_ATTR])).items()}


def _layers(graph: Graph, schemes: Mapping[str, SparsifyConfig]) -> list[Layer]:
    """Those that have the pattern asked for."""
    return [layer for layer in weight_layers(graph, schemes) if _pattern(layer) is not None]


def _pattern(layer: Layer) -> SparsityPattern | None:
    """The pattern as it is for a layer's kernel; None: it has none, or too few outputs for it."""
    pattern = layer.config.pattern.of_layer(int(np.prod(layer.patches.kernel)))
    return pattern if layer.outputs > 1 or getattr(pattern, "outputs", 1) == 1 else None


def _pattern_of(layer: Layer) -> SparsityPattern:
    pattern = _pattern(layer)
    assert pattern is not None
    return pattern


def _scores(layer: Layer, statistics: Statistics) -> list[NDArray[np.float64]]:
    """What each weight is worth, [K, N] for each group."""
    matrices, criterion = layer.matrices(), layer.config.criterion
    if criterion == "magnitude":
        return [saliency.magnitude(matrix) for matrix in matrices]
    second, mean, count = layer.moments(statistics)
    if criterion == "diagonal_hessian":
        pairs = zip(matrices, second, strict=True)
        return [saliency.diagonal_hessian(matrix, xx) for matrix, xx in pairs]
    if criterion == "activation_aware":
        pairs = zip(matrices, second, strict=True)
        return [saliency.activation_aware(matrix, xx) for matrix, xx in pairs]
    assert criterion == "output_correlation"
    return [
        saliency.output_correlation(matrix, xx, x, count)
        for matrix, xx, x in zip(matrices, second, mean, strict=True)
    ]


def _network_sparsities(layers: list[Layer], statistics: Statistics) -> dict[str, float]:
    """Layer => sparsity, where one threshold serves all of a step's layers.

    A unit's worth is counted by weight, relative to the mean of its layer: a threshold on the sums
    themselves would empty layers whose weights are small all over.
    """
    by_config: dict[SparsifyConfig, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.config.scope == "network":
            by_config[layer.config].append(layer)
    found = {}
    for config, members in by_config.items():
        assert config.sparsity is not None
        units, weights = [], []
        for layer in members:
            scores = _scores(layer, statistics)
            mean = max(float(np.mean([score.mean() for score in scores])), 1e-300)
            sizes = [_pattern_of(layer).pool(np.ones(score.shape)).ravel() for score in scores]
            pooled = [_pattern_of(layer).pool(score).ravel() for score in scores]
            units.append(np.concatenate(pooled) / np.concatenate(sizes) / mean)
            weights.append(np.concatenate(sizes))
        order = np.argsort(np.concatenate(units), kind="stable")
        gone = np.cumsum(np.concatenate(weights)[order])
        removed = np.zeros(len(order), bool)
        removed[order[gone <= config.sparsity * gone[-1]]] = True
        ends = np.cumsum([len(unit) for unit in units])[:-1]
        for layer, part in zip(members, np.split(removed, ends), strict=True):
            found[layer.name] = float(part.mean())
    return found


@dataclass(frozen=True, eq=False)
class _Pruned:
    weight: NDArray[np.float32]
    bias_shift: NDArray[np.float64] | None
    """To be taken off the bias, [O]."""


def _sparsified(layer: Layer, sparsity: float | None, statistics: Statistics) -> _Pruned:
    config, pattern = layer.config, _pattern_of(layer)
    share = sparsity if sparsity is not None else config.sparsity
    if share is None:
        assert isinstance(pattern, (SemiStructured, KernelShape))
        share = pattern.sparsity
    problems = layer.problems(statistics) if config.reconstructs else None
    if config.criterion == "second_order":
        assert problems is not None
        pruned = [_second_order(problem, pattern, share) for problem in problems]
    else:
        kept = [pattern.choose(scores, share) for scores in _scores(layer, statistics)]
        if problems is None:
            pruned = [w * mask for w, mask in zip(layer.matrices(), kept, strict=True)]
        else:
            pruned = [
                reconstruct(problem.best, problem.hessian, mask)
                for problem, mask in zip(problems, kept, strict=True)
            ]
    rows = np.stack(pruned).transpose(0, 2, 1)  # [G, N, K]
    weight = weight_of_matrix(rows, layer.call, layer.weight.shape).astype(np.float32)
    return _Pruned(weight, None if problems is None else _bias_shift(problems, pruned))


def _bias_shift(
    problems: list[LeastSquares], weights: list[NDArray[np.float64]]
) -> NDArray[np.float64] | None:
    pairs = zip(problems, weights, strict=True)
    shifts = [problem.bias_shift(weight) for problem, weight in pairs]
    found = [shift for shift in shifts if shift is not None]
    return np.concatenate(found) if found else None


def _second_order(
    problem: LeastSquares, pattern: SparsityPattern, sparsity: float
) -> NDArray[np.float64]:
    """The greedy solver where it takes about a minute at most, else the ordered one; the weights
    that are left are solved for in the end."""
    matrix, hessian = problem.best, problem.hessian
    size = len(matrix)
    if isinstance(pattern, (Block, SemiStructured)):
        groups = -(-matrix.shape[1] // pattern.outputs)
        if groups * float(size) ** 3 <= _GREEDY_OPERATIONS:
            together = max(1, size // _GREEDY_UPDATES)
            return prune_greedily(matrix, hessian, pattern, sparsity, together)[0]
        _, kept = prune_in_order(matrix, hessian, pattern, sparsity)
        return reconstruct(matrix, hessian, kept)
    scores = matrix**2 / np.diag(np.linalg.inv(hessian))[:, None]
    return reconstruct(matrix, hessian, pattern.choose(scores, sparsity))
