"""conv(x, w) => conv(x, w') with zeros in w', the others moved to make up for them

The weight stays a dense constant: every later pass works on it as on any other, zeros survive
symmetric quantisation, and the module runs anywhere. `PackWeights` looks at the zeros, wherever
they came from, and takes a kernel that skips them where the target has one that pays.

Sources by criterion: `numerics/saliency.py` and `numerics/second_order.py`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..errors import DataError
from .graph import Graph, rebuild
from .ir import shape_of
from .numerics import saliency
from .numerics.second_order import damped, prune_greedily, prune_in_order, reconstruct
from .numerics.sparsity_pattern import Block, KernelShape, SemiStructured, SparsityPattern
from .numerics.statistics import Statistics
from .observations import Observations
from .op_kinds import ANCHORS
from .patches import patch_shape, weight_matrix, weight_of_matrix
from .sparsify_config import SparsifyConfig

SPARSIFIED_ATTR = "tvm_compress.sparsified"

# Operations of the greedy solver beyond which inputs are decided in order: about a minute.
_GREEDY_OPERATIONS = 2e12
# Updates of the prices for a group of outputs, whatever the number of inputs.
_GREEDY_UPDATES = 64


@dataclass
class _Layer:
    """Calls that share one weight (the steps of a loop are several)."""

    variables: list[relax.Var]
    call: relax.Call
    weight: NDArray[np.float32]
    config: SparsifyConfig
    pattern: SparsityPattern

    @property
    def name(self) -> str:
        return self.variables[0].name

    def matrices(self) -> NDArray[np.float64]:
        """[groups, K, N]."""
        return weight_matrix(self.weight, self.call).astype(np.float64).transpose(0, 2, 1)


@tvm.transform.module_pass(opt_level=0, name="Sparsify")
class Sparsify:
    """Set weights of the layers in `schemes` to zero.

    `statistics` holds what `observe` lists, gathered on this very module. Left alone: transposed
    convolutions, weights with a batch axis or already compressed, and layers that do not have the
    pattern. What each layer got is in the attribute `tvm_compress.sparsified` of `main` (JSON:
    layer => pattern and share of zeros). Raises `DataError` when statistics are missing.
    """

    def __init__(self, schemes: Mapping[str, SparsifyConfig], statistics: Statistics) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        graph = Graph(module["main"])
        layers = _layers(graph, self.schemes)
        sparsities = _network_sparsities(layers, self.statistics)
        replace: dict[relax.Var, tvm.ir.Expr] = {}
        notes = read_sparsified(module)
        for layer in layers:
            weight = _sparsified(layer, sparsities.get(layer.name), self.statistics)
            for variable in layer.variables:
                call = graph.values[variable]
                arguments = [call.args[0], relax.const(weight), *call.args[2:]]
                replace[variable] = relax.Call(call.op, arguments, call.attrs, call.ty_args)
                zeros = 1 - np.count_nonzero(weight) / weight.size
                notes[variable.name] = f"{layer.pattern.words} {100 * zeros:.0f} % zeros"
        main = rebuild(graph.function, replace=replace)
        module = module.clone()
        module["main"] = main.with_attr(SPARSIFIED_ATTR, json.dumps(notes))
        return relax.transform.Normalize()(module)


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


def _layers(graph: Graph, schemes: Mapping[str, SparsifyConfig]) -> list[_Layer]:
    by_weight: dict[bytes, _Layer] = {}
    for variable, call in graph.values.items():
        if variable.name not in schemes or graph.op(variable) not in ANCHORS:
            continue
        weight = graph.constant(call.args[1])
        if weight is None or weight.dtype != np.float32:
            continue
        shape = patch_shape(call, shape_of(call.args[1]) or ())
        if shape is None:
            continue
        config = schemes[variable.name]
        pattern = config.pattern.of_layer(int(np.prod(shape.kernel)))
        outputs = weight_matrix(weight, call).shape[1]
        if pattern is None or (outputs == 1 and getattr(pattern, "outputs", 1) > 1):
            continue
        # The steps of an unrolled loop share their weight and must go on sharing it.
        key = weight.tobytes() + repr((weight.shape, config)).encode()
        if key in by_weight:
            by_weight[key].variables.append(variable)
        else:
            by_weight[key] = _Layer([variable], call, weight, config, pattern)
    return list(by_weight.values())


def _moments(
    layer: _Layer, statistics: Statistics
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """(X·Xᵀ [G, K, K], mean [G, K], count) over all calls of the layer."""
    found = [statistics.moments.get(variable.name) for variable in layer.variables]
    seconds = [None if item is None else item.second for item in found]
    if any(second is None for second in seconds):
        raise DataError(
            f"the calibration statistics lack X·Xᵀ of layer {layer.name!r}; calibrate the module "
            "that is made sparse, with what `sparsify.observe` lists"
        )
    counts = [item.count for item in found if item is not None]
    means = [item.mean * item.count for item in found if item is not None]
    second = np.sum([second for second in seconds if second is not None], axis=0)
    return second, np.sum(means, axis=0) / sum(counts), sum(counts)


def _scores(layer: _Layer, statistics: Statistics) -> list[NDArray[np.float64]]:
    """What each weight is worth, [K, N] for each group."""
    matrices, criterion = layer.matrices(), layer.config.criterion
    if criterion == "magnitude":
        return [saliency.magnitude(matrix) for matrix in matrices]
    second, mean, count = _moments(layer, statistics)
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


def _network_sparsities(layers: list[_Layer], statistics: Statistics) -> dict[str, float]:
    """Layer => sparsity, where one threshold serves all of a step's layers.

    A unit's worth is counted by weight, relative to the mean of its layer: a threshold on the sums
    themselves would empty layers whose weights are small all over.
    """
    by_config: dict[SparsifyConfig, list[_Layer]] = defaultdict(list)
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
            sizes = [layer.pattern.pool(np.ones(score.shape)).ravel() for score in scores]
            pooled = [layer.pattern.pool(score).ravel() for score in scores]
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


def _sparsified(
    layer: _Layer, sparsity: float | None, statistics: Statistics
) -> NDArray[np.float32]:
    config, pattern = layer.config, layer.pattern
    share = sparsity if sparsity is not None else config.sparsity
    if share is None:
        assert isinstance(pattern, (SemiStructured, KernelShape))
        share = pattern.sparsity
    matrices = layer.matrices()
    if config.criterion == "second_order":
        second, _, _ = _moments(layer, statistics)
        pruned = [
            _second_order(matrix, damped(xx), pattern, share)
            for matrix, xx in zip(matrices, second, strict=True)
        ]
    else:
        kept = [pattern.choose(scores, share) for scores in _scores(layer, statistics)]
        pruned = [matrix * mask for matrix, mask in zip(matrices, kept, strict=True)]
        if config.reconstruct:
            second, _, _ = _moments(layer, statistics)
            pruned = [
                reconstruct(matrix, damped(xx), mask)
                for matrix, xx, mask in zip(matrices, second, kept, strict=True)
            ]
    rows = np.stack(pruned).transpose(0, 2, 1)  # [G, N, K]
    return weight_of_matrix(rows, layer.call, layer.weight.shape).astype(np.float32)


def _second_order(
    matrix: NDArray[np.float64],
    hessian: NDArray[np.float64],
    pattern: SparsityPattern,
    sparsity: float,
) -> NDArray[np.float64]:
    """The greedy solver where it takes about a minute at most, else the ordered one; the weights
    that are left are solved for in the end."""
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
