"""Features of an input brought to one footing: the same function, and evener features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.errors import DataError, RecipeError
from tvm_compress.relay_passes.equalize_inputs import (
    EqualizeInputs,
    EqualizeInputsConfig,
    observe,
)
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.ir import wide_inputs
from tvm_compress.relay_passes.numerics.observers import ChannelObserver
from tvm_compress.relay_passes.numerics.statistics import Statistics

from .floats import Net, all_layers, build, describe, parameters_of, quantize, run, samples

SPREAD = np.array([100.0, 3.0, 1.0, 0.5], np.float32)  # the largest 50 times the median


def frames(net: Net, x: relax.Var) -> relax.Var:
    """[1, 6, 4] => a shared layer on two frames, another on a third."""
    weight = net.array(4, 5)
    parts = []
    for step in range(2):
        frame = net(f"frame{step}", op.strided_slice(x, (1,), (step,), (step + 1,)))
        parts.append(net(f"layer{step}", op.matmul(op.reshape(frame, (1, 4)), weight)))
    last = net("last", op.reshape(op.strided_slice(x, (1,), (4,), (6,)), (2, 4)))
    other = net.linear("other", last, 5)
    return net("total", op.add(net("sum", op.add(*parts)), other))


def scaled(module: tvm.IRModule, spread: np.ndarray, axis: int, **fields: Any) -> tvm.IRModule:
    schemes = all_layers(module, EqualizeInputsConfig(**fields))
    assert observe(module, schemes).channels == {"x": axis}
    observer = ChannelObserver(0)
    observer.update(np.stack([-spread, spread], axis=1))
    return EqualizeInputs(schemes, Statistics({}, {"x": observer.result()}, samples=1))(module)


def factor_of(module: tvm.IRModule) -> np.ndarray:
    graph = Graph(module["main"])
    variable = next(item for item in graph.values if item.name == "x_equalized")
    array = graph.constant(graph.values[variable].args[1])
    assert array is not None
    return array


def test_the_function_is_exactly_the_same() -> None:
    module = build(frames, (1, 6, 4))
    result = scaled(module, SPREAD, 2)
    np.testing.assert_array_equal(factor_of(result).ravel(), [1.0, 8.0, 8.0, 16.0])
    for x in samples(module):
        np.testing.assert_array_equal(run(result, x * SPREAD), run(module, x * SPREAD))


def test_steps_of_a_loop_still_share_their_weight() -> None:
    graph = Graph(scaled(build(frames, (1, 6, 4)), SPREAD, 2)["main"])
    weights = {item.name: call.args[1] for item, call in graph.values.items() if len(item.name) > 5
               and item.name.startswith("layer")}  # fmt: skip
    assert weights["layer0"].same_as(weights["layer1"])


def test_flattened_features_have_a_scale_each() -> None:
    module = build(lambda net, x: net.linear("a", net("flat", op.reshape(x, (1, 12))), 3), (1, 12))
    spread = np.logspace(-1, 1, 12).astype(np.float32)
    result = scaled(module, spread, 1, strength=1.0)
    factor = factor_of(result).ravel()
    assert (factor * spread).max() / (factor * spread).min() <= 2.0


def test_channels_of_a_convolution_are_features() -> None:
    module = build(lambda net, x: net.conv("a", x, 8))
    result = scaled(module, SPREAD, 1)
    x = samples(module)[0] * SPREAD[:, None, None]
    np.testing.assert_allclose(run(result, x), run(module, x), rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: net("both", op.add(net.linear("a", x, 4), x)),
        lambda net, x: net.linear("a", net("squared", op.multiply(x, x)), 4),
        lambda net, x: net.linear("a", net("flat", op.reshape(x, (4, 1))), 4),
    ],
    ids=["read by another operator", "computed with first", "one channel of many features"],
)
def test_inputs_that_others_read_stay(body: Any) -> None:
    module = build(body, (1, 4))
    after = scaled(module, SPREAD, 1)
    assert describe(after) == describe(module)
    # Uneven all the same: 16 bits it is, unless that is not wanted.
    assert wide_inputs(after["main"]) == {"x"}
    assert wide_inputs(scaled(module, SPREAD, 1, widen=False)["main"]) == set()
    assert wide_inputs(scaled(module, np.ones(4), 1)["main"]) == set()


def test_a_wide_input_is_quantised_with_16_bits() -> None:
    module = build(lambda net, x: net.conv("b", net.conv_relu("a", x, 4), 4), (1, 1, 8, 4))
    after = scaled(module, SPREAD, 3)
    assert describe(after) == describe(module)
    quantized = quantize(after)
    assert parameters_of(quantized, "x")[1:] == (0, "int16")
    assert parameters_of(quantized, "a_relu")[2] == "int8"
    assert parameters_of(quantize(module), "x")[2] == "int8"


def test_even_inputs_stay() -> None:
    module = build(frames, (1, 6, 4))
    after = scaled(module, np.array([2.0, 1.0, 1.0, 0.3], np.float32), 2)
    assert describe(after) == describe(module)


def test_missing_statistics_and_bad_fields() -> None:
    module = build(frames, (1, 6, 4))
    with pytest.raises(DataError, match="features of 'x'"):
        EqualizeInputs(all_layers(module, EqualizeInputsConfig()), Statistics({}, {}, samples=0))(
            module
        )
    with pytest.raises(RecipeError, match="strength"):
        EqualizeInputsConfig(strength=2.0)
    with pytest.raises(RecipeError, match="spread"):
        EqualizeInputsConfig(spread=0.5)
