"""Which rank a layer gets: by energy, operations, bytes, time on the target, or for all layers of a
step under a total."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import tvm
from numpy.typing import NDArray

from ..errors import RecipeError
from .costs import INSISTED, SMALLER, Cost, LayerCosts, LayerUse
from .graph import Graph
from .layer_spec import LayerSpec, layer_spec
from .low_rank_config import (
    Bytes,
    Energy,
    Latency,
    LowRankConfig,
    Network,
    Operations,
    Rank,
    SharedOut,
)
from .low_rank_parts import (
    Form,
    Layer,
    Part,
    Sides,
    fit,
    form_of,
    kernels_of,
    largest_rank,
    parts_of,
    specs_of,
)
from .numerics.least_squares import LeastSquares
from .numerics.loss_line import LossLine
from .numerics.rank_choice import Choice, allocate, energies, rank_for_energy, spectrum
from .numerics.sparsity_pattern import Mask, SparsityPattern
from .numerics.statistics import Statistics
from .sparse_layers import Pruned, with_weights
from .weight_layers import weight_layers

Array = NDArray[np.float64]

_MULTIPLE = 8  # without a target: whole vectors on most
_LEAST_MULTIPLE = 4  # bytes of a word: what the part behind reads at once
_WEIGHT_BYTES, _INDEX_BYTES = 4, 2
# Of a layer that keeps its weight because others give what the total asks for.
UNSPLIT = "the total needs no split of it"


@dataclass(frozen=True, eq=False)
class Aim:
    """What a group's parts are to come near to: a kernel [H, W, I, O], measured by what a change
    does to the outputs where data count."""

    kernel: Array
    problem: LeastSquares | None = None

    @property
    def hessian(self) -> Array | None:
        return None if self.problem is None else self.problem.hessian


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer that may be split, and what it would cost at each rank; costs are shares of the whole
    layer's."""

    layer: Layer
    form: Form
    spec: LayerSpec
    multiple: int
    statistics: Statistics
    costs: LayerCosts | None
    _compared: dict[int, tuple[Cost, Cost]] = field(default_factory=dict, init=False)

    @cached_property
    def sides(self) -> Sides:
        """Of one group's kernel."""
        kernel = kernels_of(self.layer)[0]
        rows, columns, inputs, outputs = kernel.shape
        return rows, columns, inputs, outputs

    def aims(self) -> list[Aim]:
        """For each group; not kept, since X·Xᵀ is large."""
        kernels = kernels_of(self.layer)
        if not self.layer.config.data_aware:
            return [Aim(kernel) for kernel in kernels]
        return [
            Aim(problem.best.reshape(kernel.shape), problem)
            for kernel, problem in zip(kernels, self.layer.problems(self.statistics), strict=True)
        ]

    @property
    def largest(self) -> int:
        """The rank beyond which there is nothing to hold."""
        return largest_rank(self.form, self.sides)

    @cached_property
    def ranks(self) -> list[int]:
        """Ascending: multiples, and all below the first of them."""
        few = range(1, min(self.multiple, self.largest + 1))
        return [*few, *range(self.multiple, self.largest + 1, self.multiple)]

    def parts(self, rank: int) -> list[Part]:
        return parts_of(self.form, self.sides, rank, self.multiple, self.layer.patches.groups)

    @cached_property
    def squares(self) -> Array:
        """Spectrum of the matrix that the form splits, over all groups."""
        rows, columns, inputs, outputs = self.sides
        found = []
        for aim in self.aims():
            if self.form == "rows_and_columns":
                matrix = aim.kernel.transpose(0, 2, 1, 3)
                found.append(spectrum(matrix.reshape(rows * inputs, columns * outputs)))
            else:
                found.append(spectrum(aim.kernel.reshape(-1, outputs), aim.hessian))
        return np.asarray(np.sum(found, axis=0))

    @cached_property
    def pattern(self) -> SparsityPattern | None:
        """Of the sparse residual; None: the layer gets none."""
        residual = self.layer.config.residual
        return None if residual is None else self.layer.pattern(residual.pattern)

    @cached_property
    def _residual(self) -> Mask | None:
        """Weights [groups, K, N] that the residual has: about as many, not yet the very ones."""
        if self.pattern is None or self.layer.config.residual is None:
            return None
        zeros = self.layer.config.residual.zeros(self.pattern)
        return np.stack([self.pattern.choose(w**2, zeros) for w in self.layer.matrices()])

    def operations(self, rank: int) -> float:
        kept = 0.0 if self._residual is None else float(self._residual.mean())
        parts = sum(spec.macs for spec in specs_of(self.spec, self.parts(rank)))
        return parts / self.spec.macs + kept

    def bytes(self, rank: int) -> float:
        """Of float32 weights; of a residual with its indices."""
        stored = sum(np.prod(part.sides) for part in self.parts(rank)) * _WEIGHT_BYTES
        if self._residual is not None and self.pattern is not None:
            pools = [self.pattern.pool(kept.astype(float)) for kept in self._residual]
            units = sum(np.count_nonzero(pool) for pool in pools)
            stored += np.count_nonzero(self._residual) * _WEIGHT_BYTES + units * _INDEX_BYTES
        return float(stored / (self.layer.weight.size * _WEIGHT_BYTES))

    def latency(self, rank: int) -> float:
        """Raises `RecipeError` without a target."""
        whole, parts = self.compared(rank)
        return parts.time / whole.time

    def compared(self, rank: int) -> tuple[Cost, Cost]:
        """What the layer takes on the target, and what its parts do. Raises `RecipeError` without
        a target."""
        if self.costs is None:
            raise RecipeError("rank: {latency: ...} needs to know what layers cost on a target")
        if rank not in self._compared:
            chains = [[self.spec], specs_of(self.spec, self.parts(rank))]
            whole, parts = self.costs.totals(
                [[LayerUse(self.layer.name, spec) for spec in chain] for chain in chains]
            )
            if self._residual is not None:
                share, stored = self._residual_cost
                parts = replace(
                    parts, time=parts.time + share * whole.time, bytes=parts.bytes + stored
                )
            self._compared[rank] = whole, parts
        return self._compared[rank]

    @property
    def fastest(self) -> int:
        """Of the ranks whose kernels were compared."""
        return min(self._compared, key=self.latency)

    @cached_property
    def _residual_cost(self) -> tuple[float, int]:
        """(time in times of the whole layer's, bytes)"""
        assert self.costs is not None and self._residual is not None
        found = self.costs.sparse(self.layer.name, self.spec, self._residual)
        cost = found.dense if found.sparse is None else found.sparse.cost
        return cost.time / found.dense.time, cost.bytes

    def loss(self, rank: int) -> str | None:
        """Why the layer stays whole; None: it is better split."""
        config = self.layer.config
        counts_bytes = _counts_bytes(config)
        if (self.bytes(rank) if counts_bytes else self.operations(rank)) >= 1:
            return f"rank {rank} has as many {'bytes' if counts_bytes else 'operations'}"
        if config.insist or self.costs is None:
            return None
        whole, parts = self.compared(rank)
        if parts.pays(whole) or (counts_bytes and parts.is_smaller(whole)):
            return None
        words = f"with rank {rank} its parts take {parts.words(whole)}; {parts.rule(whole)}"
        if self.fastest != rank:
            words += f"; rank {self.fastest} takes {self.latency(self.fastest):.2f}x"
        return words

    def drawback(self, rank: int) -> str | None:
        """What to say of parts that are not faster than the layer; None: they are."""
        if self.costs is None:
            return None
        whole, parts = self.compared(rank)
        if parts.is_faster(whole):
            return None
        is_kept = parts.pays(whole) or not self.layer.config.insist
        return f"{SMALLER if is_kept else INSISTED}its parts take {parts.words(whole)}"


