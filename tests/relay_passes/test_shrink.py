"""The step `shrink`: how many channels leave, which ones, and what the layers behind them become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.build import lower
from tvm_compress.calibrate import calibrate
from tvm_compress.data import load_data
from tvm_compress.errors import DataError, RecipeError
from tvm_compress.flow import compress_module
from tvm_compress.importers import load_model
from tvm_compress.recipe import dump_recipe, parse_recipe
from tvm_compress.relay_passes.channel_shares import decide, undecided
from tvm_compress.relay_passes.ir import shape_of
from tvm_compress.relay_passes.numerics.channel_budget import (
    CountOption,
    OperationCounts,
    cheapest_within,
    counts_within,
    snap,
)
from tvm_compress.relay_passes.numerics.loss_line import LossLine
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.select import list_layers
from tvm_compress.relay_passes.shrink import Shrink, mask, observe, read_shrunk
from tvm_compress.relay_passes.shrink_config import ChannelShare, Operations, ShrinkConfig
from tvm_compress.report.schemes import describe_changes, describe_schemes
from tvm_compress.targets import get_target

from .floats import Net, all_layers, build, quantize, run, samples

HOST = get_target("host")


def block(net: Net, x: relax.Var) -> relax.Var:
    """A residual block behind a stem, then a linear layer."""
    x = net.conv_relu("stem", x, 16)
    inner = net.conv_relu("b", net.conv_relu("a", x, 24), 16)
    x = net("sum", op.add(inner, x))
    return net.linear("fc", net("flat", op.mean(x, [2, 3])), 5)


def redundant(net: Net, x: relax.Var) -> relax.Var:
    """Each channel of `a` comes twice, as every second one scaled: half of them are enough."""
    half = net.rng.normal(0, 0.2, (8, 4, 3, 3))
    weight = np.stack([half, half], 1).reshape(16, 4, 3, 3).astype(np.float32)
    bias = np.repeat(net.rng.normal(0, 0.2, 8), 2).astype(np.float32).reshape(1, 16, 1, 1)
    x = net("a", op.nn.conv2d(x, relax.const(weight), padding=1))
    x = net("a_relu", op.nn.relu(net("a_bias", op.add(x, relax.const(bias)))))
    x = net("scaled", op.multiply(x, net.array(1, 16, 1, 1)))
    return net.conv_bias("b", x, 6)


def statistics_of(module: tvm.IRModule, schemes: Mapping[str, ShrinkConfig]) -> Statistics:
    wanted = observe(module, schemes)
    if wanted is None:
        return Statistics()
    arrays = samples(module, count=24)
    labels = np.random.default_rng(3).integers(0, 5, len(arrays))
    model = load_model(module)
    data: Any = [{"x": array} for array in arrays]
    if wanted.gradients:
        data = load_data({"x": np.concatenate(arrays), "labels": labels}, model)
    return calibrate(model, data, wanted, target=HOST)


def shrink(module: tvm.IRModule, config: ShrinkConfig, **others: Any) -> tvm.IRModule:
    schemes = {**all_layers(module, config), **others}
    schemes = {name: item for name, item in schemes.items() if item is not None}
    return Shrink(schemes, statistics_of(module, schemes))(module)


def macs(module: tvm.IRModule) -> int:
    return sum(layer.macs for layer in list_layers(module))


def outputs(module: tvm.IRModule) -> dict[str, int]:
    """Layer => its output channels."""
    return {layer.name: max(layer.weight_shape or (0,)) for layer in list_layers(module)}


def error(module: tvm.IRModule, other: tvm.IRModule) -> float:
    arrays = samples(module, count=6, seed=7)
    pairs = [(run(module, array, level=0), run(other, array, level=0)) for array in arrays]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs))


# ---- how many ------------------------------------------------------------------------------------


def test_counts_are_multiples_and_small_groups_stay() -> None:
    sizes, multiples = np.array([64, 60, 8, 5, 12]), np.array([8, 8, 8, 8, 2])
    assert snap(sizes * 0.5, sizes, multiples).tolist() == [32, 24, 8, 5, 6]
    assert snap(sizes * 1.0, sizes, multiples).tolist() == sizes.tolist()
    assert snap(sizes * 0.01, sizes, multiples).tolist() == [8, 8, 8, 5, 2]


@pytest.mark.parametrize(("lanes", "multiple"), [(None, 8), (16, 16), (8, 8), (1, 4)])
def test_multiples_are_what_a_register_holds(lanes: int | None, multiple: int) -> None:
    tried = ShrinkConfig().multiples_for(lanes)
    assert tried[0] == multiple and tried[-1] == 1
    assert ShrinkConfig(multiple=3).multiples_for(lanes) == [3]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_counts_take_the_operations_asked_for(share: float) -> None:
    """Against every count of two groups that a layer chain has."""
    sizes = np.array([32, 48])
    whole = np.array([100.0, 500.0, 50.0])  # -> first, first -> second, second ->
    by_output = np.array([[1 / 32, 0], [0, 1 / 48], [0, 0]])
    by_input = np.array([[0, 0], [1 / 32, 0], [0, 1 / 48]])
    operations = OperationCounts(whole, by_output, by_input, sizes)
    limit = share * whole.sum()
    counts = counts_within(operations, limit, np.array([4, 4]), lambda level: level * sizes)
    assert operations.total(sizes) == pytest.approx(650)
    assert operations.total(counts) <= limit
    for group in range(2):  # nothing more fits
        more = counts.copy()
        more[group] += 4
        assert operations.total(more) > limit or more[group] > sizes[group]
    first, second = counts / sizes
    assert abs(first - second) < 0.15


@pytest.mark.parametrize(
    ("scope", "criterion"), [("group", "l1"), ("network", "l1"), ("network", "surgeon")]
)
def test_layers_keep_the_share_of_operations(scope: Any, criterion: Any) -> None:
    module = build(block)
    result = shrink(module, ShrinkConfig(Operations(0.6), criterion, scope, reconstruct=False))
    assert 0.3 < macs(result) / macs(module) <= 0.6
    assert shape_of(result["main"].body.body) == shape_of(module["main"].body.body)
    notes = read_shrunk(result)
    widths = [int(text.split()[2]) for text in notes.values()]
    assert notes
    assert all(width % 8 == 0 for width in widths)


def test_totals_go_where_they_cost_least() -> None:
    """Against every choice of two groups in a chain of layers."""
    sizes = np.array([16, 16])
    whole = np.array([100.0, 500.0, 50.0])
    by_output = np.array([[1 / 16, 0], [0, 1 / 16], [0, 0]])
    by_input = np.array([[0, 0], [1 / 16, 0], [0, 1 / 16]])
    operations = OperationCounts(whole, by_output, by_input, sizes)
    for price in ([1.0, 100.0], [100.0, 1.0], [1.0, 1.0]):
        options = [
            [CountOption(n / 16, np.array([n]), cost * (16 - n) ** 2) for n in range(16, 0, -4)]
            for cost in price
        ]
        found = cheapest_within(operations, 400.0, options)
        assert operations.total(np.concatenate([item.counts for item in found])) <= 400
        best = min(
            a.loss + b.loss
            for a in options[0]
            for b in options[1]
            if operations.total(np.concatenate([a.counts, b.counts])) <= 400
        )
        assert sum(item.loss for item in found) <= 1.3 * best
    line = LossLine.through([(2.0, 3.0), (1.0, 2.0)])
    assert [line.at(x) for x in (0.0, 0.5, 1.5, 4.0)] == pytest.approx([0, 1, 2.5, 6])


def test_channels_leave_where_the_outputs_lose_least() -> None:
    """Half of what `a` computes comes twice: nothing of `b` has to leave."""

    def network(net: Net, x: relax.Var) -> relax.Var:
        x = redundant(net, x)
        return net.conv_bias("c", net("act", op.nn.relu(x)), 3)

    module = build(network, (1, 4, 7, 7))
    config = ShrinkConfig(Operations(0.6), multiple=1)
    schemes = all_layers(module, config)
    assert set(undecided(schemes)) == set(schemes)
    statistics = statistics_of(module, schemes)
    decided = decide(module, schemes, statistics, lambda other: error(module, other))
    assert not undecided(decided)
    result = Shrink(decided, statistics)(module)
    assert macs(result) <= 0.6 * macs(module)
    notes = read_shrunk(result)
    assert notes["a"] == "16 -> 8 channels" and notes["b"] == "16 -> 8 inputs"
    even = Shrink(all_layers(module, replace(config, scope="group")), statistics)(module)
    assert error(module, result) < 0.1 * error(module, even)
    with pytest.raises(DataError, match="losses on calibration data"):
        decide(module, schemes, statistics)
    # Outputs of the network cannot leave: there is nothing to measure.
    last = {"c": config}
    stays = decide(module, last, statistics, lambda other: error(module, other))
    assert not undecided(stays) and macs(Shrink(stays, statistics)(module)) == macs(module)


def test_layers_that_are_not_selected_keep_their_channels() -> None:
    module = build(block)
    result = shrink(module, ShrinkConfig(ChannelShare(0.5), "l1", reconstruct=False), stem=None)
    # `b` ends in the sum that the stem feeds, so only `a` can lose any.
    assert read_shrunk(result) == {"a": "24 -> 8 channels", "b": "24 -> 8 inputs"}
    assert describe_changes(result)["a"] == "24 -> 8 channels"


# ---- which, and what the others become -----------------------------------------------------------


@pytest.mark.parametrize("criterion", ["merging", "lasso", "thinet", "surgeon", "discrimination"])
def test_what_is_there_twice_leaves(criterion: Any) -> None:
    module = build(redundant)
    reconstructs = criterion != "merging"
    config = ShrinkConfig(ChannelShare(0.5), criterion, reconstruct=reconstructs)
    if criterion == "discrimination":  # needs scores of classes behind it
        module = build(lambda net, x: net("m", op.mean(redundant(net, x), [2, 3])))
    if criterion == "merging":  # a channel's own scale is no part of the layer
        module = build(lambda net, x: net.conv_bias("c", unscaled(net, x), 6))
    result = shrink(module, config)
    assert macs(result) < 0.6 * macs(module)
    # Lasso and ThiNet look at sums of contributions, where a pair may count as one of its channels.
    assert error(module, result) < (0.03 if criterion in ("lasso", "thinet") else 2e-3)


def unscaled(net: Net, x: relax.Var) -> relax.Var:
    half = net.rng.normal(0, 0.2, (8, 4, 3, 3))
    weight = np.concatenate([half, half]).astype(np.float32)
    return net("a_relu", op.nn.relu(net("a", op.nn.conv2d(x, relax.const(weight), padding=1))))


@pytest.mark.parametrize("criterion", ["l1", "l2", "batch_norm", "taylor"])
def test_scores(criterion: Any) -> None:
    """Channels of which nothing comes leave first, whatever the score."""

    def body(net: Net, x: relax.Var) -> relax.Var:
        weight = net.rng.normal(0, 0.3, (16, 4, 3, 3))
        weight[1::2] *= 1e-3
        x = net("a", op.nn.conv2d(x, relax.const(weight.astype(np.float32)), padding=1))
        x = net.conv_relu("b", net("a_relu", op.nn.relu(x)), 8)
        return net("m", op.mean(x, [2, 3]))

    module = build(body)
    config = ShrinkConfig(ChannelShare(0.5), criterion, reconstruct=False)
    result = shrink(module, config)
    assert read_shrunk(result)["a"] == "16 -> 8 channels"
    assert error(module, result) < 1e-4


def test_layers_make_up_for_what_left() -> None:
    module = build(block, seed=2)
    losses = [
        error(module, shrink(module, ShrinkConfig(ChannelShare(0.5), criterion, "group", solves)))
        for criterion, solves in (("l1", False), ("l1", True), ("surgeon", True))
    ]
    assert max(losses[1:]) < 0.5 * losses[0]


def test_equals_its_masked_module() -> None:
    module = build(block)
    schemes = all_layers(module, ShrinkConfig(Operations(0.5)))
    statistics = statistics_of(module, schemes)
    zeros, channels, keep = mask(module, schemes, statistics)
    result = Shrink(schemes, statistics)(module)
    assert macs(zeros) == macs(module) > macs(result)
    assert not keep.all() and len(channels.layers) == 4
    for array in samples(module, 3, seed=5):
        wanted = run(zeros, array, level=0)
        np.testing.assert_allclose(run(result, array, level=0), wanted, rtol=1e-4, atol=1e-5)


def test_without_statistics() -> None:
    module = build(block)
    with pytest.raises(DataError, match="lack X·Xᵀ of layer"):
        Shrink(all_layers(module, ShrinkConfig()), Statistics())(module)


# ---- the recipe ----------------------------------------------------------------------------------


def test_recipe_round_trips() -> None:
    text = "version: 1\nsteps:\n  - shrink: {layers: all, keep: {operations: {share: 0.6}}}\n"
    recipe = parse_recipe(text)
    assert recipe.steps[0].config == ShrinkConfig(Operations(0.6))
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("multiple: 0", "multiple is from 1 on"),
        ("scope: network, criterion: lasso", "ranked across groups by l1, l2"),
        ("keep: {operations: {share: 2}}", "a share is between 0 and 1"),
        ("criteria: l1", "criterion"),
    ],
)
def test_bad_recipe(fields: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"version: 1\nsteps:\n  - shrink: {{layers: all, {fields}}}\n")


def test_later_steps_work_on_what_is_left() -> None:
    """shrink in stages, sparsify, quantize; every layer becomes an integer kernel."""
    module = build(block, (1, 4, 6, 6))
    text = """
