"""conv(x, w) => conv(conv(x, u), v); matmul(x, w) => matmul(matmul(x, u), v)

A layer becomes two to four smaller ones, whose product is nearest to its weight or to its outputs
on the calibration data (`numerics/low_rank.py` names the papers). The last one keeps the layer's
name, the others are called NAME_part1, NAME_part2: later steps work on them as on any layer. A
layer whose parts would take as many multiply-accumulates as itself stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from .costs import LayerCosts
from .encodings import kernel_order
from .graph import Graph, rebuild
from .ir import ints, op_name
from .low_rank_config import Energy, LowRankConfig, Operations
from .numerics.low_rank import (
    canonical_polyadic,
    rank_for_energy,
    split_matrix,
    split_rows_and_columns,
    tucker2,
)
from .numerics.second_order import damped
from .numerics.statistics import Statistics
from .observations import Observations
from .quantize_weights import weight_layout
from .weight_layers import WeightLayer, weight_layers

Layer = WeightLayer[LowRankConfig]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """One of the layers that a layer becomes: kernel [H, W, I, O] and which of the layer's axes
    its window moves along; depthwise when `groups` > 1."""

    kernel: Array
    rows: bool
    columns: bool
    groups: int = 1


@tvm.transform.module_pass(opt_level=0, name="LowRank")
class LowRank:
    """Split the layers in `schemes` that are convolutions without groups or linear layers.

    `statistics` holds what `observe` lists, gathered on this very module. Raises `DataError` when
    they are missing.
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
        for layer in _layers(graph, self.schemes):
            parts = _split(layer, self.statistics)
            if parts is None:
                continue
            for variable in layer.variables:
                call = graph.values[variable]
                calls = _calls(call, parts, variable, builder)
                before[variable] = calls[:-1]
                replace[variable] = calls[-1].value
        module = module.clone()
        module["main"] = rebuild(graph.function, replace=replace, before=before)
        return relax.transform.Normalize()(module)


def observe(module: tvm.IRModule, schemes: Mapping[str, LowRankConfig]) -> Observations | None:
    """X·Xᵀ of the layers that are split for the data."""
    layers = _layers(Graph(module["main"]), schemes)
    names = [v.name for layer in layers if layer.config.needs_data for v in layer.variables]
    return Observations(second_moments=frozenset(names)) if names else None


def _layers(graph: Graph, schemes: Mapping[str, LowRankConfig]) -> list[Layer]:
    return [layer for layer in weight_layers(graph, schemes) if layer.patches.groups == 1]


def _kernel(layer: Layer) -> Array:
    """The weight as [H, W, I, O]; sides that it does not have are 1."""
    layout = weight_layout(layer.call)
    order = kernel_order(layout)
    array = layer.weight.astype(np.float64).transpose([layout.index(x) for x in order])
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _split(layer: Layer, statistics: Statistics) -> list[Part] | None:
    """The parts in order; None where they would take as many operations as the layer."""
    config, kernel = layer.config, _kernel(layer)
    hessian = None
    if config.needs_data:
        second, _, _ = layer.moments(statistics)
        hessian = damped(second[0])
    form = config.form if _has_form(layer, kernel) else "channels"
    rank = _choose_rank(config, form, kernel, hessian)
    if rank is None:
        return None
    parts = _parts(form, kernel, rank, hessian)
    whole = float(np.prod(kernel.shape))
    return parts if _operations(layer, parts) < whole else None


def _has_form(layer: Layer, kernel: Array) -> bool:
    return layer.config.form == "channels" or (
        op_name(layer.call) == "relax.nn.conv2d" and max(kernel.shape[:2]) > 1
    )


def _parts(form: str, kernel: Array, rank: int, hessian: Array | None) -> list[Part]:
    if form == "rows_and_columns":
        u, v = split_rows_and_columns(kernel, rank, hessian)
        return [Part(u, True, False), Part(v, False, True)]
    if form == "tucker":
        share = rank / kernel.shape[3]
        inner = max(1, round(share * kernel.shape[2]))
        found = tucker2(kernel, min(inner, kernel.shape[2]), min(rank, kernel.shape[3]))
        return [
            Part(found.first[None, None], False, False), Part(found.core, True, True),
            Part(found.last[None, None], False, False),
        ]  # fmt: skip
    if form == "canonical":
        cp = canonical_polyadic(kernel, rank)
        return [
            Part(cp.first[None, None], False, False),
            Part(cp.rows[:, None, None, :], True, False, rank),
            Part(cp.columns[None, :, None, :], False, True, rank),
            Part(cp.last[None, None], False, False),
        ]
    rows, columns, inputs, outputs = kernel.shape
    u, v = split_matrix(kernel.reshape(-1, outputs), rank, hessian)
    return [
        Part(u.reshape(rows, columns, inputs, rank), True, True), Part(v[None, None], False, False)
    ]  # fmt: skip