def _counts_bytes(config: LowRankConfig) -> bool:
    """Whether bytes are what is asked for: then time decides nothing where they are saved."""
    rank = config.rank
    return isinstance(rank, Bytes) or (isinstance(rank, Network | SharedOut) and rank.of == "bytes")


def splittable(graph: Graph, schemes: Mapping[str, LowRankConfig]) -> list[Layer]:
    """All but depthwise layers, which are as small as can be."""
    layers = weight_layers(graph, schemes)
    return [layer for layer in layers if layer.patches.groups == 1 or layer.outputs > 1]


def candidates(
    layers: Sequence[Layer], statistics: Statistics, costs: LayerCosts | None
) -> list[Candidate]:
    """The layers whose kernel is known."""
    found = []
    for layer in layers:
        spec = layer_spec(layer.call)
        if spec is None:
            continue
        asked = layer.config.multiple
        auto = _MULTIPLE if costs is None else max(_LEAST_MULTIPLE, costs.lanes)
        multiple = auto if asked == "auto" else asked
        found.append(Candidate(layer, form_of(layer), spec, multiple, statistics, costs))
    return found


Measured = Callable[[Mapping[Candidate, int]], float]
"""What the network's outputs lose when those layers alone have those ranks."""


def undecided(schemes: Mapping[str, LowRankConfig]) -> dict[str, LowRankConfig]:
    """The layers whose ranks are under a total."""
    return {name: item for name, item in schemes.items() if isinstance(item.rank, Network)}