version: 1
steps:
  - shrink: {layers: all, keep: {operations: {share: 0.6}}, multiple: 8, insist: true}
  - sparsify: {layers: conv2d, sparsity: 0.5, pattern: {block: {outputs: 8, inputs: 1}}, insist: true}
  - quantize: {layers: all, weights: int8, activations: int8}
"""
    data = [{"x": array} for array in samples(module, count=16)]
    result, target = compress_module(module, parse_recipe(text), "host", data)
    assert macs(result) <= 0.6 * macs(module)
    changes = describe_changes(result)["a"]
    assert "24 -> 8" in changes
    assert "zeros" in changes
    assert describe_schemes(result)["a"] == "int8/channel × int8"
    lowered = lower(result, target)
    assert lowered.left_float == ()
    assert error(module, result) < 0.7


# ---- importers and real networks -----------------------------------------------------------------


def test_torch_attention() -> None:
    """Whole heads leave a transformer block that torch exported."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra 'torch')")

    class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(12, 16) for _ in range(3))
            self.o, self.up = torch.nn.Linear(16, 12), torch.nn.Linear(12, 32)
            self.down, self.norm = torch.nn.Linear(32, 12), torch.nn.LayerNorm(12)

        def forward(self, x: Any) -> Any:
            q, k, v = (f(x).view(1, 6, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            weights = torch.softmax(q @ k.transpose(2, 3) / 2.0, -1)
            x = self.norm(x + self.o((weights @ v).transpose(1, 2).reshape(1, 6, 16)))
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    torch.manual_seed(0)
    module = load_model(torch.export.export(Block().eval(), (torch.zeros(1, 6, 12),))).module
    result = shrink(module, ShrinkConfig(ChannelShare(0.5), "l1", reconstruct=False))
    notes = read_shrunk(result)
    assert list(notes.values()) == [
        *["16 -> 8 channels"] * 3, "16 -> 8 inputs", "32 -> 16 channels", "32 -> 16 inputs",
    ]  # fmt: skip


def test_tflite() -> None:
    """Depthwise layers of a float TFLite network lose what their inputs do."""
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    from .tflite_builder import Operator, Tensor
    from .tflite_builder import build as build_tflite

    rng = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> Tensor:
        return Tensor(name, shape, "float32", data=rng.normal(0, 0.3, shape).astype(np.float32))

    tensors = [
        Tensor("x", (1, 6, 6, 3), "float32"), constant("w1", 16, 3, 3, 3), constant("b1", 16),
        Tensor("conv", (1, 6, 6, 16), "float32"), constant("w2", 1, 3, 3, 16), constant("b2", 16),
        Tensor("dw", (1, 6, 6, 16), "float32"), constant("w3", 5, 16 * 36), constant("b3", 5),
        Tensor("flat", (1, 16 * 36), "float32"), Tensor("y", (1, 5), "float32"),
        Tensor("shape", (2,), "int32", data=np.array([1, 16 * 36], np.int32)),
    ]  # fmt: skip
    options = {"padding": 0, "strideH": 1, "strideW": 1, "fusedActivationFunction": 1}
    depthwise = {**options, "depthMultiplier": 1}
    operators = [
        Operator("CONV_2D", ["x", "w1", "b1"], ["conv"], options, "Conv2DOptions"),
        Operator(
            "DEPTHWISE_CONV_2D", ["conv", "w2", "b2"], ["dw"], depthwise, "DepthwiseConv2DOptions"
        ),
        Operator("RESHAPE", ["dw", "shape"], ["flat"]),
        Operator("FULLY_CONNECTED", ["flat", "w3", "b3"], ["y"], {}, "FullyConnectedOptions"),
    ]
    content = build_tflite(tensors, operators, ["x"], ["y"])
    module = load_tflite(content).module
    result = shrink(module, ShrinkConfig(ChannelShare(0.5), "l1"))
    assert list(read_shrunk(result).values()) == [
        "16 -> 8 channels", "16 -> 8 channels", f"{16 * 36} -> {8 * 36} inputs",
    ]  # fmt: skip
    assert error(module, result) < 0.5


def load_tflite(content: bytes) -> Any:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(content)
        return load_model(path)


def test_resnet20(asset: Callable[[str], Path]) -> None:
    """Shortcuts that pad channels tie the stages of CIFAR's ResNets together."""
    module = load_model(asset("onnx/cifar10_resnet20.onnx")).module
    config = ShrinkConfig(Operations(0.5), "l1", reconstruct=False)
    result = Shrink(all_layers(module, config), Statistics())(module)
    assert 0.45 < macs(result) / macs(module) <= 0.5
    widths = {name: text for name, text in read_shrunk(result).items() if "layer1_0" in name}
    assert widths
    assert lower(quantize(result), HOST).left_float == ()
