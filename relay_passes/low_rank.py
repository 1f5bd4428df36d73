"""conv(x, w) => conv(conv(x, u), v), perhaps + conv(x, s); matmul(x, w) => matmul(matmul(x, u), v)

A layer becomes two to four smaller ones, whose product is nearest to its weight or to its outputs
on the calibration data (`numerics/low_rank.py` names the papers), and perhaps a sparse one of what
they lose, beside them. The last one keeps the layer's name (with a sparse one: their sum), the
others are called NAME_part1, NAME_part2, NAME_residual: later steps work on them as on any layer. A
layer whose parts would take as many multiply-accumulates as itself, or be a loss on the target,
stays whole.

`stages` splits a step: the statistics of each stage are gathered behind the layers of those before,
and its layers make up for what those lost (`numerics/least_squares.py`), biases included; with
`nonlinear` for what is left of it behind their activations (`numerics/low_rank_responses.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..errors import DataError
from .biases import BiasWriter
from .costs import LayerCosts
from .graph import Graph, rebuild
from .ir import immediate, noted_words, op_name, variable_beside
from .low_rank_config import LowRankConfig, Network
from .low_rank_parts import Layer, Part, call_of, fit, product_of, weight_of
from .low_rank_ranks import Aim, Candidate, candidates, choose_ranks, splittable
from .numerics.low_rank_residual import split_with_residual
from .numerics.low_rank_responses import split_for_responses
from .numerics.statistics import Statistics
from .observations import Observations
from .placement import bias_vector
from .weight_layers import in_stages

LOW_RANK_ATTR = "tvm_compress.low_rank"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """The layers that one becomes; `kernels` [H, W, I / groups, O], `residual` as the layer's
    weight."""

    parts: list[Part]
    kernels: list[Array]
    residual: NDArray[np.float32] | None
    bias_shift: Array | None


@tvm.transform.module_pass(opt_level=0, name="LowRank")
class LowRank:
    """Split the convolutions and linear layers in `schemes`.

    `statistics` holds what `observe` lists, gathered on this very module; `costs` says what layers
    take on the target. What became of each layer is in the attribute `tvm_compress.low_rank` of
    `main` (JSON: layer => words). Raises `DataError` when statistics are missing, `RecipeError`
    where no ranks reach a total for the network, or ranks by latency have no `costs`.
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
        biases = BiasWriter(graph, module)
        splits: dict[relax.Var, Split] = {}
        notes = read_low_rank(module)
        found = candidates(splittable(graph, self.schemes), self.statistics, self.costs)
        for candidate, rank in zip(found, choose_ranks(found), strict=True):
            note = f"whole: {rank}" if isinstance(rank, str) else _words(candidate, rank)
            variables = candidate.layer.variables
            notes |= {variable.name: note for variable in variables}
            if isinstance(rank, str):
                continue
            split = _split(candidate, rank, _behind(graph, candidate.layer))
            splits |= dict.fromkeys(variables, split)
            if split.bias_shift is not None:
                biases.subtract(variables[0], split.bias_shift)
        # Biases first: a layer may read what has got one.
        graph = Graph(biases.write())
        module = module.clone()
        module["main"] = _written(graph, splits).with_attr(LOW_RANK_ATTR, json.dumps(notes))
        return relax.transform.Normalize()(module)


def _written(graph: Graph, splits: Mapping[relax.Var, Split]) -> relax.Function:
    builder = relax.BlockBuilder()
    before: dict[relax.Var, list[relax.VarBinding]] = {}
    replace: dict[relax.Var, tvm.ir.Expr] = {}
    shared: dict[int, list[relax.Constant]] = {}  # one for all steps of a loop
    for variable, split in splits.items():
        call = graph.values[variable]
        if id(split) not in shared:
            shared[id(split)] = [weight_of(call, kernel) for kernel in split.kernels]
            if split.residual is not None:
                shared[id(split)].append(relax.const(split.residual))
        bindings = _bindings(call, split, shared[id(split)], variable, builder)
        before[variable] = bindings[:-1]
        replace[variable] = bindings[-1].value
    return rebuild(graph.function, replace=replace, before=before)


