"""The step `structured`: the same function where the weight has the structure, faster or left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.calibrate import calibrate
from tvm_compress.errors import RecipeError
from tvm_compress.importers import load_model
from tvm_compress.recipe import Recipe, Step, dump_recipe, parse_recipe
from tvm_compress.relay_passes.costs import MEASURED, Cost, LayerCosts, LayerUse
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.numerics.structured import circulant_matrix, nearest_fastfood
from tvm_compress.relay_passes.select import list_layers
from tvm_compress.relay_passes.structured import Structured, observe, read_structured
from tvm_compress.relay_passes.structured_config import Circulant, Hadamard, StructuredConfig
from tvm_compress.relay_passes.weight_layers import weight_layers
from tvm_compress.targets import get_target

from .floats import Net, all_layers, build, run, samples


def linear(weight: np.ndarray, shape: Sequence[int]) -> tvm.IRModule:
    def body(net: Net, x: relax.Var) -> relax.Var:
        y = net("fc", op.matmul(x, relax.const(weight.astype(np.float32))))
        return net("act", op.nn.relu(op.add(y, net.array(weight.shape[1]))))

    return build(body, shape)


def structured(
    module: tvm.IRModule, config: StructuredConfig, costs: LayerCosts | None = None
) -> tvm.IRModule:
    schemes = all_layers(module, config)
    wanted, statistics = observe(module, schemes), Statistics()
    if wanted is not None:
        data = [{"x": array} for array in samples(module, count=60)]
        statistics = calibrate(load_model(module), data, wanted, target=get_target("host"))
    return Structured(schemes, statistics, costs)(module)


@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (2, 3, 48)])
@pytest.mark.parametrize("data_aware", [False, True])
def test_structured_weights_come_back(shape: Sequence[int], data_aware: bool) -> None:
    rng = np.random.default_rng(0)
    cases = [
        (circulant_matrix(rng.normal(size=(6, 4, 8))), Circulant(8)),
        (nearest_fastfood(rng.normal(size=(48, 40)), 3).matrix(48, 40), Hadamard(3)),
    ]
    for weight, form in cases:
        module = linear(weight, shape)
        result = structured(module, StructuredConfig(form, data_aware, insist=True))
        if isinstance(form, Circulant):
            assert read_structured(result)["fc"].startswith("circulant 8, 0 % of its")
            names = [layer.name for layer in list_layers(result)]
            assert names == ["fc_dft", "fc_frequencies", "fc_inverse"]
            left = weight_layers(Graph(result["main"]), dict.fromkeys(names, 0))
            assert [layer.name for layer in left] == ["fc_frequencies"]
            for array in samples(module):
                assert np.allclose(run(module, array), run(result, array), atol=1e-4)
        else:  # the diagonals are not unique, but the fit starts where it was made
            x = samples(module, count=1)[0]
            lost = run(module, x) - run(result, x)
            assert np.mean(lost**2) < 0.9 * np.mean(run(module, x) ** 2)


def test_block_divides_the_layer() -> None:
    weight = np.random.default_rng(1).normal(size=(36, 30))
    result = structured(linear(weight, (1, 36)), StructuredConfig(Circulant(8), insist=True))
    assert read_structured(result)["fc"].startswith("circulant 6,")
    result = structured(linear(weight[:35, :29], (1, 35)), StructuredConfig(Circulant(8)))
    assert read_structured(result)["fc"].startswith("whole: no block")


class Fixed:
    """Costs of which only totals are asked."""

    def __init__(self, whole: float, parts: float, bytes_: int = 1000) -> None:
        self.answer = [Cost(whole, 1000, MEASURED), Cost(parts, bytes_, MEASURED)]

    def totals(self, alternatives: Sequence[Sequence[LayerUse]]) -> list[Cost]:
        assert {use.layer for uses in alternatives for use in uses} == {"fc"}
        assert [len(uses) for uses in alternatives] == [1, 3]
        return self.answer


def test_never_a_loss() -> None:
    weight = np.random.default_rng(2).normal(size=(64, 64))
    module = linear(weight, (1, 64))
    slower: LayerCosts = Fixed(1, 1.5)  # type: ignore[assignment]
    faster: LayerCosts = Fixed(2, 1)  # type: ignore[assignment]
    smaller: LayerCosts = Fixed(1, 1.05, 900)  # type: ignore[assignment]
    assert len(list_layers(structured(module, StructuredConfig(), smaller))) == 3
    stayed = structured(module, StructuredConfig(), slower)
    loss = (
        "its parts take 1.50x the time (1.5 us instead of 1, measured) and as many bytes; one that "
        "is not smaller has to win by 5 %"
    )
    assert read_structured(stayed) == {"fc": f"whole: {loss}"}
    assert [layer.name for layer in list_layers(stayed)] == ["fc"]
    assert len(list_layers(structured(module, StructuredConfig(), faster))) == 3
    insisting = structured(module, StructuredConfig(insist=True), slower)
    assert len(list_layers(insisting)) == 3
    assert read_structured(insisting)["fc"].endswith(f"; insisted on: {loss}")
    # Without costs operations count: transforms of a small layer take more than the layer.
    small = linear(weight[:8, :8], (1, 8))
    assert [layer.name for layer in list_layers(structured(small, StructuredConfig()))] == ["fc"]


def test_steps_of_a_loop_share_constants() -> None:
    def loop(net: Net, x: relax.Var) -> relax.Var:
        weight = net.array(16, 16)
        for step in range(2):
            x = net(f"h{step}", op.tanh(net(f"s{step}", op.matmul(x, weight))))
        return x

    result = structured(build(loop, (1, 16)), StructuredConfig(insist=True))
    calls = {item.name: value for item, value in Graph(result["main"]).values.items()}
    for part in ("dft", "frequencies", "inverse"):
        assert calls[f"s0_{part}"].args[1].same_as(calls[f"s1_{part}"].args[1])


def test_recipes() -> None:
    for form in (Circulant(16), Hadamard(2)):
        recipe = Recipe((Step("structured", StructuredConfig(form)),))
        assert parse_recipe(dump_recipe(recipe)) == recipe
    for text, part in (
        ("{circulant: {block: 1}}", "from 2 on"),
        ("{hadamard: {seed: -1}}", "0 on"),
    ):
        with pytest.raises(RecipeError, match=part):
            parse_recipe(f"version: 1\nsteps:\n  - structured: {{form: {text}}}\n")
