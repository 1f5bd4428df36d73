"""Which share of its channels each group keeps under a total for several groups: `shrink` with
`scope: sensitivity`.

Each group alone loses channels, those behind it make up for it, and the change of the network's
outputs is measured (Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.2, without
its thresholds); between the measured points losses go as the second-order error of the layers that
read the group does. The total is spent where it costs least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..errors import DataError
from .channel_groups import ChannelGroup
from .costs import LayerCosts
from .numerics.channel_budget import (
    CountOption,
    OperationCounts,
    cheapest_within,
    snap,
)
from .numerics.channel_norms import keep_best
from .numerics.loss_line import LossLine
from .numerics.statistics import Statistics
from .numerics.surgeon_selection import removal_errors
from .remove_channels import masked
from .shrink_config import ChannelShare, ShrinkConfig
from .shrink_problem import ShrinkProblem, compensated, operation_counts, operations_of

Array = NDArray[np.float64]
Loss = Callable[[tvm.IRModule], float]

# Shares of its channels that a group keeps where its losses are measured.
_MEASURED = (0.75, 0.5)
# Of a group's channels that stay at least: losses of groups alone do not add up where much of one
# is gone. With each of these the total is spent, and what loses least together is taken.
_LEAST_SHARES = (0.125, 0.25, 0.4, 0.55, 0.7)


def undecided(schemes: Mapping[str, ShrinkConfig]) -> dict[str, ShrinkConfig]:
    """Those whose groups share a total by their losses."""
    return {name: item for name, item in schemes.items() if item.is_by_loss}


def decide(
    module: tvm.IRModule,
    schemes: Mapping[str, ShrinkConfig],
    statistics: Statistics,
    loss: Loss | None = None,
    costs: LayerCosts | None = None,
) -> dict[str, ShrinkConfig]:
    """`schemes` with a share for the channels of each layer.

    `statistics`: what `shrink.observe` lists for the undecided ones. `loss`: how far the outputs of
    a module are from those of this one. Raises `DataError` without.
    """
    if loss is None:
        raise DataError(
            "shrink with scope: sensitivity measures losses on calibration data; give some "
            "(--calib)"
        )
    problem = ShrinkProblem.of(module, schemes, statistics)
    keep = np.ones(len(problem.channels.atoms), bool)
    decided = dict(schemes)
    for config in dict.fromkeys(undecided(schemes).values()):
        families: dict[str, list[ChannelGroup]] = {}
        for group, own in problem.groups:
            if own == config:
                maker = next(layer for layer in group.producers if not layer.is_depthwise)
                families.setdefault(maker.name, []).append(group)
        if not families:  # nothing of theirs can leave: the step says so
            decided |= {
                n: replace(own, scope="group") for n, own in schemes.items() if own == config
            }
            continue
        measured = [_Family.measured(problem, members, loss) for members in families.values()]
        multiples = config.multiples_for(None if costs is None else costs.lanes)
        multiple, options = _chosen(problem, config, measured, keep, multiples, loss)
        shares = {}
        for family, option in zip(measured, options, strict=True):
            for group, errors, count in zip(
                family.groups, family.errors, option.counts.tolist(), strict=True
            ):
                keep[group.labels[~keep_best(errors, count)]] = False
            shares[family.maker] = option.share
        for name, own in schemes.items():
            if own == config:
                whole = ChannelShare(1.0)
                decided[name] = replace(config, keep=whole, scope="group", multiple=multiple)
        for layer in problem.channels.layers:
            if layer.name in shares:
                own = replace(
                    config, keep=ChannelShare(shares[layer.name]), scope="group", multiple=multiple
                )
                decided |= {call.name: own for call in layer.calls if call.name in schemes}
    return decided


@dataclass(frozen=True, eq=False)
class _Family:
    """Groups whose share is that of one layer, and what they lose.

    `errors`: of each group, by label, the readers' error when it has left after all that cost less.
    """

    maker: str
    groups: list[ChannelGroup]
    errors: list[Array]
    line: LossLine

    @staticmethod
    def measured(problem: ShrinkProblem, groups: list[ChannelGroup], loss: Loss) -> _Family:
        maker = next(layer for layer in groups[0].producers if not layer.is_depthwise)
        errors = []
        for group in groups:
            consumers = problem.consumers(group)
            size = len(group.labels)
            least = max(1, int(min(_LEAST_SHARES) * size))
            found = removal_errors(consumers, least) if consumers else np.arange(size) + 1.0
            errors.append(np.asarray(found, np.float64))
        family = _Family(maker.name, groups, errors, LossLine.through([]))
        points = []
        for share in _MEASURED:
            counts = [max(1, round(share * len(group.labels))) for group in groups]
            trial = _without(problem, groups, errors, counts)
            points.append((family.error(counts), loss(trial)))
        return replace(family, line=LossLine.through(points))

    def error(self, counts: Sequence[int]) -> float:
        """Of the readers, with so many labels of each group left."""
        total = 0.0
        for errors, count in zip(self.errors, counts, strict=True):
            gone = np.sort(errors)[: len(errors) - count]
            total += float(gone[-1]) if len(gone) else 0.0
        return total

    def loss(self, counts: Sequence[int]) -> float:
        """In the network's outputs."""
        return self.line.at(self.error(counts))


