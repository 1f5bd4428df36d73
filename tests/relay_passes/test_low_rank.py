"""The step `lowrank`: exact at full rank, smaller at lower ones, and ordinary layers for later
steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.calibrate import calibrate
from tvm_compress.calibrate_towards import calibrate_towards
from tvm_compress.errors import DataError, RecipeError
from tvm_compress.importers import load_model
from tvm_compress.recipe import Recipe, Step, dump_recipe, parse_recipe
from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.costs import MEASURED, Comparison, Cost, LayerCosts, LayerUse
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.layer_spec import LayerSpec
from tvm_compress.relay_passes.low_rank import LowRank, observe, read_low_rank, stages
from tvm_compress.relay_passes.low_rank_config import (
    Bytes,
    Energy,
    Latency,
    LowRankConfig,
    Network,
    Operations,
    Rank,
    Residual,
    SharedOut,
)
from tvm_compress.relay_passes.low_rank_ranks import decide
from tvm_compress.relay_passes.numerics.sparsity_pattern import Block, KernelShape, SemiStructured
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.select import list_layers
from tvm_compress.targets import get_target

from .floats import Net, all_layers, build, describe, quantize, run, samples

HOST = get_target("host")
FORMS = ("channels", "rows_and_columns", "tucker", "canonical")


def network(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("a", x, 24)
    x = net.conv_relu("b", x, 32, strides=2, dilation=2, padding=[2, 1, 2, 3])
    x = net.conv_relu("p", x, 40, kernel=1)
    x = net.conv_relu("dw", x, 40, groups=40)
    x = net("mean", op.mean(x, [2, 3]))
    return net.linear("fc", x, 60)


@dataclass
class Costs:
    """A machine whose kernels take a microsecond for so many multiply-adds, and one for the call;
    it stores weights in pieces of `padded` bytes."""

    macs: float = 1000.0
    padded: int = 1
    lanes: int = 4
    asked: list[str] = field(default_factory=list)

    def totals(self, alternatives: Sequence[Sequence[LayerUse]]) -> list[Cost]:
        self.asked.append(alternatives[0][0].layer)
        return [
            Cost(
                sum(1 + use.spec.macs / self.macs for use in uses),
                sum(-(-4 * prod(use.spec.weight_shape) // self.padded) for use in uses)
                * self.padded,
                MEASURED,
            )
            for uses in alternatives
        ]

    def sparse(self, layer: str, spec: LayerSpec, kept: np.ndarray) -> Comparison:
        raise NotImplementedError

    def blocks(self, layer: str, spec: LayerSpec) -> tuple[int, ...]:
        raise NotImplementedError


def split(
    module: tvm.IRModule, config: LowRankConfig, costs: LayerCosts | None = None, **others: Any
) -> tvm.IRModule:
    schemes = {**all_layers(module, config), **others}
    schemes = {name: item for name, item in schemes.items() if item is not None}
    wanted, statistics = observe(module, schemes), Statistics()
    if wanted is not None:
        data = [{"x": array} for array in samples(module, count=12)]
        statistics = calibrate(load_model(module), data, wanted, target=HOST)
    return LowRank(schemes, statistics, costs)(module)


def error(module: tvm.IRModule, other: tvm.IRModule) -> float:
    arrays = samples(module, count=12)
    differences = [run(module, array) - run(other, array) for array in arrays]
    size = sum(float((run(module, array) ** 2).sum()) for array in arrays)
    return sum(float((d**2).sum()) for d in differences) / size


def macs(module: tvm.IRModule) -> int:
    return sum(layer.macs for layer in list_layers(module))


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_the_layer(form: str) -> None:
    """Of random weights even high ranks lose something; the windows are in place."""
    module = build(network, (1, 16, 9, 10))
    ranks = {"channels": 20, "rows_and_columns": 24, "tucker": 18, "canonical": 60}
    config = LowRankConfig(form, Rank(ranks[form]), data_aware=False)  # type: ignore[arg-type]
    result = split(module, config, fc=None, p=None)
    names = [layer.name for layer in list_layers(result)]
    count = {"channels": 2, "rows_and_columns": 2, "tucker": 3, "canonical": 4}[form]
    assert [name for name in names if name.startswith("b")] == [
        *(f"b_part{n}" for n in range(1, count)), "b",
    ]  # fmt: skip
    assert "dw_part1" not in names and "p_part1" not in names
    assert macs(result) < macs(module)
    assert error(module, result) < 0.6  # a window that is out of place gives more than 1


@pytest.mark.parametrize("data_aware", [False, True])
def test_tucker_of_few_inputs(data_aware: bool) -> None:
    """The core has at most as many outputs as its window holds values."""

    def body(net: Net, x: relax.Var) -> relax.Var:
        return net.conv_relu("a", x, 32)

    module = build(body, (1, 3, 8, 9))
    result = split(module, LowRankConfig("tucker", Rank(14), data_aware=data_aware))
    assert read_low_rank(result)["a"] == "tucker, rank 14 of 27"
    core = next(layer for layer in list_layers(result) if layer.name == "a_part2")
    assert core.weight_shape == (14, 2, 3, 3)
    assert error(module, result) < 1


def test_exact_where_the_weight_has_the_rank() -> None:
    """Weights made of few terms come back as they were."""

    def body(net: Net, x: relax.Var) -> relax.Var:
        u, v = net.rng.normal(size=(3, 1, 12, 4)), net.rng.normal(size=(1, 3, 4, 20))
        weight = np.einsum("hyir,xwro->oihw", u, v).astype(np.float32)
        y = net("a", op.nn.conv2d(x, relax.const(weight), strides=(2, 1), padding=(1, 0, 1, 2)))
        return net("act", op.nn.relu(y))

    module = build(body, (1, 12, 8, 9))
    for config in (
        LowRankConfig("rows_and_columns", Rank(4), data_aware=False),
        LowRankConfig("rows_and_columns", Energy(0.99999), multiple=1),
        LowRankConfig("channels", Rank(12), data_aware=False),
    ):
        assert error(module, split(module, config)) < 1e-6


def test_less_is_worse_and_data_helps() -> None:
    module = build(network, (1, 16, 9, 10))
    errors = []
    for share in (0.7, 0.5, 0.3):
        result = split(module, LowRankConfig(rank=Operations(share), multiple=1))
        errors.append(error(module, result))
        for layer in list_layers(module):
            parts = [n for n in list_layers(result) if n.name.startswith(f"{layer.name}_part")]
            last = next(n for n in list_layers(result) if n.name == layer.name)
            if parts:
                total = sum(np.prod(n.weight_shape or ()) for n in (*parts, last))
                assert total <= share * np.prod(layer.weight_shape or ())
    assert errors == sorted(errors)
    plain = split(module, LowRankConfig(rank=Operations(0.5), multiple=1, data_aware=False))
    assert errors[1] < error(module, plain)


def test_ranks_are_multiples_and_large_ones_do_nothing() -> None:
    module = build(network, (1, 16, 9, 10))
    result = split(module, LowRankConfig(rank=Operations(0.5)))
    for layer in list_layers(result):
        if "_part" in layer.name:
            shape = layer.weight_shape or ()
            rank = shape[0] if len(shape) == 4 else shape[1]
            assert rank % 8 == 0
    whole = split(module, LowRankConfig(rank=Rank(1000)))
    assert [n.name for n in list_layers(whole)] == [n.name for n in list_layers(module)]


def test_stages_make_up_for_what_was_lost() -> None:
    """Behind split layers and their activations: nearer to the original than all at once."""

    def body(net: Net, x: relax.Var) -> relax.Var:
        x = net.conv_relu("a", x, 12)
        return net("c_clip", op.clip(net.conv("c", x, 12, groups=2), 0.0, 1.5))

    module = build(body, (1, 8, 7, 6))
    linear = LowRankConfig(rank=Rank(3))
    nonlinear = replace(linear, nonlinear=True)
    parts = stages(module, all_layers(module, nonlinear))
    assert [set(part) for part in parts] == [{"a"}, {"c"}]
    wanted = observe(module, all_layers(module, nonlinear))
    assert wanted is not None and set(wanted.patches) == {"a", "c"}
    data = [{"x": array} for array in samples(module, count=12)]
    at_once = calibrate(load_model(module), data, wanted, target=HOST)
    errors = [error(module, LowRank(all_layers(module, linear), at_once)(module))]
    for config in (linear, nonlinear):
        first = LowRank({"a": config}, at_once)(module)
        behind = calibrate_towards(
            module, load_model(first), {"c"}, data, target=HOST, rows=wanted.patches
        )
        errors.append(error(module, LowRank({"c": config}, behind)(first)))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.9 * errors[0]


def test_layers_without_an_activation_are_linear() -> None:
    """What is added to a layer's outputs leaves them linear; biases change all the same."""

    def body(net: Net, x: relax.Var) -> relax.Var:
        y = net("y", op.nn.relu(net("sum", op.add(net.conv("a", x, 16), x))))
        return net.conv_bias("z", y, 16)

    module = build(body, (1, 16, 6, 6))
    config = LowRankConfig(rank=Rank(4), nonlinear=True)
    wanted = observe(module, all_layers(module, config))
    assert wanted is not None and not wanted.patches
    result = split(module, config)
    assert set(ranks(result)) == {"a", "z"}
    assert describe(result)["a_corrected"] == "add(a)"
    assert describe(result)["sum"] == "add(a_corrected, x)"


