"""The step `sparsify`: which layers get zeros, what the others become, and the kernels behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.build import build as build_library
from tvm_compress.calibrate import calibrate
from tvm_compress.errors import DataError, RecipeError
from tvm_compress.importers import load_model
from tvm_compress.recipe import parse_recipe
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.numerics.sparsity_pattern import (
    Block,
    KernelShape,
    SemiStructured,
    Unstructured,
)
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.patches import weight_matrix, weight_of_matrix
from tvm_compress.relay_passes.sparsify import Sparsify, observe, read_sparsified
from tvm_compress.relay_passes.sparsify_config import SparsifyConfig
from tvm_compress.targets import get_target

from .floats import Net, all_layers, build, quantize, run, samples, stored

HOST = get_target("host")
CONFIGS = [
    SparsifyConfig(0.7, Block(16)),
    SparsifyConfig(0.7, Unstructured()),
    SparsifyConfig(0.5, Block(4, 4), "magnitude"),
    SparsifyConfig(0.5, Block(1, 8), "activation_aware", reconstruct=False),
    SparsifyConfig(None, SemiStructured(2, 4, 16)),
    SparsifyConfig(None, SemiStructured(2, 4), "diagonal_hessian"),
    SparsifyConfig(None, KernelShape(4, 3)),
    SparsifyConfig(0.6, Unstructured(), "output_correlation"),
    SparsifyConfig(0.6, Block(16), "diagonal_hessian", "network"),
]


def network(net: Net, x: relax.Var) -> relax.Var:
    """Convolutions of several kinds and a linear layer."""
    x = net.conv_relu("a", x, 16)
    x = net.conv_relu("b", x, 24, kernel=1)
    x = net.conv_relu("dw", x, 24, groups=24)
    x = net.conv_relu("g", x, 16, groups=2)
    x = net("flat", op.reshape(x, (1, -1)))
    return net.linear("fc", x, 20)


def statistics_of(module: tvm.IRModule, schemes: dict[str, SparsifyConfig]) -> Statistics:
    wanted = observe(module, schemes)
    if wanted is None:
        return Statistics()
    data = [{"x": array} for array in samples(module, count=12)]
    return calibrate(load_model(module), data, wanted, target=HOST)


def weight_of(module: tvm.IRModule, name: str) -> np.ndarray:
    graph = Graph(module["main"])
    call = next(value for item, value in graph.values.items() if item.name == name)
    weight = graph.constant(call.args[1])
    assert weight is not None
    return weight_matrix(weight, call).transpose(0, 2, 1)  # [G, K, N]


def sparsified(module: tvm.IRModule, config: SparsifyConfig, **others: Any) -> tvm.IRModule:
    schemes = {**all_layers(module, config), **others}
    schemes = {name: item for name, item in schemes.items() if item is not None}
    return Sparsify(schemes, statistics_of(module, schemes))(module)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.pattern.words}-{c.criterion}")
def test_zeros_lie_as_asked(config: SparsifyConfig) -> None:
    module = build(network)
    result = sparsified(module, config)
    notes = read_sparsified(result)
    zeros, size = 0, 0
    for name in ("a", "b", "g", "fc"):
        for matrix in weight_of(result, name):
            kept = matrix != 0
            if isinstance(config.pattern, KernelShape) and name in ("b", "fc"):
                assert kept.all() and name not in notes
                continue
            positions = 9 if name in ("a", "g") else 1
            pattern = config.pattern.of_layer(positions, kept.shape[1])
            assert pattern is not None
            pooled = pattern.pool(kept * 1.0) > 0
            assert np.array_equal(pattern.spread(pooled, kept.shape), kept)
            zeros += (~kept).sum()
            size += kept.size
            if config.scope == "network" and kept.all():
                continue  # all of its weights are worth more than what goes elsewhere
            if config.scope == "layer" and config.sparsity is not None:
                assert abs((~pooled).mean() - config.sparsity) <= 0.5 / pooled.size + 1e-9
            assert config.pattern.words in notes[name]
    if config.scope == "network":
        assert zeros / size == pytest.approx(0.6, abs=0.05)
    # Depthwise layers have no outputs that could share a pattern.
    has_depthwise = getattr(config.pattern, "outputs", 1) == 1
    assert (weight_of(result, "dw") == 0).any() == has_depthwise


def test_compensation_is_worth_it() -> None:
    module = build(network)
    arrays = samples(module, count=12)
    expected = [run(module, array) for array in arrays]
    errors = {}
    for name, config in {
        "magnitude": SparsifyConfig(0.5, Block(16), "magnitude", reconstruct=False),
        "reconstructed": SparsifyConfig(0.5, Block(16), "magnitude"),
        "second order": SparsifyConfig(0.5, Block(16)),
    }.items():
        result = sparsified(module, config, fc=None)
        assert "fc" not in read_sparsified(result)
        errors[name] = sum(
            float(((run(result, array) - wanted) ** 2).sum())
            for array, wanted in zip(arrays, expected, strict=True)
        )
    assert errors["reconstructed"] < errors["magnitude"]
    assert errors["second order"] < errors["magnitude"]


def test_zeros_survive_quantisation_and_repetition() -> None:
    module = sparsified(build(network), SparsifyConfig(0.7))
    codes, _, _ = stored(quantize(module), "b_weight")
    assert ((codes == 0) >= (weight_of(module, "b")[0].T.reshape(codes.shape) == 0)).all()
    again = sparsified(module, SparsifyConfig(0.9, Unstructured()))
    before, after = weight_of(module, "a")[0], weight_of(again, "a")[0]
    assert (after == 0).mean() == pytest.approx(0.9, abs=0.01)
    assert not after[before == 0].any()


def test_steps_of_a_loop_keep_one_weight() -> None:
    def loop(net: Net, x: relax.Var) -> relax.Var:
        weight = net.array(12, 12)
        for step in range(3):
            x = net(f"h{step}", op.tanh(net(f"s{step}", op.matmul(x, weight))))
        return x

    result = sparsified(build(loop, (2, 12)), SparsifyConfig(0.5, Unstructured()))
    assert (weight_of(result, "s0") == 0).mean() == 0.5
    calls = {item.name: value for item, value in Graph(result["main"]).values.items()}
    first, second, third = (calls[f"s{step}"].args[1] for step in range(3))
    assert first.same_as(second) and first.same_as(third)  # one constant: a loop stays a loop


@pytest.mark.parametrize("name", ["a", "g", "fc"])
def test_matrices_and_back(name: str) -> None:
    module = build(network)
    graph = Graph(module["main"])
    call = next(value for item, value in graph.values.items() if item.name == name)
    weight = graph.constant(call.args[1])
    assert weight is not None
    again = weight_of_matrix(weight_matrix(weight, call), call, weight.shape)
    assert np.array_equal(again, weight)


def test_kernels_skip_zeros_where_it_pays() -> None:
    """The library computes what the graph does; dense layers stay dense."""
    module = sparsified(build(network, (1, 4, 16, 16)), SparsifyConfig(0.9, Block(16)), b=None)
    built = build_library(module, get_target("x86-64-v3"))
    assert set(built.sparse_kernels) == {"a", "g", "fc"}
    assert built.sparse_kernels["fc"] == pytest.approx(
        0.16, abs=0.02
    )  # 20 outputs are stored as 32
    indices = sum(item.bytes for item in built.constants if item.role == "indices")
    assert indices > 0
    if get_target("x86-64-v3").runs_here():
        array = samples(module)[0]
        machine = relax.VirtualMachine(built.executable, tvm.cpu())
        result = machine["main"](tvm.runtime.tensor(array)).numpy()
        np.testing.assert_allclose(result, run(module, array), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{layers: all}", "sparsity: is missing"),
        ("{layers: all, sparsity: 1.5}", "between 0 and 1"),
        ("{layers: all, sparsity: 0.5, pattern: {semi_structured: {kept: 2, of: 4}}}", "its own"),
        ("{layers: all, pattern: {semi_structured: {kept: 4, of: 4}}}", "kept is from 1"),
        ("{layers: all, sparsity: 0.5, scope: network}", "another criterion"),
        ("{layers: all, sparsity: 0.5, total: operations}", "no total"),
        ("{layers: all, scope: sensitivity, pattern: {semi_structured: {}}}", "its own sparsity"),
        ("{layers: all, sparsity: 0.5, pattern: blok}", "block"),
        ("{layers: all, sparsity: 0.5, criterion: size}", "criterion"),
    ],
)
def test_wrong_recipes(text: str, part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        parse_recipe(f"version: 1\nsteps:\n  - sparsify: {text}\n")


@pytest.mark.parametrize("config", CONFIGS)
def test_recipes_round_trip(config: SparsifyConfig) -> None:
    from tvm_compress.recipe import Recipe, Step, dump_recipe

    recipe = Recipe((Step("sparsify", config),))
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_statistics_are_needed() -> None:
    module = build(network)
    with pytest.raises(DataError, match="X·Xᵀ of layer"):
        Sparsify(all_layers(module, SparsifyConfig(0.5)), Statistics())(module)
    plain = SparsifyConfig(0.5, Block(16), "magnitude", reconstruct=False)
    assert observe(module, all_layers(module, plain)) is None