def _choose_rank(
    config: LowRankConfig, form: str, kernel: Array, hessian: Array | None
) -> int | None:
    """A multiple of `config.multiple`, at least 1; None: none is small enough."""
    rows, columns, inputs, outputs = kernel.shape
    matrix = kernel.reshape(-1, outputs)
    if form == "rows_and_columns":
        matrix = kernel.transpose(0, 2, 1, 3).reshape(rows * inputs, columns * outputs)
        hessian = None
    largest = min(matrix.shape) if form != "tucker" else outputs
    rank = config.rank
    if isinstance(rank, Energy):
        wanted = rank_for_energy(matrix, rank.share, hessian)
        return _snapped(wanted, config.multiple, math.ceil, largest)
    if isinstance(rank, Operations):
        limit = rank.share * kernel.size
        fits = [n for n in range(1, largest + 1) if _size(form, kernel.shape, n) <= limit]
        return _snapped(max(fits), config.multiple, math.floor, largest) if fits else None
    return min(rank.value, largest)


def _snapped(rank: int, multiple: int, towards: Callable[[float], int], largest: int) -> int:
    return rank if rank < multiple else min(towards(rank / multiple) * multiple, largest)


def _size(form: str, shape: tuple[int, ...], rank: int) -> float:
    """Multiply-accumulates of the parts for one position, as for the kernel its size."""
    rows, columns, inputs, outputs = shape
    if form == "rows_and_columns":
        return rank * (rows * inputs + columns * outputs)
    if form == "tucker":
        inner = max(1, round(rank / outputs * inputs))
        return inputs * inner + rows * columns * inner * rank + rank * outputs
    if form == "canonical":
        return rank * (inputs + rows + columns + outputs)
    return rank * (rows * columns * inputs + outputs)


def _operations(layer: Layer, parts: list[Part]) -> float:
    """Multiply-accumulates of the parts for each output position of the layer: what comes before a
    stride is computed for more positions than those."""
    if op_name(layer.call) == "relax.matmul":
        return float(sum(part.kernel.size for part in parts))
    strides = (1,) * (2 - len(layer.patches.strides)) + layer.patches.strides
    total, left = 0.0, [strides[0], strides[1]]
    for part in parts:
        left = [1 if part.rows else left[0], 1 if part.columns else left[1]]
        total += part.kernel.size * left[0] * left[1]
    return total


def _calls(
    call: relax.Call, parts: list[Part], variable: relax.Var, builder: relax.BlockBuilder
) -> list[relax.VarBinding]:
    """The parts as bindings, the last one of `variable` itself."""
    bindings: list[relax.VarBinding] = []
    source = call.args[0]
    for number, part in enumerate(parts, 1):
        value = builder.normalize(_call(call, part, source))
        if number == len(parts):
            bindings.append(relax.VarBinding(variable, value))
            break
        kind = relax.DataflowVar if isinstance(variable, relax.DataflowVar) else relax.Var
        source = kind(f"{variable.name}_part{number}", value.ty)
        bindings.append(relax.VarBinding(source, value))
    return bindings


def _call(call: relax.Call, part: Part, source: tvm.ir.Expr) -> relax.Call:
    layout = weight_layout(call)
    order = kernel_order(layout)
    kernel = part.kernel.reshape(part.kernel.shape[4 - len(order) :])
    weight = relax.const(
        np.ascontiguousarray(kernel.transpose([order.index(x) for x in layout])).astype(np.float32)
    )
    if op_name(call) == "relax.matmul":
        return relax.op.matmul(source, weight)
    attrs = call.attrs
    moves = [part.rows, part.columns][-(len(layout) - 2) :]
    conv = relax.op.nn.conv1d if len(layout) == 3 else relax.op.nn.conv2d
    return conv(
        source, weight, strides=_where(moves, attrs.strides, 1),
        padding=_where([*moves, *moves], attrs.padding, 0),
        dilation=_where(moves, attrs.dilation, 1),
        groups=part.groups, data_layout=str(attrs.data_layout), kernel_layout=layout,
        out_layout=str(attrs.out_layout),
    )  # fmt: skip


def _where(moves: Sequence[bool], values: Sequence[object], other: int) -> list[int]:
    """The values of axes that a window moves along, `other` for those it does not."""
    return [value if move else other for value, move in zip(ints(values), moves, strict=True)]