def ranks(module: tvm.IRModule) -> dict[str, int]:
    """Layer => channels between the first two parts."""
    return {
        layer.name.removesuffix("_part1"): (layer.weight_shape or ())[
            0 if layer.op.startswith("conv") else 1
        ]
        for layer in list_layers(module)
        if layer.name.endswith("_part1")
    }


def plain(rank: Any, **options: Any) -> LowRankConfig:
    return LowRankConfig(rank=rank, data_aware=False, **options)


def test_ranks_by_time_on_the_target() -> None:
    """The largest multiple of the target's channels whose kernels take the share."""
    module = build(network, (1, 16, 9, 10))
    costs = Costs(macs=100.0)
    result = split(module, plain(Latency(0.5)), costs, dw=None)
    found = ranks(result)
    assert set(found) == {"a", "b", "p", "fc"} == set(costs.asked)
    for layer in list_layers(module):
        if layer.name not in found:
            continue
        parts = [n for n in list_layers(result) if n.name in (layer.name, f"{layer.name}_part1")]
        rank, whole = found[layer.name], 1 + layer.macs / costs.macs
        assert rank % 4 == 0
        time = sum(1 + part.macs / costs.macs for part in parts)
        assert time <= 0.5 * whole < time + 4 * (time - 2) / rank
    notes = read_low_rank(result)
    assert notes["b"] == f"channels, rank {found['b']} of 32"
    with pytest.raises(RecipeError, match="what layers cost on a target"):
        split(module, plain(Latency(0.5)))


