"""What one-shot sparsity costs a network: second order with compensation against magnitude, stages
against one calibration, measured sparsities against the same for all."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.calibrate import calibrate
from tvm_compress.calibrate_towards import calibrate_towards
from tvm_compress.errors import DataError
from tvm_compress.flow import compress_job, load_job
from tvm_compress.importers import load_model
from tvm_compress.output_loss import OutputLoss
from tvm_compress.progress import Progress
from tvm_compress.recipe import Recipe, Step
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.numerics.sparsity_pattern import Block, Unstructured
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.shortcuts import shortcuts
from tvm_compress.relay_passes.sparsify import Sparsify, observe, stages
from tvm_compress.relay_passes.sparsify_config import SparsifyConfig
from tvm_compress.relay_passes.sparsity_shares import decide, undecided
from tvm_compress.relay_passes.weight_layers import weight_layers
from tvm_compress.targets import get_target

from .floats import Net, all_layers, build

HOST = get_target("host")


def network(net: Net, x: relax.Var) -> relax.Var:
    """A residual block between two convolutions."""
    x = net.conv_relu("a", x, 16)
    y = net.conv_relu("b", x, 16)
    y = net.conv_bias("c", y, 16)
    x = net("sum_relu", op.nn.relu(net("sum", op.add(y, x))))
    x = net.conv("d", x, 16, kernel=1)
    return net.linear("fc", net("mean", op.mean(x, [2, 3])), 10)


@lru_cache
def module() -> tvm.IRModule:
    return build(network, (1, 6, 8, 8))


@lru_cache
def data() -> list[dict[str, np.ndarray]]:
    """Channels that say nearly the same, and neighbours that are alike: as in images."""
    rng = np.random.default_rng(5)
    mixing = rng.normal(size=(6, 6)) * 0.3 + rng.normal(size=(6, 1))
    noise = rng.normal(size=(32, 6, 10, 10))
    smooth = sum(noise[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)) / 3
    mixed = np.einsum("ci,nihw->nchw", mixing, smooth).astype(np.float32)
    return [{"x": sample[None]} for sample in mixed]


def outputs_lost(config: SparsifyConfig) -> float:
    """By the network that the flow makes of it, on samples that it was not calibrated on."""
    recipe = Recipe((Step("sparsify", config),))
    job = load_job(module(), recipe, "host", data()[:24])
    return held_out()(compress_job(job, Progress()))


@lru_cache
def held_out() -> OutputLoss:
    return OutputLoss(load_model(module()), data()[24:], target=HOST)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(16)], ids=lambda item: item.words)
def test_second_order_beats_magnitude_at_every_sparsity(pattern: Block) -> None:
    """Outputs of layers, on their own inputs: the share that is lost."""
    schemes = all_layers(module(), SparsifyConfig(0.5, pattern))
    wanted = observe(module(), schemes)
    assert wanted is not None
    statistics = calibrate(load_model(module()), data(), wanted, target=HOST)
    layers = weight_layers(Graph(module()["main"]), schemes)
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        lost = {}
        for name, config in {
            "magnitude": SparsifyConfig(sparsity, pattern, "magnitude", reconstruct=False),
            "reconstructed": SparsifyConfig(sparsity, pattern, "magnitude"),
            "second order": SparsifyConfig(sparsity, pattern),
        }.items():
            pruned = Sparsify(all_layers(module(), config), statistics)(module())
            after = weight_layers(Graph(pruned["main"]), schemes)
            lost[name] = [
                sum(
                    float(
                        np.einsum(
                            "kn,kn->", new - problem.best, problem.hessian @ (new - problem.best)
                        )
                    )
                    for new, problem in zip(b.matrices(), a.problems(statistics), strict=True)
                )
                for a, b in zip(layers, after, strict=True)
            ]
        for magnitude, reconstructed, second in zip(*lost.values(), strict=True):
            assert second < magnitude
            assert second <= reconstructed * (1 + 1e-9)


def test_compensation_behind_compressed_layers_helps() -> None:
    config = SparsifyConfig(0.9, Block(16), insist=True)
    schemes = all_layers(module(), config)
    wanted = observe(module(), schemes)
    assert wanted is not None
    statistics = calibrate(load_model(module()), data()[:24], wanted, target=HOST)
    at_once = held_out()(Sparsify(schemes, statistics)(module()))
    assert outputs_lost(config) < 0.7 * at_once


def test_measured_sparsities_through_the_flow() -> None:
    config = SparsifyConfig(0.7, Block(16), scope="sensitivity", insist=True)
    job = load_job(module(), Recipe((Step("sparsify", config),)), "host", data()[:8])
    result = compress_job(job, Progress())
    layers = weight_layers(Graph(result["main"]), all_layers(module(), config))
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    size = sum(layer.weight.size for layer in layers)
    assert zeros == pytest.approx(0.7 * size, abs=64)
    assert held_out()(result) < 0.5


def test_measured_sparsities_keep_the_total() -> None:
    pattern = Block(16)
    config = SparsifyConfig(0.6, pattern, scope="sensitivity")
    schemes = all_layers(module(), config)
    model = load_model(module())
    wanted = observe(module(), undecided(schemes))
    assert wanted is not None
    statistics = calibrate(model, data()[:8], wanted, target=HOST)
    with pytest.raises(DataError, match="give some"):
        Sparsify(schemes, statistics)(module())
    decided = decide(module(), schemes, statistics, OutputLoss(model, data()[:8], target=HOST))
    sizes = {
        layer.name: layer.weight.size for layer in weight_layers(Graph(module()["main"]), schemes)
    }
    gone = sum((item.sparsity or 0.0) * sizes[name] for name, item in decided.items())
    assert gone == pytest.approx(0.6 * sum(sizes.values()), abs=pattern.outputs)
    assert all(item.scope == "layer" for item in decided.values())
    assert len({round(item.sparsity or 0.0, 2) for item in decided.values()}) > 1


def test_wanted_outputs_are_those_before() -> None:
    """Against plain sums over the outputs of both modules."""
    schemes = all_layers(module(), SparsifyConfig(0.5, Block(16)))
    parts = stages(module(), schemes)
    assert [list(part) for part in parts] == [["a"], ["b"], ["c"], ["d"], ["fc"]]
    graph = Graph(module()["main"])
    by_name = {item.name: item for item in graph.values}
    added = shortcuts(graph, [by_name["c"], by_name["b"]])
    assert added[by_name["b"]] == [] and [v.name for v in added[by_name["c"]]] == ["a_relu"]
    assert shortcuts(graph, [by_name["c"], by_name["a"]])[by_name["c"]] == []

    plain = SparsifyConfig(0.5, Block(16), "magnitude", reconstruct=False)
    changed = Sparsify({"a": plain}, Statistics())(module())
    model = load_model(changed)
    found = calibrate_towards(module(), model, ["c"], data()[:3], target=HOST).moments["c"]
    assert found.wanted is not None
    now, before = (values(item, ["c", "a_relu", "b_relu"]) for item in (changed, module()))
    wanted = before["c"] + before["a_relu"] - now["a_relu"]
    mean = wanted.mean(axis=(0, 2, 3))
    np.testing.assert_allclose(found.wanted.mean[0], mean, rtol=1e-4, atol=1e-5)
    middle = np.einsum("nihw,nohw->io", now["b_relu"], wanted)  # the kernel's middle position
    np.testing.assert_allclose(
        found.wanted.second[0][4 * 16 : 5 * 16], middle, rtol=1e-3, atol=1e-3
    )


def values(compressed: tvm.IRModule, names: list[str]) -> dict[str, np.ndarray]:
    """Tensors of a module for the first samples, one behind the other."""
    from tvm_compress.calibrate import Tensors

    variables = [item for item in Graph(compressed["main"]).values if item.name in names]
    tensors = Tensors(compressed, variables, load_model(compressed).inputs, HOST, None)
    runs = [tensors.run(sample) for sample in data()[:3]]
    return {item.name: np.concatenate([run[item] for run in runs]) for item in variables}
