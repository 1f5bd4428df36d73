"""Equalisation of weights and of activations: the same function, evener channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.errors import DataError, RecipeError
from tvm_compress.relay_passes.channels import input_ranges, output_ranges
from tvm_compress.relay_passes.equalize import Equalize, EqualizeConfig
from tvm_compress.relay_passes.equalize_activations import (
    EqualizeActivations,
    EqualizeActivationsConfig,
    observe,
)
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.numerics.observers import ChannelObserver
from tvm_compress.relay_passes.numerics.statistics import Statistics

from .floats import Net, all_layers, build, run, samples, statistics_of


def uneven(net: Net, outputs: int, inputs: int, kernel: int) -> Any:
    """A weight whose channels differ a hundredfold."""
    weight = net.rng.normal(0, 0.2, (outputs, inputs, kernel, kernel))
    weight *= 10 ** net.rng.uniform(-1, 1, (outputs, 1, 1, 1))
    return relax.const(weight.astype(np.float32))


def chain(net: Net, x: relax.Var, clamp: Any = op.nn.relu) -> relax.Var:
    """conv -> depthwise -> pooling -> conv, with biases and clamps between."""
    y = net.bias("a_bias", net("a", op.nn.conv2d(x, uneven(net, 8, 4, 3), padding=1)))
    y = net("a_clamp", clamp(y))
    y = net("b", op.nn.conv2d(y, uneven(net, 8, 1, 3), padding=1, groups=8))
    y = net("b_clamp", clamp(net.bias("b_bias", y)))
    y = net("pool", op.nn.max_pool2d(y, (2, 2), (2, 2)))
    return net.conv_bias("c", y, 6, kernel=1)


def weights(module: tvm.IRModule) -> dict[str, tuple[np.ndarray, relax.Call]]:
    graph = Graph(module["main"])
    found = {}
    for variable, call in graph.values.items():
        if variable.name in "abc":
            array = graph.constant(call.args[1])
            assert array is not None
            found[variable.name] = (array, call)
    return found


def test_function_is_the_same_and_ranges_meet() -> None:
    module = build(chain)
    equalised = Equalize(all_layers(module, EqualizeConfig()))(module)
    for x in samples(module):
        expected = run(module, x)
        np.testing.assert_allclose(run(equalised, x), expected, rtol=1e-4, atol=1e-5)
    layers = weights(equalised)
    for first, second in (("a", "b"), ("b", "c")):
        above, below = output_ranges(*layers[first]), input_ranges(*layers[second])
        np.testing.assert_allclose(above, below, rtol=2e-3)
    before = output_ranges(*weights(module)["a"])
    after = output_ranges(*layers["a"])
    assert after.max() / after.min() < before.max() / before.min()


@pytest.mark.parametrize("clamp", [op.nn.relu6, lambda x: op.clip(x, 0, 6), op.sigmoid])
def test_weights_on_both_sides_of_a_clip_stay(clamp: Any) -> None:
    module = build(lambda net, x: chain(net, x, clamp))
    equalised = Equalize(all_layers(module, EqualizeConfig()))(module)
    tvm.ir.assert_structural_equal(equalised["main"], module["main"])


def test_values_with_two_readers_stay() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        y = net.conv_relu("a", x, 4)
        return net("sum", op.add(net.conv("b", y, 4), y))

    module = build(body)
    equalised = Equalize(all_layers(module, EqualizeConfig()))(module)
    tvm.ir.assert_structural_equal(equalised["main"], module["main"])


@pytest.mark.parametrize("layout", ["matmul", "NHWC", "grouped"])
def test_other_layouts(layout: str) -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        if layout == "matmul":
            y = net("a_relu", op.nn.relu(net.linear("a", x, 6)))
            return net.linear("b", y, 5)
        if layout == "NHWC":
            axes = {"data_layout": "NHWC", "kernel_layout": "HWIO"}
            y = net("a", op.nn.conv2d(x, net.array(3, 3, 8, 6), padding=1, **axes))
            return net("b", op.nn.conv2d(op.nn.relu(y), net.array(1, 1, 6, 4), **axes))
        y = net("a", op.nn.conv2d(x, net.array(8, 2, 3, 3), padding=1, groups=2))
        return net("b", op.nn.conv2d(net("r", op.nn.relu(y)), net.array(6, 4, 1, 1), groups=2))

    module = build(body, (1, 4, 8, 8))
    equalised = Equalize(all_layers(module, EqualizeConfig()))(module)
    (x,) = samples(module, 1)
    np.testing.assert_allclose(run(equalised, x), run(module, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="StructuralEqual"):
        tvm.ir.assert_structural_equal(equalised, module)


def observed(module: tvm.IRModule, schemes: dict[str, Any], arrays: list[np.ndarray]) -> Statistics:
    """Statistics by channel of what `observe` asks for, by running prefixes of the module."""
    wanted = observe(module, schemes).channels
    channels = {}
    graph = Graph(module["main"])
    for name, axis in wanted.items():
        variable = next(item for item in graph.values if item.name == name)
        out = relax.Var("out", variable.ty)
        bindings = []
        for binding in graph.function.body.blocks[0].bindings:
            bindings.append(binding)
            if binding.var.same_as(variable):
                break
        block = relax.DataflowBlock([*bindings, relax.VarBinding(out, variable)])
        body = relax.SeqExpr([block], out)
        prefix = relax.Function(graph.function.params, body, variable.ty)
        prefix_module = relax.transform.Normalize()(tvm.IRModule({"main": prefix}))
        observer = ChannelObserver(axis)
        for array in arrays:
            observer.update(run(prefix_module, array))
        channels[name] = observer.result()
    return Statistics({}, channels, {}, len(arrays))


@pytest.mark.parametrize("clamp", [op.nn.relu, op.nn.relu6])
def test_activations_become_even_and_the_function_stays(clamp: Any) -> None:
    module = build(lambda net, x: chain(net, x, clamp))
    schemes = all_layers(module, EqualizeActivationsConfig(strength=1.0))
    arrays = samples(module)
    statistics = observed(module, schemes, arrays)
    assert set(statistics.channels) == {"a_clamp", "pool"}
    equalised = EqualizeActivations(schemes, statistics)(module)
    for x in arrays:  # the observed samples: no clip acts that did not act before
        expected = run(module, x)
        np.testing.assert_allclose(run(equalised, x), expected, rtol=1e-4, atol=1e-5)
    after = observed(equalised, schemes, arrays)
    for name in statistics.channels:
        channels = after.channels[name]
        alive = channels.high[channels.high > 0]
        if clamp is op.nn.relu6:  # half of the bound, or more where it was more
            assert alive.min() > 2.999
        else:
            np.testing.assert_allclose(alive, alive.max(), rtol=1e-4)


def test_strength_zero_changes_nothing_but_depthwise_readers() -> None:
    module = build(chain)
    schemes = all_layers(module, EqualizeActivationsConfig(strength=0.0))
    equalised = EqualizeActivations(schemes, observed(module, schemes, samples(module)))(module)
    before, after = weights(module), weights(equalised)
    np.testing.assert_array_equal(after["c"][0], before["c"][0])
    assert not np.array_equal(after["b"][0], before["b"][0])


def test_missing_statistics_and_bad_fields() -> None:
    module = build(chain)
    schemes = all_layers(module, EqualizeActivationsConfig())
    with pytest.raises(DataError, match="lack the channels of 'a_clamp'"):
        EqualizeActivations(schemes, statistics_of({"a_clamp": (0.0, 1.0)}))(module)
    with pytest.raises(RecipeError, match="strength is from 0 to 1"):
        EqualizeActivationsConfig(strength=1.5)
    with pytest.raises(RecipeError, match="sweeps is from 1 to 1000"):
        EqualizeConfig(sweeps=0)
