"""Bias correction takes the mean error of compressed weights back, channel by channel."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.errors import DataError
from tvm_compress.relay_passes.correct_bias import CorrectBias, CorrectBiasConfig, observe
from tvm_compress.relay_passes.encodings import FourBit, match_encoding
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.numerics.granularity import PerGroup
from tvm_compress.relay_passes.numerics.moments import MomentsObserver
from tvm_compress.relay_passes.numerics.observers import ChannelObserver
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.patches import channels_first, patch_shape
from tvm_compress.relay_passes.quantize_config import QuantizeConfig

from .floats import Net, all_layers, build, describe, quantize, run, statistics_of, stored

INT4 = QuantizeConfig(weights="int4", activations=None)


def biased_inputs(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Inputs with a mean, without which there is nothing to correct."""
    rng = np.random.default_rng(3)
    return [rng.uniform(0.5, 2.5, shape).astype(np.float32) for _ in range(6)]


def statistics_of_first_layer(module: tvm.IRModule, arrays: list[np.ndarray]) -> Statistics:
    """Moments of the layer `a`, whose input is the module's, and of its output channels."""
    graph = Graph(module["main"])
    call = next(value for item, value in graph.values.items() if item.name == "a")
    weight = graph.constant(call.args[1])
    assert weight is not None
    shape = patch_shape(call, weight.shape)
    assert shape is not None
    moments = MomentsObserver(shape, with_second=False)
    axis = observe(module, {"a": CorrectBiasConfig()}).channels["a"]
    output = ChannelObserver(axis)
    variable = next(item for item in graph.values if item.name == "a")
    out = relax.Var("only_a", variable.ty)
    block = relax.DataflowBlock([relax.VarBinding(variable, call), relax.VarBinding(out, variable)])
    function = relax.Function(graph.function.params, relax.SeqExpr([block], out), variable.ty)
    alone = relax.transform.Normalize()(tvm.IRModule({"main": function}))
    for array in arrays:
        moments.update(channels_first(array, call))
        output.update(run(alone, array))
    return Statistics({}, {"a": output.result()}, {"a": moments.result()}, len(arrays))


def channel_means(module: tvm.IRModule, arrays: list[np.ndarray], axis: int) -> np.ndarray:
    results = np.stack([run(module, array) for array in arrays]).astype(np.float64)
    others = tuple(index for index in range(results.ndim) if index != axis + 1)
    return results.mean(axis=others)


def with_bias(net: Net, x: relax.Var) -> relax.Var:
    return net.conv_bias("a", x, 6)


def without_bias(net: Net, x: relax.Var) -> relax.Var:
    return net.conv("a", x, 6, groups=2, strides=2)


def linear(net: Net, x: relax.Var) -> relax.Var:
    return net("a_bias", op.add(net.linear("a", x, 6), net.array(6)))


@pytest.mark.parametrize(
    ("body", "shape", "axis"),
    [
        (with_bias, (1, 4, 8, 8), 1),
        (without_bias, (1, 4, 8, 8), 1),
        (linear, (3, 16), 1),
    ],
)
@pytest.mark.parametrize(
    "config",
    [INT4, QuantizeConfig(weights="int4", activations=None, granularity=PerGroup(8))],
)
def test_channel_means_are_those_of_the_float_module(
    body: object, shape: tuple[int, ...], axis: int, config: QuantizeConfig
) -> None:
    module = build(body, shape)  # type: ignore[arg-type]
    arrays = biased_inputs(shape)
    schemes = {"a": CorrectBiasConfig()}
    quantised = quantize(module, config)
    corrected = CorrectBias(schemes, statistics_of_first_layer(module, arrays))(quantised)
    target = channel_means(module, arrays, axis)
    before = np.abs(channel_means(quantised, arrays, axis) - target)
    after = np.abs(channel_means(corrected, arrays, axis) - target)
    assert before.max() > 0.01
    assert after.max() < 1e-5


def test_integer_bias_moves_by_whole_steps() -> None:
    module = build(with_bias)
    arrays = biased_inputs((1, 4, 8, 8))
    statistics = statistics_of_first_layer(module, arrays)
    quantised = quantize(module)
    corrected = CorrectBias({"a": CorrectBiasConfig()}, statistics)(quantised)
    before, scale, _ = stored(quantised, "a_bias_bias")
    after, scale_after, _ = stored(corrected, "a_bias_corrected")
    np.testing.assert_array_equal(scale_after, scale)
    assert after.dtype == np.int32
    weight, weight_scale, _ = stored(quantised, "a_weight")
    decoded = (weight * weight_scale.reshape(-1, 1, 1, 1)).reshape(6, -1)
    rows = decoded.reshape(6, 4, 9).transpose(0, 2, 1).reshape(6, -1)  # patches: kernel, channel
    moments = statistics.moments["a"]
    channels = statistics.channels["a"]
    shift = rows.astype(np.float64) @ moments.mean[0] - channels.mean
    moved = (before.astype(np.int64) - after).reshape(-1)
    np.testing.assert_allclose(moved, shift / scale, atol=0.51)
    assert np.abs(moved).max() > 1


@pytest.mark.parametrize("weights", ["int4", "codebook4"])
def test_encoded_integer_layer_without_bias_gets_an_integer_bias(weights: str) -> None:
    module = build(lambda net, x: net.linear("a", x, 6), (3, 64))
    arrays = biased_inputs((3, 64))
    config = QuantizeConfig(weights=weights, granularity=PerGroup(8))  # type: ignore[arg-type]
    quantised = quantize(module, config)
    statistics = statistics_of_first_layer(module, arrays)
    corrected = CorrectBias({"a": CorrectBiasConfig()}, statistics)(quantised)
    integers, scale, _ = stored(corrected, "a_bias")
    assert integers.dtype == np.int32
    graph = Graph(quantised["main"])
    weight = next(item for item in graph.values if item.name == "a_weight")
    encoding = match_encoding(graph.values[weight], quantised)
    assert isinstance(encoding, FourBit)
    rows = encoding.decode().T.astype(np.float64)
    shift = rows @ statistics.moments["a"].mean[0] - statistics.channels["a"].mean
    np.testing.assert_allclose(integers.reshape(-1), -shift / scale, atol=0.51)


def test_integer_layer_without_bias_gets_an_integer_bias() -> None:
    module = build(without_bias)
    statistics = statistics_of_first_layer(module, biased_inputs((1, 4, 8, 8)))
    corrected = CorrectBias({"a": CorrectBiasConfig()}, statistics)(quantize(module))
    assert describe(corrected)["a_corrected"] == "add(a, a_bias)"
    integers, scale, axis = stored(corrected, "a_bias")
    assert integers.dtype == np.int32
    assert axis == 1
    assert scale.shape == (6,)


def test_float_layers_and_unselected_layers_are_left_alone() -> None:
    module = build(with_bias)
    statistics = statistics_of_first_layer(module, biased_inputs((1, 4, 8, 8)))
    same = CorrectBias({"a": CorrectBiasConfig()}, statistics)(module)
    tvm.ir.assert_structural_equal(same["main"], module["main"])
    quantised = quantize(module)
    same = CorrectBias({}, statistics)(quantised)
    tvm.ir.assert_structural_equal(same["main"], quantised["main"])


def test_missing_statistics_are_named() -> None:
    module = quantize(build(with_bias))
    with pytest.raises(DataError, match="lack the means of layer 'a'"):
        CorrectBias(all_layers(module, CorrectBiasConfig()), statistics_of({}))(module)