def decide(
    module: tvm.IRModule,
    schemes: Mapping[str, LowRankConfig],
    statistics: Statistics,
    loss: Callable[[tvm.IRModule], float] | None = None,
    costs: LayerCosts | None = None,
) -> dict[str, LowRankConfig]:
    """`schemes` with a rank for each layer under a total; those that it leaves whole are gone.
    `statistics` holds what `low_rank.observe` lists for them. `loss`: how far the outputs of a
    module are from those of this one; where nobody measures it, energies count."""
    left = undecided(schemes)
    found = candidates(splittable(Graph(module["main"]), left), statistics, costs)
    decided = {name: item for name, item in schemes.items() if name not in left}

    def measured(ranks: Mapping[Candidate, int]) -> float:
        assert loss is not None
        return loss(with_weights(module, [_near(*item) for item in ranks.items()]))

    ranks = _wanted_ranks(found, None if loss is None else measured)
    for candidate, rank in zip(found, ranks, strict=True):
        config = candidate.layer.config
        if isinstance(rank, int):
            assert isinstance(config.rank, Network)
            config = replace(config, rank=SharedOut(rank, config.rank.of))
            decided |= dict.fromkeys((n.name for n in candidate.layer.variables), config)
    return decided


def choose_ranks(found: Sequence[Candidate]) -> list[int | str]:
    """For each layer its rank, or why it stays whole. Raises `RecipeError` where a total for the
    network cannot be reached."""
    return [
        (candidate.loss(rank) or rank) if isinstance(rank, int) else rank
        for candidate, rank in zip(found, _wanted_ranks(found), strict=True)
    ]


def _near(candidate: Candidate, rank: int) -> tuple[Layer, Pruned]:
    """The layer with the product of its parts as its weight."""
    layer, products, shifts = candidate.layer, [], []
    for aim in candidate.aims():
        _, product = fit(candidate.form, aim.kernel, rank, candidate.multiple, aim.hessian)
        products.append(product.reshape(-1, product.shape[3]))
        if aim.problem is not None:
            shifts.append(aim.problem.bias_shift(products[-1]))
    known = [shift for shift in shifts if shift is not None]
    weight = layer.with_matrices(products)
    return layer, Pruned(weight, np.concatenate(known) if known else None, np.zeros(0))


