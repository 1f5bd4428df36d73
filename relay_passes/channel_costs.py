"""Whether channels that leave pay on the target, and how many had better stay.

All layers that compute or read a group's channels count together, with those of other groups left
that are to stay. A group whose layers would be neither smaller nor faster stays whole; where they
would not be faster, the numbers of channels nearby that fill the target's registers are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schedules import MatmulSpec
from .channel_groups import STAYS, ChannelGroup, Channels, LayerChannels
from .costs import INSISTED, SMALLER, LayerCosts, LayerUse
from .layer_spec import LayerSpec, layer_spec
from .select import describe_layer
from .shrink_config import Operations, ShrinkConfig

# How what is noted of a group begins where the target's costs decide.
WHOLE, MOVED = "whole: ", "in the place of "
# Of a group's channels that stay at least when a number nearby is looked for.
_LEAST_SHARE = 0.125
# Shares that differ by less are as asked for.
_ROUNDING = 1e-9

Shares = NDArray[np.float64]
"""By label: which part of its group stays, as long as nobody has chosen which labels those are."""


@dataclass(frozen=True)
class Asked:
    """What a group's config says about its number of channels."""

    multiple: int | None
    """None: any number will do."""
    insist: bool


def counts_that_pay(
    channels: Channels,
    groups: Sequence[ChannelGroup],
    counts: Sequence[int],
    asked: Sequence[Asked],
    costs: LayerCosts,
) -> tuple[list[int], dict[str, str]]:
    """How many labels of each group stay, where `counts` [G] were to, and what to note of the
    layers that compute them."""
    found = list(counts)
    notes: dict[str, str] = {}
    shares = np.ones(len(channels.atoms))
    for group, count in zip(groups, counts, strict=True):
        shares[group.labels] = count / len(group.labels)
    for index, (group, count) in enumerate(zip(groups, counts, strict=True)):
        if count == len(group.labels):
            continue
        found[index], words = _chosen(channels, group, count, shares, asked[index], costs)
        shares[group.labels] = found[index] / len(group.labels)
        if words:
            makers = [layer for layer in group.producers if not layer.is_depthwise]
            notes |= dict.fromkeys((call.name for maker in makers for call in maker.calls), words)
    return found, notes


def _chosen(
    channels: Channels,
    group: ChannelGroup,
    count: int,
    shares: Shares,
    asked: Asked,
    costs: LayerCosts,
) -> tuple[int, str]:
    """How many labels stay, and what there is to say about that."""
    size, unit = len(group.labels), group.unit
    whole_uses, uses = (_uses(channels, group, left, shares) for left in (size, count))
    if not uses:
        return count, ""  # of no layer there it is known what it costs
    whole, shrunk = costs.totals([whole_uses, uses])
    words = f"with {unit * count} of {unit * size} channels its layers take {shrunk.words(whole)}"
    if shrunk.is_faster(whole):
        return count, ""
    is_smaller = shrunk.is_smaller(whole)
    if asked.insist:
        is_loss = shrunk.is_slower(whole) or not is_smaller
        return count, INSISTED + words if is_loss else ""
    others = nearby(count, size, unit, asked.multiple, costs.lanes)
    if others:
        whole, shrunk, *found = costs.totals(
            [whole_uses, uses, *(_uses(channels, group, left, shares) for left in others)]
        )
        best = min(range(len(others)), key=lambda i: found[i].time)
        if found[best].is_faster(shrunk) and found[best].is_faster(whole):
            return others[best], f"{MOVED}{unit * count}: {words}"
    if not is_smaller:
        return size, WHOLE + words
    return count, SMALLER + words if shrunk.is_slower(whole) else ""


