"""The layers of a step `sparsify`, and their new weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from .numerics.second_order import GreedyRemoval, prune_in_order, reconstruct
from .numerics.sparsity_pattern import Block, KernelShape, SemiStructured, SparsityPattern
from .numerics.statistics import Statistics
from .sparsify_config import BLOCKS, SparsifyConfig
from .weight_layers import WeightLayer, weight_layers

# Operations of the greedy solver beyond which inputs are decided in order: about a minute.
_GREEDY_OPERATIONS = 2e12
# Updates of the prices for a group of outputs, whatever the number of inputs.
_GREEDY_UPDATES = 64

Layer = WeightLayer[SparsifyConfig]


def sparse_layers(graph: Graph, schemes: Mapping[str, SparsifyConfig]) -> list[Layer]:
    """Those that have the pattern asked for."""
    return [layer for layer in weight_layers(graph, schemes) if _pattern(layer) is not None]


def with_patterns(
    module: tvm.IRModule, schemes: Mapping[str, SparsifyConfig], costs: LayerCosts | None
) -> dict[str, SparsifyConfig]:
    """`schemes` with the blocks that the target's kernels like best where they name no pattern."""
    found = dict(schemes)
    for layer in sparse_layers(Graph(module["main"]), schemes):
        spec = layer_spec(layer.call)
        if layer.config.pattern is not None or costs is None or spec is None:
            continue
        blocks = costs.blocks(layer.name, spec)
        if blocks:
            config = replace(layer.config, pattern=Block(blocks[0], 1))
            found |= {variable.name: config for variable in layer.variables}
    return found


def _pattern(layer: Layer) -> SparsityPattern | None:
    """The pattern as it is for a layer; None: the layer has none."""
    return layer.pattern(layer.config.pattern or BLOCKS)


def pattern_of(layer: Layer) -> SparsityPattern:
    pattern = _pattern(layer)
    assert pattern is not None
    return pattern


def scores_of(layer: Layer, statistics: Statistics) -> list[NDArray[np.float64]]:
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


@dataclass(frozen=True, eq=False)
class Pruned:
    """A layer's new weight."""

    weight: NDArray[np.float32]
    bias_shift: NDArray[np.float64] | None
    """To be taken off the bias, [O]."""
    prices: NDArray[np.float64]
    """What each unit of the pattern is worth, those that go first in front; in a unit of the
    layer's own."""


def prune(layer: Layer, statistics: Statistics) -> Pruned:
    """Zeros where the layer's config wants them, and the other weights moved."""
    config, pattern = layer.config, pattern_of(layer)
    share = config.sparsity
    if share is None:
        assert isinstance(pattern, (SemiStructured, KernelShape))
        share = pattern.sparsity
    problems = layer.problems(statistics) if config.reconstructs else None
    if config.criterion == "second_order":
        assert problems is not None
        found = [_second_order(problem, pattern, share) for problem in problems]
        kept, prices = [mask for mask, _ in found], [price for _, price in found]
    else:
        scores = scores_of(layer, statistics)
        kept = [pattern.choose(score, share) for score in scores]
        prices = [pattern.pool(score).ravel() for score in scores]
    if problems is None:
        pruned = [w * mask for w, mask in zip(layer.matrices(), kept, strict=True)]
    else:
        pruned = [
            reconstruct(problem.best, problem.hessian, mask)
            for problem, mask in zip(problems, kept, strict=True)
        ]
    shift = None if problems is None else _bias_shift(problems, pruned)
    return Pruned(layer.with_matrices(pruned), shift, np.sort(np.concatenate(prices)))


def with_weights(
    module: tvm.IRModule, layers: Sequence[tuple[WeightLayer[Any], Pruned]]
) -> tvm.IRModule:
    """`module`, whose layers these are, with their new weights and biases."""
    graph = Graph(module["main"])
    biases = BiasWriter(graph, module)
    replace: dict[relax.Var, tvm.ir.Expr] = {}
    for layer, pruned in layers:
        if pruned.bias_shift is not None:
            biases.subtract(layer.variables[0], pruned.bias_shift)
        # One for all: that is how later passes see a loop.
        constant = relax.const(pruned.weight)
        for variable in layer.variables:
            call = graph.values[variable]
            arguments = [call.args[0], constant, *call.args[2:]]
            replace[variable] = relax.Call(call.op, arguments, call.attrs, call.ty_args)
    module = module.clone()
    module["main"] = biases.write(replace)
    return relax.transform.Normalize()(module)


def _bias_shift(
    problems: list[LeastSquares], weights: list[NDArray[np.float64]]
) -> NDArray[np.float64] | None:
    pairs = zip(problems, weights, strict=True)
    shifts = [problem.bias_shift(weight) for problem, weight in pairs]
    found = [shift for shift in shifts if shift is not None]
    return np.concatenate(found) if found else None


def _second_order(
    problem: LeastSquares, pattern: SparsityPattern, sparsity: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(kept, prices of units): by the greedy solver where it takes about a minute at most, else by
    the ordered one."""
    matrix, hessian = problem.best, problem.hessian
    size = len(matrix)
    if isinstance(pattern, (Block, SemiStructured)):
        groups = -(-matrix.shape[1] // pattern.outputs)
        if groups * float(size) ** 3 <= _GREEDY_OPERATIONS:
            removal = GreedyRemoval(matrix, hessian, pattern, max(1, size // _GREEDY_UPDATES))
            return removal.kept(sparsity), removal.costs
    scores = matrix**2 / np.diag(np.linalg.inv(hessian))[:, None]
    if isinstance(pattern, (Block, SemiStructured)):
        kept = prune_in_order(matrix, hessian, pattern, sparsity)[1]
    else:
        kept = pattern.choose(scores, sparsity)
    return kept, pattern.pool(scores).ravel()
