"""The step `lowrank`: exact at full rank, smaller at lower ones, and ordinary layers for later
steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.calibrate import calibrate
from tvm_compress.errors import DataError, RecipeError
from tvm_compress.importers import load_model
from tvm_compress.recipe import Recipe, Step, dump_recipe, parse_recipe
from tvm_compress.relay_passes.low_rank import LowRank, observe
from tvm_compress.relay_passes.low_rank_config import Energy, LowRankConfig, Operations, Rank
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.select import list_layers
from tvm_compress.targets import get_target

from .floats import Net, all_layers, build, quantize, run, samples

HOST = get_target("host")
FORMS = ("channels", "rows_and_columns", "tucker", "canonical")


def network(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("a", x, 24)
    x = net.conv_relu("b", x, 32, strides=2, dilation=2, padding=[2, 1, 2, 3])
    x = net.conv_relu("p", x, 40, kernel=1)
    x = net.conv_relu("dw", x, 40, groups=40)
    x = net("flat", op.reshape(x, (1, -1)))
    return net.linear("fc", x, 60)


def split(module: tvm.IRModule, config: LowRankConfig, **others: Any) -> tvm.IRModule:
    schemes = {**all_layers(module, config), **others}
    schemes = {name: item for name, item in schemes.items() if item is not None}
    wanted, statistics = observe(module, schemes), Statistics()
    if wanted is not None:
        data = [{"x": array} for array in samples(module, count=12)]
        statistics = calibrate(load_model(module), data, wanted, target=HOST)
    return LowRank(schemes, statistics)(module)


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
    assert result.script().count("metadata") > 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{layers: all, rank: {operations: 1.5}}", "between 0 and 1"),
        ("{layers: all, rank: {energy: 0}}", "between 0 and 1"),
        ("{layers: all, rank: {rank: 0}}", "from 1 on"),
        ("{layers: all, form: rows}", "form"),
        ("{layers: all, multiple: 0}", "multiple is from 1"),
    ],
)
def test_wrong_recipes(text: str, part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        parse_recipe(f"version: 1\nsteps:\n  - lowrank: {text}\n")


@pytest.mark.parametrize("rank", [Energy(0.9), Operations(0.4), Rank(12)])
def test_recipes_round_trip(rank: Energy | Operations | Rank) -> None:
    recipe = Recipe((Step("lowrank", LowRankConfig("tucker", rank)),))
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_statistics_are_needed() -> None:
    module = build(network, (1, 16, 9, 10))
    with pytest.raises(DataError, match="X·Xᵀ of layer"):
        LowRank(all_layers(module, LowRankConfig()), Statistics())(module)
