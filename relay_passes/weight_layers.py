"""The layers that a step changes the float weight of: one for all calls that share it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from ..errors import DataError
from .graph import Graph
from .ir import shape_of
from .numerics.least_squares import LeastSquares
from .numerics.moments import PatchShape
from .numerics.sparsity_pattern import SparsityPattern
from .numerics.statistics import Statistics
from .op_kinds import ANCHORS
from .patches import patch_shape, weight_matrix, weight_of_matrix
from .quantize_weights import weight_layout

# Of `main` (JSON: names of layers): weights that are transforms, such as a DFT, and not learnt.
FIXED_ATTR = "tvm_compress.fixed_weights"

Config = TypeVar("Config")

# Parts of a step that calibration runs between: each is two inferences a sample.
STAGES = 24


@dataclass(frozen=True, eq=False)
class WeightLayer(Generic[Config]):
    """Calls that share one float weight: the steps of an unrolled loop are several."""

    variables: tuple[relax.Var, ...]
    call: relax.Call
    weight: NDArray[np.float32]
    patches: PatchShape
    config: Config

    @property
    def name(self) -> str:
        """Of the first call."""
        return self.variables[0].name

    @property
    def outputs(self) -> int:
        """Output channels of a group."""
        axis = weight_layout(self.call).index("O")
        return self.weight.shape[axis] // self.patches.groups

    @property
    def positions(self) -> int:
        """Of its kernel, in space."""
        return int(np.prod(self.patches.kernel))

    def pattern(self, asked: SparsityPattern) -> SparsityPattern | None:
        """A pattern as it is for this layer; None: the layer has none."""
        return asked.of_layer(self.positions, self.outputs)

    def matrices(self) -> NDArray[np.float64]:
        """[groups, K, N], K in the order of `moments.extract_patches`."""
        return weight_matrix(self.weight, self.call).astype(np.float64).transpose(0, 2, 1)

    def with_matrices(self, matrices: Sequence[NDArray[np.float64]]) -> NDArray[np.float32]:
        """Inverse of `matrices`: [K, N] of each group => a weight like the layer's."""
        rows = np.stack(matrices).transpose(0, 2, 1)  # [G, N, K]
        return weight_of_matrix(rows, self.call, self.weight.shape).astype(np.float32)

    def moments(
        self, statistics: Statistics
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """(X·Xᵀ [G, K, K], mean [G, K], count) over all calls. Raises `DataError` without."""
        found = [statistics.moments.get(variable.name) for variable in self.variables]
        seconds = [item.second for item in found if item is not None and item.second is not None]
        if len(seconds) < len(found):
            raise DataError(
                f"the calibration statistics lack X·Xᵀ of layer {self.name!r}; calibrate the very "
                "module that the step changes, with what its `observe` lists"
            )
        counts = [item.count for item in found if item is not None]
        means = [item.mean * item.count for item in found if item is not None]
        return np.sum(seconds, axis=0), np.sum(means, axis=0) / sum(counts), sum(counts)

    def problems(self, statistics: Statistics) -> list[LeastSquares]:
        """What new weights have to solve, by group. The calls of a loop share one bias, and their
        means are not one, so there it stays. Raises `DataError` as `moments`."""
        second, mean, count = self.moments(statistics)
        is_one = len(self.variables) == 1
        found = [statistics.moments[variable.name].wanted for variable in self.variables]
        wanted = [item for item in found if item is not None]
        problems = []
        for group, weight in enumerate(self.matrices()):
            problems.append(
                LeastSquares.make(
                    weight,
                    second[group],
                    mean[group] if is_one else None,
                    count,
                    np.sum([item.second[group] for item in wanted], axis=0) if wanted else None,
                    wanted[0].mean[group] if wanted else None,
                )
            )
        return problems


def read_fixed(function: relax.Function) -> frozenset[str]:
    """Layers whose weights are transforms: nothing but quantisation changes them."""
    attributes = function.attrs or {}
    return frozenset(json.loads(str(attributes.get(FIXED_ATTR, "[]"))))


def in_stages(
    layers: Sequence[WeightLayer[Config]], schemes: Mapping[str, Config]
) -> list[dict[str, Config]]:
    """`schemes` in at most `STAGES` parts, in the order of the graph; in the first one also what is
    not among the `layers`."""
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


def weight_layers(graph: Graph, schemes: Mapping[str, Config]) -> list[WeightLayer[Config]]:
    """The named layers in order; without transposed convolutions, weights with a batch axis,
    weights that are compressed already or computed, and those of `FIXED_ATTR`."""
    found: dict[bytes, WeightLayer[Config]] = {}
    for layer in _single_layers(graph, schemes):
        form = layer.weight.shape, layer.patches, layer.config
        key = layer.weight.tobytes() + repr(form).encode()
        first = found.get(key)
        if first is None:
            found[key] = layer
        else:
            both = (*first.variables, *layer.variables)
            found[key] = WeightLayer(both, first.call, first.weight, first.patches, first.config)
    return list(found.values())


def _single_layers(graph: Graph, schemes: Mapping[str, Config]) -> Iterator[WeightLayer[Config]]:
    fixed = read_fixed(graph.function)
    for variable, call in graph.values.items():
        if variable.name not in schemes or graph.op(variable) not in ANCHORS:
            continue
        if variable.name in fixed:
            continue
        weight = graph.constant(call.args[1])
        if weight is None or weight.dtype != np.float32:
            continue
        patches = patch_shape(call, shape_of(call.args[1]) or ())
        if patches is not None:
            yield WeightLayer((variable,), call, weight, patches, schemes[variable.name])