def test_no_layer_becomes_a_loss() -> None:
    """Where a call costs more than what is saved, layers stay whole, and it is said why."""
    module = build(network, (1, 16, 9, 10))
    slow = Costs(macs=1e7)
    result = split(module, plain(Operations(0.5)), slow)
    tvm.ir.assert_structural_equal(result["main"].body, module["main"].body)
    note = read_low_rank(result)["a"]
    assert re.fullmatch(
        r"whole: with rank 8 its parts take 1\.9\dx the time \(\S+ us instead of \S+, measured\) and "
        r"\d\d % fewer bytes \(\d+ instead of 13824\); a smaller one may take 1\.1x",
        note,
    ), note
    insisting = split(module, plain(Operations(0.5), insist=True), slow)
    assert set(ranks(insisting)) == {"a", "b", "p", "fc"}
    assert "; insisted on: its parts take 1.9" in read_low_rank(insisting)["a"]


class Share(Costs):
    """Parts that take a share of the layer's time."""

    def __init__(self, share: float, padded: int) -> None:
        super().__init__(padded=padded)
        self.share = share

    def totals(self, alternatives: Sequence[Sequence[LayerUse]]) -> list[Cost]:
        whole, parts = super().totals(alternatives)
        return [whole, replace(parts, time=self.share * whole.time)]


def test_parts_are_clearly_faster_or_smaller() -> None:
    module = build(network, (1, 16, 9, 10))
    whole_vectors = 1 << 20
    for share, padded, start, end in (
        (0.9, 1, "channels, rank 8 of 24", "24"),
        (0.97, 1, "channels, rank 8 of 24; smaller, not faster: its parts take 0.97x", ")"),
        (1.2, 1, "whole: with rank 8 its parts take 1.20x", "a smaller one may take 1.1x"),
        (0.9, whole_vectors, "channels, rank 8 of 24", "24"),
        (0.97, whole_vectors, "whole: with rank 8 its parts take 0.97x", "has to win by 5 %"),
    ):
        note = read_low_rank(split(module, plain(Rank(8)), Share(share, padded)))["a"]
        assert note.startswith(start) and note.endswith(end), note