def nearby(count: int, size: int, unit: int, multiple: int | None, lanes: int) -> list[int]:
    """Other numbers of labels, each of `unit` channels: the next of which kernels fill registers of
    `lanes` channels, and the next multiples where `multiple` is given. From most to fewest."""
    steps = [math.lcm(lanes, multiple or 1), *([] if multiple is None else [multiple])]
    found = set()
    for channels in steps:
        step = channels // math.gcd(channels, unit)
        found |= {(count - 1) // step * step, (count // step + 1) * step}
    least = max(1, math.ceil(_LEAST_SHARE * size))
    return sorted((n for n in found if least <= n < size and n != count), reverse=True)


def _uses(channels: Channels, group: ChannelGroup, count: int, shares: Shares) -> list[LayerUse]:
    """The layers of a group that has `count` labels left."""
    shares = shares.copy()
    shares[group.labels] = count / len(group.labels)
    found = []
    for layer in dict.fromkeys((*group.producers, *group.consumers)):
        spec = layer_spec(layer.call)
        if spec is not None:
            left = _cut(spec, layer, shares)
            found.append(LayerUse(layer.name, left, len(layer.calls)))
    return found


def _cut(spec: LayerSpec, layer: LayerChannels, shares: Shares) -> LayerSpec:
    """A layer's kernel with the channels that stay."""
    outputs = max(1, round(float(shares[layer.outputs].sum())))
    inputs = max(1, round(float(shares[layer.inputs].sum())))
    if isinstance(spec, MatmulSpec):
        return spec.replace(in_features=inputs, out_features=outputs)
    if layer.is_depthwise:
        groups = spec.groups * outputs // spec.out_channels
        return spec.replace(in_channels=groups, out_channels=outputs, groups=groups)
    return spec.replace(in_channels=inputs * spec.groups, out_channels=outputs)


def why_whole(
    channels: Channels, schemes: Mapping[str, ShrinkConfig], names: Iterable[str]
) -> dict[str, str]:
    """Of the layers `names`, which computed as many channels and read as many as before: why they
    could lose none. `schemes`: all layers that were to. Layers that could have are missing."""
    of_call = {call.name: layer for layer in channels.layers for call in layer.calls}
    groups = channels.groups()
    found = {}
    for name in names:
        if name not in of_call:
            found[name] = "no rule says which channels it has"
            continue
        layer = of_call[name]
        own = [group for group in groups if layer in group.producers]
        makers = {call.name for group in own for item in group.producers for call in item.calls}
        others = sorted(makers - set(schemes))
        multiple = schemes[name].multiple
        sizes = [len(group.labels) * group.unit for group in own]
        if (layer.outputs == STAYS).all():
            found[name] = "its channels reach the inputs or outputs or an operator that keeps all"
        elif not own:
            found[name] = "its channels come in one piece"
        elif others:
            found[name] = f"{others[0]} computes the same channels and was not selected"
        elif multiple != "auto" and max(sizes) <= multiple:
            found[name] = f"its {max(sizes)} channels are no more than multiple: {multiple}"
    return found


def missed(
    before: Channels,
    after: Channels,
    schemes: Mapping[str, ShrinkConfig],
    notes: Mapping[str, str],
) -> list[str]:
    """Where more is left of the layers of one config than it asked for: how much, and what to
    change. `notes`: what the step noted of layers."""
    found = []
    for config in dict.fromkeys(schemes.values()):
        names = {name for name, own in schemes.items() if own == config}
        by_operations = isinstance(config.keep, Operations)
        sizes = [_size(item, names, by_operations) for item in (before, after)]
        share = sizes[1] / sizes[0] if sizes[0] else 0.0
        if share <= config.keep.share + _ROUNDING:
            continue
        held = [name for name in names if any(w in notes.get(name, "") for w in (WHOLE, MOVED))]
        if held:
            advice = f"the target gains nothing by more in {len(held)} layers; insist: true "
            advice += "takes it all the same"
        elif config.multiple not in ("auto", 1):
            advice = f"try a smaller multiple than {config.multiple}"
        else:
            advice = "channels of the other layers cannot leave; ask for a larger share"
        what = "operations" if by_operations else "channels"
        asked = f"{100 * config.keep.share:.3g} % of the {what}"
        found.append(f"shrink: {asked} were to stay, {100 * share:.3g} % do: {advice}")
    return found


def _size(channels: Channels, names: Collection[str], by_operations: bool) -> float:
    """Multiply-accumulates of the layers `names`, or channels that they compute and may lose."""
    total = 0.0
    for layer in channels.layers:
        mine = [call for call in layer.calls if call.name in names]
        if by_operations:
            described = [describe_layer(channels.graph, call) for call in mine]
            total += sum(item.macs for item in described if item is not None)
        elif mine and not layer.is_depthwise:
            total += np.count_nonzero(layer.outputs != STAYS)
    return total
