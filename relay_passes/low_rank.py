"""conv(x, w) => conv(conv(x, u), v), perhaps + conv(x, s); matmul(x, w) => matmul(matmul(x, u), v)

A layer becomes two to four smaller ones, whose product is nearest to its weight or to its outputs
on the calibration data (`numerics/low_rank.py` names the papers), and perhaps a sparse one of what
they lose, beside them. The last one keeps the layer's name (with a sparse one: their sum), the
others are called NAME_part1, NAME_part2, NAME_residual: later steps work on them as on any layer. A
layer whose parts would take as many multiply-accumulates as itself, or be a loss on the target,
stays whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from .costs import LayerCosts
from .graph import Graph, rebuild
from .low_rank_config import LowRankConfig
from .low_rank_parts import Part, call_of, fit, kernels_of
from .low_rank_ranks import Candidate, candidates, choose_ranks
from .numerics.low_rank_residual import split_with_residual
from .numerics.statistics import Statistics
from .observations import Observations
from .patches import weight_of_matrix
from .weight_layers import weight_layers

LOW_RANK_ATTR = "tvm_compress.low_rank"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """The layers that one becomes; `kernels` [H, W, I / groups, O], `residual` as the layer's
    weight."""

    parts: list[Part]
    kernels: list[Array]
    residual: NDArray[np.float32] | None


@tvm.transform.module_pass(opt_level=0, name="LowRank")
class LowRank:
    """Split the convolutions and linear layers in `schemes`.

    `statistics` holds what `observe` lists, gathered on this very module; `costs` says what layers
    take on the target. What became of each layer is in the attribute `tvm_compress.low_rank` of
    `main` (JSON: layer => words). Raises `DataError` when statistics are missing.
    """

    def __init__(
        self,
        schemes: Mapping[str, LowRankConfig],
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
        builder = relax.BlockBuilder()
        before: dict[relax.Var, list[relax.VarBinding]] = {}
        replace: dict[relax.Var, tvm.ir.Expr] = {}
        notes = read_low_rank(module)
        found = candidates(weight_layers(graph, self.schemes), self.statistics, self.costs)
        for candidate, rank in zip(found, choose_ranks(found), strict=True):
            note = f"whole: {rank}" if isinstance(rank, str) else _words(candidate, rank)
            for variable in candidate.layer.variables:
                notes[variable.name] = note
            if isinstance(rank, str):
                continue
            split = _split(candidate, rank)
            for variable in candidate.layer.variables:
                bindings = _bindings(graph.values[variable], split, variable, builder)
                before[variable] = bindings[:-1]
                replace[variable] = bindings[-1].value
        module = module.clone()
        main = rebuild(graph.function, replace=replace, before=before)
        module["main"] = main.with_attr(LOW_RANK_ATTR, json.dumps(notes))
        return relax.transform.Normalize()(module)


def observe(module: tvm.IRModule, schemes: Mapping[str, LowRankConfig]) -> Observations | None:
    """X·Xᵀ of the layers that are split for the data."""
    layers = weight_layers(Graph(module["main"]), schemes)
    names = [v.name for layer in layers if layer.config.data_aware for v in layer.variables]
    return Observations(second_moments=frozenset(names)) if names else None


def read_low_rank(module: tvm.IRModule) -> dict[str, str]:
    """Layer => rank and form, or why it is whole, in words, of all steps `lowrank` so far."""
    attributes = module["main"].attrs or {}
    if LOW_RANK_ATTR not in attributes:
        return {}
    return {str(k): str(v) for k, v in json.loads(str(attributes[LOW_RANK_ATTR])).items()}


def _words(candidate: Candidate, rank: int) -> str:
    form = candidate.form.replace("_", " ")
    words = f"{form}, rank {rank} of {candidate.largest}"
    if candidate.pattern is not None and candidate.layer.config.residual is not None:
        zeros = 100 * candidate.layer.config.residual.sparsity
        words += f" + {candidate.pattern.words} {zeros:.0f} % zeros"
    return words


def _split(candidate: Candidate, rank: int) -> Split:
    """Each group by itself; the parts then stand side by side along the outputs."""
    layer, residual = candidate.layer, candidate.layer.config.residual
    kernels: list[list[Array]] = []
    rests: list[Array] = []
    for kernel, hessian in zip(kernels_of(layer), candidate.hessians(), strict=True):

        def fitted(
            weight: Array, shape: tuple[int, ...] = kernel.shape, metric: Array | None = hessian
        ) -> tuple[list[Array], Array]:
            near = weight.reshape(shape)
            found, product = fit(candidate.form, near, rank, candidate.multiple, metric)
            return found, product.reshape(weight.shape)

        flat = kernel.reshape(-1, kernel.shape[3])
        if candidate.pattern is None or residual is None:
            kernels.append(fitted(flat)[0])
            continue
        found, rest = split_with_residual(
            flat, fitted, candidate.pattern, residual.sparsity, hessian
        )
        kernels.append(found)
        rests.append(rest.T)
    weight = None
    if rests:
        shape = layer.weight.shape
        weight = weight_of_matrix(np.stack(rests), layer.call, shape).astype(np.float32)
    joined = [np.concatenate(group, axis=3) for group in zip(*kernels, strict=True)]
    return Split(candidate.parts(rank), joined, weight)


def _bindings(
    call: relax.Call, split: Split, variable: relax.Var, builder: relax.BlockBuilder
) -> list[relax.VarBinding]:
    """The parts as bindings, the last one of `variable` itself."""
    kind = relax.DataflowVar if isinstance(variable, relax.DataflowVar) else relax.Var
    bindings: list[relax.VarBinding] = []

    def bind(value: tvm.ir.Expr, name: str) -> relax.Var:
        value = builder.normalize(value)
        bindings.append(relax.VarBinding(kind(name, value.ty), value))
        return bindings[-1].var

    source = call.args[0]
    for number, (part, kernel) in enumerate(zip(split.parts, split.kernels, strict=True), 1):
        source = bind(call_of(call, part, kernel, source), f"{variable.name}_part{number}")
    if split.residual is not None:
        arguments = [call.args[0], relax.const(split.residual)]
        sparse = relax.Call(call.op, arguments, call.attrs, call.ty_args)
        bind(relax.op.add(source, bind(sparse, f"{variable.name}_residual")), variable.name)
    last = bindings.pop()
    return [*bindings, relax.VarBinding(variable, last.value)]