@pytest.mark.parametrize("asked", [Bytes(0.5), Network(0.5, "bytes")])
def test_bytes_are_saved_whatever_the_time_and_it_is_said(asked: Any) -> None:
    module = build(network, (1, 16, 9, 10))
    slow = Costs(macs=1e7)
    schemes = all_layers(module, plain(asked))
    del schemes["dw"]
    decided = decide(module, schemes, Statistics(), costs=slow)
    assert not any(config.insist for config in decided.values())
    result = LowRank(decided, Statistics(), slow)(module)
    notes = read_low_rank(result)
    assert ranks(result) and set(ranks(result)) == set(decided)
    for name in ranks(result):
        assert re.search(
            r"; smaller, not faster: its parts take (1\.9\d|2\.00)x the time .* fewer bytes",
            notes[name],
        ), notes[name]
        assert "insisted" not in notes[name]
    # Neither faster nor smaller: bytes were asked for, and none would be saved.
    vectors = Costs(macs=1e7, padded=1 << 20)
    result = LowRank(decided, Statistics(), vectors)(module)
    assert not ranks(result)
    assert all("has to win by 5 %" in read_low_rank(result)[name] for name in decided)


def test_why_no_rank_takes_the_time() -> None:
    module = build(network, (1, 16, 9, 10))
    notes = read_low_rank(split(module, plain(Latency(0.5)), Costs(macs=1e7), dw=None))
    assert re.fullmatch(
        r"whole: even rank 4, the smallest, takes 1\.9\dx of its time on the target; 0\.5x is asked "
        r"for",
        notes["a"],
    ), notes["a"]

    class Uneven(Costs):
        """Ranks of 16 are fast, smaller ones slow, as of registers that are not filled."""

        def totals(self, alternatives: Sequence[Sequence[LayerUse]]) -> list[Cost]:
            whole, parts = super().totals(alternatives)
            rank = getattr(alternatives[1][0].spec, "out_channels", 0)
            return [whole, replace(parts, time=whole.time * (0.6 if rank >= 12 else 0.9))]

    notes = read_low_rank(split(module, plain(Latency(0.5)), Uneven(), fc=None, dw=None))
    assert notes["a"].startswith("whole: even rank 16, the fastest compared, takes 0.60x of its ")


def test_ranks_by_bytes() -> None:
    """A strided layer computes its first part at more positions: bytes and operations differ."""
    module = build(network, (1, 16, 9, 10))
    form: Any = "rows_and_columns"
    by_bytes = ranks(split(module, plain(Bytes(0.5), form=form, multiple=1)))
    by_operations = ranks(split(module, plain(Operations(0.5), form=form, multiple=1)))
    # b is 3x3 from 24 to 32 channels.
    assert by_bytes["b"] == 24 * 32 * 9 // 2 // (3 * 24 + 3 * 32)
    assert by_operations["b"] < by_bytes["b"]


@pytest.mark.parametrize("of", ["operations", "bytes"])
def test_ranks_under_a_total(of: Any) -> None:
    """The layer that has few directions gives way; the total holds."""

    def body(net: Net, x: relax.Var) -> relax.Var:
        flat = (net.rng.normal(size=(32, 4)) @ net.rng.normal(size=(4, 32))).astype(np.float32)
        x = net("few", op.matmul(x, relax.const(flat)))
        return net.linear("many", x, 32)

    module = build(body, (1, 32))
    result = split(module, plain(Network(0.7, of), multiple=4))
    assert ranks(result) == {"few": 4}
    decided = decide(module, all_layers(module, plain(Network(0.7, of), multiple=4)), Statistics())
    assert decided == {"few": plain(SharedOut(4, of), multiple=4)}
    assert macs(result) <= 0.7 * macs(module)
    assert read_low_rank(result)["many"] == "whole: the total needs no split of it"
    assert set(ranks(split(module, plain(Network(0.3, of), multiple=1)))) == {"few", "many"}
    with pytest.raises(RecipeError, match="more than the total"):
        split(module, plain(Network(0.01, of)))


@pytest.mark.parametrize(
    ("residual", "zeros"),
    [
        (Residual(0.9, Block(8, 1)), 0.9),
        (Residual(pattern=SemiStructured(1, 8, 8)), 0.875),
        (Residual(pattern=KernelShape(1)), 8 / 9),
    ],
)
def test_residual_is_a_layer_beside_the_parts(residual: Residual, zeros: float) -> None:
    module = build(network, (1, 16, 9, 10))
    config = LowRankConfig(rank=Operations(0.5), residual=residual, multiple=1)
    others: dict[str, Any] = dict.fromkeys(("a", "p", "dw", "fc"))
    result = split(module, config, **others)
    weights = {
        binding.var.name: ir.constant(binding.value.args[1])
        for binding in ir.bindings(result["main"])
        if binding.var.name.startswith("b_part") or binding.var.name == "b_residual"
    }
    assert set(weights) == {"b_part1", "b_part2", "b_residual"}
    stored = {name: np.count_nonzero(weight) for name, weight in weights.items()}
    size = 24 * 32 * 9
    assert stored["b_residual"] == pytest.approx((1 - zeros) * size, rel=0.05)
    assert sum(stored.values()) <= 0.51 * size
    rank = ranks(result)["b"]
    assert read_low_rank(result)["b"] == (
        f"channels, rank {rank} of 32 + {residual.pattern.words} {100 * zeros:.0f} % zeros"
    )
    without = split(module, LowRankConfig(rank=Rank(rank)), **others)
    assert error(module, result) < error(module, without)