def stages(
    module: tvm.IRModule, schemes: Mapping[str, LowRankConfig]
) -> list[dict[str, LowRankConfig]]:
    """`schemes` in parts, in the order of the graph, each to be applied behind those before. Layers
    whose ranks under a total nobody has decided (`low_rank_ranks.decide`) are not parted."""
    layers = splittable(Graph(module["main"]), schemes)
    return in_stages(
        [n for n in layers if n.config.data_aware and not isinstance(n.config.rank, Network)],
        schemes,
    )


def observe(module: tvm.IRModule, schemes: Mapping[str, LowRankConfig]) -> Observations | None:
    """X·Xᵀ of the layers that are split for the data, and some patches of those that an activation
    follows which counts."""
    graph = Graph(module["main"])
    layers = [layer for layer in splittable(graph, schemes) if layer.config.data_aware]
    if not layers:
        return None
    return Observations(
        second_moments=frozenset(v.name for layer in layers for v in layer.variables),
        patches={layer.name: _rows(layer) for layer in layers if _behind(graph, layer) is not None},
    )


def _rows(layer: Layer) -> int:
    """Patches to sample: some for each unknown of an output, in 64 MiB."""
    size = layer.weight.size // (layer.outputs * layer.patches.groups)
    return min(max(2048, 8 * size), (1 << 24) // (size * layer.patches.groups))


@dataclass(frozen=True)
class Behind:
    """A layer's bias [O] and what the activation behind it clips to."""

    bias: Array
    bounds: tuple[float, float]


def _behind(graph: Graph, layer: Layer) -> Behind | None:
    """Where an activation counts that follows the layer directly; None: the outputs themselves
    count."""
    if not layer.config.nonlinear or len(layer.variables) > 1:
        return None
    variable = layer.variables[0]
    bias = np.zeros(layer.outputs * layer.patches.groups)
    reader = _reader(graph, variable)
    if reader is not None and graph.op(reader) == "relax.add":
        arrays = [graph.constant(operand) for operand in graph.operands(reader)]
        array = next((item for item in arrays if item is not None), None)
        vector = None if array is None else bias_vector(array, layer.call, variable)
        if vector is None:
            return None
        bias, reader = vector.astype(np.float64), _reader(graph, reader)
    call = None if reader is None else graph.values[reader]
    name = None if call is None else op_name(call)
    if name == "relax.nn.relu":
        return Behind(bias, (0.0, np.inf))
    if name == "relax.nn.relu6":
        return Behind(bias, (0.0, 6.0))
    if name == "relax.clip" and call is not None:
        low, high = (immediate(item) for item in call.args[1:])
        if low is not None and high is not None:
            return Behind(bias, (low, high))
    return None


def _reader(graph: Graph, variable: relax.Var) -> relax.Var | None:
    """The only one."""
    readers = graph.readers[variable]
    return readers[0] if len(readers) == 1 else None


def read_low_rank(module: tvm.IRModule) -> dict[str, str]:
    """Layer => rank and form, or why it is whole, in words, of all steps `lowrank` so far."""
    return noted_words(module, LOW_RANK_ATTR)


def _words(candidate: Candidate, rank: int) -> str:
    form = candidate.form.replace("_", " ")
    words = f"{form}, rank {rank} of {candidate.largest}"
    if candidate.pattern is not None and candidate.layer.config.residual is not None:
        zeros = 100 * candidate.layer.config.residual.zeros(candidate.pattern)
        words += f" + {candidate.pattern.words} {zeros:.0f} % zeros"
    drawback = candidate.drawback(rank)
    return words if drawback is None else f"{words}; {drawback}"


def _split(candidate: Candidate, rank: int, behind: Behind | None) -> Split:
    """Each group by itself; the parts then stand side by side along the outputs."""
    layer = candidate.layer
    groups = [
        _split_group(candidate, rank, aim)
        if behind is None
        else _split_for_responses(candidate, rank, aim, behind, group)
        for group, aim in enumerate(candidate.aims())
    ]
    rests = [group.rest for group in groups if group.rest is not None]
    shifts = [group.bias_shift for group in groups if group.bias_shift is not None]
    weight = layer.with_matrices(rests) if rests else None
    joined = [
        np.concatenate(parts, axis=3)
        for parts in zip(*(group.kernels for group in groups), strict=True)
    ]
    return Split(candidate.parts(rank), joined, weight, np.concatenate(shifts) if shifts else None)


@dataclass(frozen=True)
class _Group:
    kernels: list[Array]
    rest: Array | None
    bias_shift: Array | None


def _split_group(candidate: Candidate, rank: int, aim: Aim) -> _Group:
    """Nearest to the weight or to the outputs."""
    shape = aim.kernel.shape
    flat = aim.kernel.reshape(-1, shape[3])

    def fitted(weight: Array) -> tuple[list[Array], Array]:
        near = weight.reshape(shape)
        found, product = fit(candidate.form, near, rank, candidate.multiple, aim.hessian)
        return found, product.reshape(weight.shape)

    residual, rest = candidate.layer.config.residual, None
    if candidate.pattern is None or residual is None:
        kernels, product = fitted(flat)
    else:
        kernels, rest = split_with_residual(
            flat, fitted, candidate.pattern, residual.zeros(candidate.pattern), aim.hessian
        )
        product = product_of(candidate.form, kernels).reshape(flat.shape) + rest
    shift = None if aim.problem is None else aim.problem.bias_shift(product)
    return _Group(kernels, rest, shift)


def _split_for_responses(
    candidate: Candidate, rank: int, aim: Aim, behind: Behind, group: int
) -> _Group:
    """Nearest to what is behind the activation, on a sample of the patches."""
    layer, problem = candidate.layer, aim.problem
    sample = candidate.statistics.moments[layer.name].sample
    if sample is None or problem is None or problem.mean is None or problem.output_mean is None:
        raise DataError(
            f"the calibration statistics lack patches of layer {layer.name!r}; calibrate with what "
            "`low_rank.observe` lists"
        )
    bias = behind.bias[group * layer.outputs : (group + 1) * layer.outputs]
    before = sample.inputs[group].astype(np.float64)
    plain = layer.matrices()[group]
    sums = before @ plain if sample.wanted is None else sample.wanted[group].astype(np.float64)
    start = problem.output_mean - problem.mean @ problem.best
    u, v, shift = split_for_responses(
        problem.best, bias + start, rank, before, sums + bias, behind.bounds,
        problem.hessian / candidate.statistics.moments[layer.name].count,
    )  # fmt: skip
    kernels = [u.reshape(*aim.kernel.shape[:3], rank), v[None, None]]
    return _Group(kernels, None, bias - shift)


def _bindings(
    call: relax.Call,
    split: Split,
    weights: Sequence[relax.Constant],
    variable: relax.Var,
    builder: relax.BlockBuilder,
) -> list[relax.VarBinding]:
    """The parts as bindings, the last one of `variable` itself. `weights`: the parts', then the
    residual's."""
    bindings: list[relax.VarBinding] = []

    def bind(value: tvm.ir.Expr, name: str) -> relax.Var:
        value = builder.normalize(value)
        bindings.append(relax.VarBinding(variable_beside(variable, name, value.ty), value))
        return bindings[-1].var

    source = call.args[0]
    for number, (part, weight) in enumerate(zip(split.parts, weights, strict=False), 1):
        source = bind(call_of(call, part, weight, source), f"{variable.name}_part{number}")
    if split.residual is not None:
        arguments = [call.args[0], weights[-1]]
        sparse = relax.Call(call.op, arguments, call.attrs, call.ty_args)
        bind(relax.op.add(source, bind(sparse, f"{variable.name}_residual")), variable.name)
    last = bindings.pop()
    return [*bindings, relax.VarBinding(variable, last.value)]