def _wanted_ranks(found: Sequence[Candidate], measured: Measured | None = None) -> list[int | str]:
    """What is asked for, whether it is a loss or not."""
    results: list[int | str] = []
    network: dict[Network, list[int]] = defaultdict(list)
    for index, candidate in enumerate(found):
        rank = candidate.layer.config.rank
        if isinstance(rank, Network):
            network[rank].append(index)
            results.append("")
        else:
            results.append(_own_rank(candidate, rank))
    for total, members in network.items():
        chosen = _network_ranks(total, [found[index] for index in members], measured)
        for index, value in zip(members, chosen, strict=True):
            results[index] = value
    return results


def _own_rank(
    candidate: Candidate, rank: Energy | Operations | Bytes | Latency | Rank
) -> int | str:
    if isinstance(rank, Rank):
        return min(rank.value, candidate.largest)
    if isinstance(rank, Energy):
        least = rank_for_energy(candidate.squares, rank.share)
        return next((n for n in candidate.ranks if n >= least), candidate.largest)
    cost = {Operations: candidate.operations, Bytes: candidate.bytes, Latency: candidate.latency}
    what = {Operations: "operations", Bytes: "bytes", Latency: "time on the target"}
    share = cost[type(rank)]
    ranks = candidate.ranks
    if isinstance(rank, Latency):  # kernels take no longer for ranks between multiples
        ranks = [n for n in ranks if n % candidate.multiple == 0] or ranks
    # Costs grow with the rank.
    fitting = bisect.bisect_right(ranks, rank.share, key=share)
    if fitting == 0:
        best = candidate.fastest if isinstance(rank, Latency) else ranks[0]
        which = "the smallest" if best == ranks[0] else "the fastest compared"
        takes = f"even rank {best}, {which}, takes {share(best):.2f}x of its {what[type(rank)]}"
        return f"{takes}; {rank.share:g}x is asked for"
    return ranks[fitting - 1]


def _network_ranks(
    total: Network, members: Sequence[Candidate], measured: Measured | None
) -> list[int | str]:
    """Each layer's cost counts by its share of all. Where losses are measured, the better of the
    choices by energies and by losses of layers alone."""
    wholes: list[float] = []
    by_energy: list[list[Choice]] = []
    by_loss: list[list[Choice]] = []
    for member in members:
        is_bytes = total.of == "bytes"
        cost = member.bytes if is_bytes else member.operations
        size = float(member.layer.weight.size if is_bytes else member.spec.macs)
        size *= len(member.layer.variables) if not is_bytes else 1
        costs = {rank: share for rank in member.ranks if (share := cost(rank)) < 1}
        held = energies(member.squares)
        lost = {rank: 1 - float(held[min(rank, len(held)) - 1]) for rank in costs}
        wholes.append(size)
        by_energy.append(
            [
                Choice(rank, costs[rank] * size, -math.log(max(1 - lost[rank], 1e-30)))
                for rank in costs
            ]
        )
        if measured is not None:
            line = _loss_line(member, costs, lost, total.share, measured)
            by_loss.append(
                [Choice(rank, costs[rank] * size, line.at(lost[rank])) for rank in costs]
            )
    limit = total.share * sum(wholes)
    try:
        found = allocate(wholes, by_energy, limit)
    except ValueError as error:
        raise RecipeError(f"rank: {{network: {total.share}}}: {error}") from None
    if measured is not None:
        other = allocate(wholes, by_loss, limit)

        def loss_of(chosen: Sequence[Choice | None]) -> float:
            pairs = zip(members, chosen, strict=True)
            return measured({member: item.rank for member, item in pairs if item is not None})

        found = min(other, found, key=loss_of)
    return [UNSPLIT if item is None else item.rank for item in found]


def _loss_line(
    member: Candidate,
    costs: Mapping[int, float],
    lost: Mapping[int, float],
    share: float,
    measured: Measured,
) -> LossLine:
    """Loss in the network's outputs by the share of the layer's energy that is lost, measured where
    the layer has about the `share` of its costs and half of it."""
    points = {
        min(costs, key=lambda rank: abs(costs[rank] - at)) for at in (share, share / 2) if costs
    }
    return LossLine.through((lost[rank], measured({member: rank})) for rank in points)