@pytest.mark.parametrize("form", FORMS)
def test_groups_are_split_each_by_itself(form: Any) -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        return net.conv_relu("g", x, 24, groups=2)

    module = build(body, (1, 24, 6, 7))
    rank = {"channels": 8, "rows_and_columns": 16, "tucker": 8, "canonical": 12}[form]
    result = split(module, LowRankConfig(form, Rank(rank), multiple=1))
    assert "g_part1" in [layer.name for layer in list_layers(result)]
    assert macs(result) < macs(module)
    assert error(module, result) < 0.5


def test_conv1d() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        y = net("c", op.nn.conv1d(x, net.array(24, 16, 5), strides=2, padding=(1, 2)))
        return net("act", op.nn.relu(y))

    module = build(body, (1, 16, 21))
    # No 1-D kernel has rows and columns.
    result = split(module, LowRankConfig("rows_and_columns", Rank(16)))
    shapes = {layer.name: layer.weight_shape for layer in list_layers(result)}
    assert shapes == {"c_part1": (16, 16, 5), "c": (24, 16, 1)}
    assert error(module, result) < 0.3


def test_parts_are_quantised_like_any_layer() -> None:
    module = split(build(network, (1, 16, 9, 10)), LowRankConfig(rank=Operations(0.5)))
    assert error(module, quantize(module)) < 0.3
    assert {layer.name for layer in list_layers(quantize(module)) if layer.is_quantized} == {
        layer.name for layer in list_layers(module)
    }


def test_steps_of_a_loop_share_their_parts() -> None:
    def loop(net: Net, x: relax.Var) -> relax.Var:
        weight = net.array(16, 16)
        for step in range(3):
            x = net(f"h{step}", op.tanh(net(f"s{step}", op.matmul(x, weight))))
        return x

    result = split(build(loop, (2, 16)), LowRankConfig(rank=Rank(4)))
    names = [layer.name for layer in list_layers(result)]
    assert names == ["s0_part1", "s0", "s1_part1", "s1", "s2_part1", "s2"]
    calls = {item.name: value for item, value in Graph(result["main"]).values.items()}
    for step in ("s1", "s2"):  # one constant: a loop stays a loop
        for part in ("", "_part1"):
            assert calls[step + part].args[1].same_as(calls[f"s0{part}"].args[1])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{layers: all, rank: {operations: 1.5}}", "between 0 and 1"),
        ("{layers: all, rank: {energy: 0}}", "between 0 and 1"),
        ("{layers: all, rank: {rank: 0}}", "from 1 on"),
        ("{layers: all, form: rows}", "form"),
        ("{layers: all, multiple: 0}", "multiple is from 1"),
        ("{layers: all, multiple: most}", "multiple"),
        ("{layers: all, nonlinear: true, form: tucker}", "nonlinear: true is for form: channels"),
        ("{layers: all, residual: {sparsity: 1}}", "between 0 and 1"),
        (
            "{layers: all, residual: {sparsity: 0.9, pattern: kernel_shape}}",
            "leave one of them out",
        ),
        ("{layers: all, rank: {network: {share: 2}}}", "between 0 and 1"),
    ],
)
def test_wrong_recipes(text: str, part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        parse_recipe(f"version: 1\nsteps:\n  - lowrank: {text}\n")


@pytest.mark.parametrize(
    "rank",
    [Energy(0.9), Operations(0.4), Bytes(0.3), Latency(0.5), Network(0.5, "bytes"), Rank(12)],
)
def test_recipes_round_trip(rank: Any) -> None:
    residual = Residual(0.9, Block(8, 1))
    configs = (
        LowRankConfig("tucker", rank, multiple=4),
        LowRankConfig(rank=rank, residual=residual),
    )
    recipe = Recipe(tuple(Step("lowrank", config) for config in configs))
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_statistics_are_needed() -> None:
    module = build(network, (1, 16, 9, 10))
    with pytest.raises(DataError, match="X·Xᵀ of layer"):
        LowRank(all_layers(module, LowRankConfig()), Statistics())(module)