def _without(
    problem: ShrinkProblem,
    groups: Sequence[ChannelGroup],
    errors: Sequence[Array],
    counts: Sequence[int],
) -> tvm.IRModule:
    """The module whose `groups` have but `counts` labels left."""
    keep = np.ones(len(problem.channels.atoms), bool)
    for group, error, count in zip(groups, errors, counts, strict=True):
        keep[group.labels[~keep_best(error, count)]] = False
    weights, shifts = compensated(problem, keep, {})
    function, _ = masked(problem.channels, keep, weights, shifts)
    return relax.transform.Normalize()(tvm.IRModule({"main": function}))


def _chosen(
    problem: ShrinkProblem,
    config: ShrinkConfig,
    families: Sequence[_Family],
    keep: NDArray[np.bool_],
    multiples: Sequence[int],
    loss: Loss,
) -> tuple[int, list[CountOption]]:
    """The first of the `multiples` with which the total is met, else the last, and what each family
    gets."""
    groups = [group for family in families for group in family.groups]
    errors = [own for family in families for own in family.errors]
    sizes = np.array([len(group.labels) for group in groups])
    if isinstance(config.keep, ChannelShare):
        eye = np.eye(len(groups)) / sizes
        costs = OperationCounts(sizes.astype(float), eye, np.zeros_like(eye), sizes)
        limit = config.keep.share * float(sizes.sum())
    else:
        costs = operation_counts(problem, config, groups, sizes, keep)
        limit = config.keep.share * operations_of(problem, config)
    found: dict[tuple[int, ...], list[CountOption]] = {}
    multiple = multiples[0]
    for multiple in multiples:
        every = [_options(family, multiple) for family in families]
        for least in (*_LEAST_SHARES, _even(costs, limit, every)):
            options = [[own[0], *(item for item in own if item.share >= least)] for own in every]
            chosen = cheapest_within(costs, limit, options)
            counts = np.concatenate([option.counts for option in chosen])
            if costs.total(counts) <= limit:
                found[tuple(counts.tolist())] = chosen
        if found:
            break
    if not found:
        return multiple, [own[-1] for own in every]
    if len(found) == 1:
        return multiple, next(iter(found.values()))
    best = min(found, key=lambda counts: loss(_without(problem, groups, errors, counts)))
    return multiple, found[best]


def _even(costs: OperationCounts, limit: float, options: Sequence[Sequence[CountOption]]) -> float:
    """The largest share with which all groups together meet the total."""
    for least in sorted({item.share for own in options for item in own}, reverse=True):
        counts = [
            next((item for item in reversed(own) if item.share >= least), own[0]).counts
            for own in options
        ]
        if costs.total(np.concatenate(counts)) <= limit:
            return least
    return 0.0


def _options(family: _Family, multiple: int) -> list[CountOption]:
    """What a family may keep, from all of it to the least."""
    sizes = np.array([len(group.labels) for group in family.groups])
    units = np.array([multiple // math.gcd(multiple, group.unit) for group in family.groups])
    largest = int(sizes.max())
    step = int(units[sizes.argmax()])
    least = max(step, math.ceil(min(_LEAST_SHARES) * largest))
    found = [CountOption(1.0, sizes, 0.0)]
    for count in range((largest - 1) // step * step, least - 1, -step):
        share = count / largest
        counts = snap(share * sizes, sizes, units)
        if not np.array_equal(counts, found[-1].counts):
            found.append(CountOption(share, counts, family.loss(counts.tolist())))
    return found
