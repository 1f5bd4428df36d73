"""`shrink` never loses: numbers of channels that pay on the target, and why others stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.layer_costs import TargetCosts
from tvm_compress.relay_passes.channel_costs import nearby, why_whole
from tvm_compress.relay_passes.channel_groups import find_channels
from tvm_compress.relay_passes.costs import Comparison, Cost, LayerUse
from tvm_compress.relay_passes.layer_spec import LayerSpec
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.select import list_layers
from tvm_compress.relay_passes.shrink import Shrink, mask, read_shrunk
from tvm_compress.relay_passes.shrink_config import ChannelShare, Operations, ShrinkConfig
from tvm_compress.relay_passes.step_notes import read_missed, untouched, with_missed
from tvm_compress.targets import get_target

from .floats import Net, all_layers, build, run, samples


def chain(net: Net, x: relax.Var) -> relax.Var:
    """a => depthwise => b => c, and a linear layer for the outputs."""
    x = net.conv_relu("a", x, 24)
    x = net.conv_relu("dw", x, 24, groups=24)
    x = net.conv_relu("b", x, 40, kernel=1)
    x = net.conv_relu("c", x, 16)
    return net.linear("fc", net("flat", op.mean(x, [2, 3])), 5)


def out_channels(spec: Any) -> int:
    return int(getattr(spec, "out_channels", 0) or spec.out_features)


@dataclass
class Costs:
    """A target of which a function says what a layer with so many outputs takes; it stores weights
    in vectors of `padded` outputs."""

    cost: Callable[[str, int], float]
    padded: int = 1
    lanes: int = 8
    asked: list[list[LayerUse]] = field(default_factory=list)

    def totals(self, alternatives: Sequence[Sequence[LayerUse]]) -> list[Cost]:
        self.asked += [list(uses) for uses in alternatives]
        return [
            Cost(
                sum(self.cost(use.layer, out_channels(use.spec)) * use.calls for use in uses),
                sum(-(-out_channels(use.spec) // self.padded) for use in uses),
                "us",
            )
            for uses in alternatives
        ]

    def sparse(self, layer: str, spec: LayerSpec, kept: np.ndarray) -> Comparison:
        raise NotImplementedError

    def blocks(self, layer: str, spec: LayerSpec) -> tuple[int, ...]:
        raise NotImplementedError


def shrunk(
    module: tvm.IRModule, costs: Any, config: ShrinkConfig, **others: ShrinkConfig | None
) -> tvm.IRModule:
    schemes = {**all_layers(module, config), **others}
    selected = {name: item for name, item in schemes.items() if item is not None}
    return Shrink(selected, Statistics(), costs)(module)


def plain(share: float = 0.5, **options: Any) -> ShrinkConfig:
    return ShrinkConfig(ChannelShare(share), "l1", reconstruct=False, **options)


def proportional(_layer: str, outputs: int) -> float:
    return float(outputs)


def test_what_is_faster_is_as_without_costs() -> None:
    module = build(chain)
    result = shrunk(module, Costs(proportional), plain())
    tvm.ir.assert_structural_equal(result, shrunk(module, None, plain()))
    assert read_shrunk(result)["a"] == "24 -> 8 channels"


def test_neither_faster_nor_smaller_stays_whole() -> None:
    """Weights in vectors of 64 and times that do not change: only `c` gains."""
    module = build(chain)

    def cost(layer: str, outputs: int) -> float:
        return float(outputs if layer in ("c", "fc") else 40)

    result = shrunk(module, Costs(cost, padded=64), plain())
    notes = read_shrunk(result)
    assert notes["a"] == (
        "whole: with 8 of 24 channels its layers take 1.00x the time (120 us instead of 120, "
        "measured) and as many bytes"
    )
    assert notes["b"].startswith("whole: with 16 of 40 channels its layers take ")
    assert "dw" not in notes
    assert notes["c"] == "16 -> 8 channels"
    widths = {layer.name: max(layer.weight_shape or ()) for layer in list_layers(result)}
    assert (widths["a"], widths["b"]) == (24, 40)
    insisting = shrunk(module, Costs(cost, padded=64), plain(insist=True))
    tvm.ir.assert_structural_equal(
        insisting["main"].without_attr("tvm_compress.shrunk").body,
        shrunk(module, None, plain())["main"].body,
    )
    notes = read_shrunk(insisting)
    assert notes["a"].startswith("24 -> 8 channels; insisted on: with 8 of 24 channels its layers")
    assert notes["c"] == "16 -> 8 channels"


def test_noise_is_no_gain() -> None:
    module = build(chain)

    def cost(share: float) -> Costs:
        return Costs(lambda _, outputs: 100.0 if outputs in (24, 40) else share, padded=64)

    assert read_shrunk(shrunk(module, cost(97), plain()))["b"].startswith("whole: ")
    assert read_shrunk(shrunk(module, cost(80), plain()))["b"] == "40 -> 16 channels"


def test_smaller_and_slower_is_kept_and_said() -> None:
    module = build(chain)
    slow = Costs(lambda _, outputs: 1e3 - outputs)
    notes = read_shrunk(shrunk(module, slow, plain(0.4), a=None, b=None, dw=None))
    assert notes["c"] == "16 -> 8 channels"  # hardly slower
    slower = Costs(lambda _, outputs: 1e3 / outputs)
    notes = read_shrunk(shrunk(module, slower, plain(0.4), a=None, b=None, dw=None))
    assert notes["c"].startswith("16 -> 8 channels; smaller, not faster: with 8 of 16 channels")
    assert "fewer bytes (" in notes["c"]


def test_numbers_nearby_that_are_fast() -> None:
    """A target that is slow for all but whole registers of 8."""
    module = build(chain)
    ragged = Costs(lambda _, outputs: float(outputs if outputs % 8 == 0 else 10 * outputs))
    result = shrunk(module, ragged, plain(multiple=4))
    notes = read_shrunk(result)
    assert notes["a"].startswith(
        "24 -> 8 channels; in the place of 12: with 12 of 24 channels its layers take "
    )
    assert notes["b"].startswith("40 -> 16 channels; in the place of 20: ")
    insisting = shrunk(module, ragged, plain(multiple=4, insist=True))
    assert read_shrunk(insisting)["a"].startswith("24 -> 12 channels; insisted on: ")
    zeros, channels, keep = mask(
        module, all_layers(module, plain(multiple=4)), Statistics(), ragged
    )
    assert len(channels.layers) == 5 and not keep.all()
    for array in samples(module, count=1):
        np.testing.assert_allclose(
            run(zeros, array, level=0), run(result, array, level=0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("count", "size", "unit", "multiple", "expected"),
    [
        (20, 40, 1, None, [24, 16]), (20, 40, 1, 4, [24, 16]), (16, 40, 1, None, [24, 8]),
        (10, 40, 1, 5, [15, 5]), (3, 24, 1, None, [8]), (3, 6, 4, None, [4, 2]),
        (38, 40, 1, 1, [39, 37, 32]),
    ],
)  # fmt: skip
def test_nearby(
    count: int, size: int, unit: int, multiple: int | None, expected: list[int]
) -> None:
    found = nearby(count, size, unit, multiple, lanes=8)
    assert found == expected
    assert all(n * unit % (multiple or 8) == 0 for n in found)


def test_all_layers_of_a_group_count() -> None:
    """With the channels of other groups that are left."""
    module = build(chain)
    costs = Costs(proportional)
    shrunk(module, costs, plain())
    whole, left = costs.asked[:2]
    assert [use.layer for use in whole] == ["a", "dw", "b"] == [use.layer for use in left]
    a, dw, b = (use.spec for use in left)
    assert (a.out_channels, dw.groups, dw.in_channels, b.in_channels) == (8, 8, 8, 8)
    assert b.out_channels == whole[2].spec.out_channels == 16
    assert whole[1].spec.groups == 24
    assert {use.spec.macs for use in left} == {
        layer.macs
        for layer in list_layers(shrunk(module, None, plain()))
        if layer.name in ("a", "dw", "b")
    }


def test_figures_decide_again() -> None:
    """What was compared once says the same later, with nothing to run kernels."""
    module, target = build(chain), get_target("host")
    schemes = all_layers(module, plain(0.7))

    class Bench:
        unit = "us"

        def costs(self, kernels: Sequence[Any]) -> list[float]:
            return [100.0 / out_channels(kernel.spec) for kernel in kernels]

    first = TargetCosts(target, Bench())
    result = Shrink(schemes, Statistics(), first)(module)
    again = TargetCosts(target, known=first.used)
    tvm.ir.assert_structural_equal(Shrink(schemes, Statistics(), again)(module), result)
    assert first.used == again.used
    assert any(", measured)" in words for words in read_shrunk(result).values())
    predicted = Shrink(schemes, Statistics(), TargetCosts(target))(module)
    assert not any("measured" in words for words in read_shrunk(predicted).values())


def test_why_layers_keep_their_channels() -> None:
    def tied(net: Net, x: relax.Var) -> relax.Var:
        x = net.conv_relu("stem", x, 16)
        x = net("sum", op.add(net.conv_relu("a", x, 16), x))
        return net.conv_bias("head", net.conv_relu("b", x, 8), 3)

    module = build(tied)
    schemes = all_layers(module, plain(multiple=8))
    del schemes["stem"]
    result = Shrink(schemes, Statistics())(module)
    assert untouched("shrink", result, schemes) == {
        "a": "stem computes the same channels and was not selected",
        "b": "its 8 channels are no more than multiple: 8",
        "head": "its channels reach the inputs or outputs or an operator that keeps all",
    }
    free = all_layers(module, ShrinkConfig(Operations(0.9), "l1", reconstruct=False))
    assert set(why_whole(find_channels(module["main"]), free, free)) == {"head"}


def test_what_was_asked_for_and_not_reached() -> None:
    """How much, and what to change."""
    module = build(chain)

    def missed(config: ShrinkConfig, costs: Any = None) -> tuple[str, ...]:
        schemes = all_layers(module, config)
        result = Shrink(schemes, Statistics(), costs)(module)
        return read_missed(with_missed(result, "shrink", module, schemes))

    wide = ShrinkConfig(Operations(0.2), "l1", reconstruct=False, multiple=16)
    assert missed(replace(wide, multiple=4)) == ()
    (words,) = missed(wide)
    assert re.fullmatch(
        r"shrink: 20 % of the operations were to stay, [3-6]\d\.?\d* % do: try a smaller multiple "
        r"than 16",
        words,
    )
    (words,) = missed(plain(0.3), Costs(lambda _, __: 1.0, padded=64))
    assert words == (
        "shrink: 30 % of the channels were to stay, 100 % do: the target gains nothing by more in "
        "3 layers; insist: true takes it all the same"
    )
    (words,) = missed(ShrinkConfig(Operations(1e-4), "l1", reconstruct=False))
    assert words.endswith("channels of the other layers cannot leave; ask for a larger share")
