"""The numbers that `Quantize` writes, against independent NumPy, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.errors import DataError, RecipeError
from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.encodings import match_encoding
from tvm_compress.relay_passes.graph import Graph, rebuild
from tvm_compress.relay_passes.numerics.granularity import PerGroup, PerTensor
from tvm_compress.relay_passes.numerics.ranges import MinMax
from tvm_compress.relay_passes.quantize import Quantize, observe, read_left_float
from tvm_compress.relay_passes.quantize_config import QuantizeConfig

from .floats import (
    Net,
    all_layers,
    build,
    parameters_of,
    quantize,
    quantized_values,
    run,
    samples,
    statistics_of,
    stored,
)


def one_conv(net: Net, x: relax.Var) -> relax.Var:
    return net.conv_relu("a", x, 6)


def constant_of(module: tvm.IRModule, name: str) -> np.ndarray:
    """The constant operand of the call that defines `name`: a weight or a bias."""
    graph = Graph(module["main"])
    variable = next(item for item in graph.values if item.name == name)
    array = graph.constant(graph.values[variable].args[1])
    assert array is not None
    return array


def test_weights_by_channel_and_bias_in_input_scale_times_weight_scale() -> None:
    module = build(one_conv)
    quantised = quantize(module)
    weight, bias = constant_of(module, "a"), constant_of(module, "a_bias").reshape(-1)
    integers, scale, axis = stored(quantised, "a_weight")
    expected_scale = np.abs(weight).reshape(6, -1).max(axis=1) / np.float32(127)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
    assert axis == 0
    assert np.abs(integers).max() == 127
    assert integers.dtype == np.int8
    expected = np.rint(weight / scale.reshape(6, 1, 1, 1))
    np.testing.assert_array_equal(integers, expected)

    input_scale = np.float32(8 / 255)
    stored_bias, bias_scale, bias_axis = stored(quantised, "a_bias_bias")
    assert stored_bias.dtype == np.int32
    assert stored_bias.shape == (1, 6, 1, 1)
    assert bias_axis == 1
    np.testing.assert_allclose(bias_scale, input_scale * scale, rtol=1e-6)
    np.testing.assert_array_equal(stored_bias.reshape(-1), np.rint(bias / bias_scale))


def test_result_equals_integer_arithmetic_in_numpy() -> None:
    """sum((x_q - z) * w_q) + b_q in int64, times the scales, is what the graph computes."""
    module = build(one_conv)
    quantised = quantize(module)
    (x,) = samples(module, 1)
    scale, zero_point, _ = parameters_of(quantised, "x")
    x_q = np.clip(np.rint(x / np.float32(scale)) + zero_point, -128, 127).astype(np.int64)
    w_q, w_scale, _ = stored(quantised, "a_weight")
    b_q, _, _ = stored(quantised, "a_bias_bias")
    padded = np.pad(x_q - zero_point, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    sums = np.einsum("nchwyx,ocyx->nohw", windows, w_q.astype(np.int64)) + b_q
    expected = np.maximum(sums * (w_scale.reshape(1, 6, 1, 1) * scale), 0)
    np.testing.assert_allclose(run(quantised, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (QuantizeConfig(), 0.06),
        (QuantizeConfig(activations="uint8"), 0.06),
        (QuantizeConfig(symmetric=True), 0.06),
        (QuantizeConfig(granularity=PerTensor()), 0.06),
        (QuantizeConfig(scales="power_of_two"), 0.12),
        (QuantizeConfig(activations="int16"), 0.03),
        (QuantizeConfig(activations=None), 0.03),
        (QuantizeConfig(activations=None, granularity=PerGroup(5)), 0.03),
        (QuantizeConfig(weights="int4", activations=None), 0.45),
        (QuantizeConfig(weights="int4", activations=None, granularity=PerGroup(8)), 0.35),
        (QuantizeConfig(weights="int4", activations=None, granularity=PerTensor()), 0.55),
        (QuantizeConfig(weights="int4", activations=None, scales="power_of_two"), 0.55),
        (QuantizeConfig(weights="int4", activations=None, zero_points=True), 0.45),
        (QuantizeConfig(weights="int4", granularity=PerGroup(8)), 0.35),
        (QuantizeConfig(weights="codebook4"), 0.35),
        (QuantizeConfig(weights="codebook4", table_channels=4, granularity=PerGroup(16)), 0.3),
        (QuantizeConfig(weights="normal4"), 0.45),
    ],
)
def test_every_scheme_stays_near_the_float_module(config: QuantizeConfig, bound: float) -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        pooled = net("pool", op.mean(net.conv_relu("b", net.conv_relu("a", x, 8), 8), [2, 3]))
        return net.linear("fc", pooled, 5)

    module = build(body)
    quantised = quantize(module, config)
    assert read_left_float(quantised) == []
    for x in samples(module):
        x = np.clip(x, -4, 4)
        assert np.abs(run(quantised, x) - run(module, x)).max() < bound


def test_uint8_activations_start_at_zero_when_symmetric_and_positive() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        return net.conv("b", net.conv_relu("a", x, 8), 4)

    config = QuantizeConfig(activations="uint8", symmetric=True)
    module = quantize(build(body), config, ranges={"x": (-2.0, 1.0), "a_relu": (0.0, 5.1)})
    assert parameters_of(module, "x") == (pytest.approx(2 / 128), 128, "uint8")
    assert parameters_of(module, "a_relu") == (pytest.approx(5.1 / 255), 0, "uint8")


def test_power_of_two_scales_are_powers_of_two_everywhere() -> None:
    module = quantize(build(one_conv), QuantizeConfig(scales="power_of_two"))
    scales = [
        array
        for binding in ir.bindings(module["main"])
        if ir.op_name(binding.value) in ("relax.quantize", "relax.dequantize")
        and (array := ir.constant(binding.value.args[1])) is not None
    ]
    assert len(scales) == 4
    for scale in scales:
        np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)


def test_bias_of_a_nearly_dead_channel_does_not_leave_int32() -> None:
    module = build(one_conv)
    graph = Graph(module["main"])
    variable = next(item for item in graph.values if item.name == "a")
    weight = graph.constant(graph.values[variable].args[1])
    assert weight is not None
    weight = weight.copy()
    weight[2] *= 1e-12
    call = graph.values[variable]
    changed = relax.Call(call.op, [call.args[0], relax.const(weight)], call.attrs, call.ty_args)
    module["main"] = rebuild(graph.function, replace={variable: changed})
    quantised = quantize(relax.transform.Normalize()(module))
    bias, scale, _ = stored(quantised, "a_bias_bias")
    assert np.abs(bias.astype(np.int64)).max() <= 2**30
    np.testing.assert_allclose(
        (bias.reshape(-1) * scale)[2], constant_of(module, "a_bias").reshape(-1)[2], rtol=1e-6
    )


def test_int4_weights_are_stored_two_in_a_byte() -> None:
    config = QuantizeConfig(weights="int4", activations=None, granularity=PerGroup(8))
    module = build(one_conv)
    quantised = quantize(module, config)
    graph = Graph(quantised["main"])
    variable = next(item for item in graph.values if item.name == "a_weight")
    encoding = match_encoding(graph.values[variable], quantised)
    assert encoding is not None
    assert encoding.stored.nbytes == 4 * 9 // 2 * 6
    assert encoding.scales.shape == (5, 6)  # 36 weights in groups of 8, the last of 4
    step = encoding.scales.max()
    assert np.abs(encoding.decode() - constant_of(module, "a")).max() < 1.6 * step


def test_sums_shorter_than_a_group_of_int4_are_int8() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        return net.conv("b", net.conv("a", x, 8), 4)  # sums of 36 and 72

    config = QuantizeConfig(
        weights="int4", activations=None, granularity=PerGroup(40), zero_points=True
    )
    quantised = quantize(build(body), config)
    integers, scale, _ = stored(quantised, "a_weight")
    assert integers.dtype == np.int8
    assert scale.shape == (8,)
    graph = Graph(quantised["main"])
    variable = next(item for item in graph.values if item.name == "b_weight")
    encoding = match_encoding(graph.values[variable], quantised)
    assert encoding is not None
    assert encoding.words == "int4/group 40 with zero points"


@pytest.mark.parametrize(
    ("layout", "shape", "groups"),
    [("OIHW", (6, 4, 3, 3), 1), ("HWIO", (3, 3, 4, 6), 1), ("OIHW", (8, 2, 3, 3), 2)],
)
@pytest.mark.parametrize("activations", ["int8", None])
def test_layouts_and_groups(
    layout: str, shape: tuple[int, ...], groups: int, activations: str | None
) -> None:
    data_layout = "NHWC" if layout == "HWIO" else "NCHW"

    def body(net: Net, x: relax.Var) -> relax.Var:
        weight = net.array(*shape, spread=0.2)
        attrs = {"data_layout": data_layout, "kernel_layout": layout, "groups": groups}
        return net("a", op.nn.conv2d(x, weight, padding=1, **attrs))

    module = build(body, (1, 8, 8, 4) if data_layout == "NHWC" else (1, 4, 8, 8))
    config = QuantizeConfig(activations=activations)  # type: ignore[arg-type]
    quantised = quantize(module, config)
    _, scale, axis = stored(quantised, "a_weight")
    assert axis == layout.index("O")
    assert scale.shape == (shape[axis],)
    (x,) = samples(module, 1)
    assert np.abs(run(quantised, x) - run(module, x)).max() < 0.1


def test_grouped_transposed_convolution_repeats_its_scales_in_the_bias() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        weight = net.array(4, 3, 3, 3, spread=0.2)  # [I, O/groups, H, W], two groups
        y = net("a", op.nn.conv2d_transpose(x, weight, strides=2, padding=1, groups=2))
        return net.bias("a_bias", y)

    module = build(body)
    quantised = quantize(module)
    _, scale, axis = stored(quantised, "a_weight")
    _, bias_scale, _ = stored(quantised, "a_bias_bias")
    assert axis == 1
    np.testing.assert_allclose(bias_scale, np.tile(scale, 2) * np.float32(8 / 255), rtol=1e-6)
    (x,) = samples(module, 1)
    assert np.abs(run(quantised, x) - run(module, x)).max() < 0.1


def test_compressed_layers_are_left_as_they_are() -> None:
    module = quantize(build(one_conv), QuantizeConfig(activations=None))
    again = quantize(module, QuantizeConfig())
    assert quantized_values(again) == []
    (left,) = read_left_float(again)
    assert (left.name, left.reason) == ("a", "its weight is already compressed")
    again = Quantize({"a": QuantizeConfig(activations=None)}, statistics_of({}))(module)
    np.testing.assert_array_equal(stored(again, "a_weight")[0], stored(module, "a_weight")[0])


def test_the_given_module_is_not_changed() -> None:
    module = build(one_conv)
    before = module.clone()
    quantize(module, QuantizeConfig(weights="int4", activations=None))
    quantize(module)
    tvm.ir.assert_structural_equal(module, before)


def test_passes_compose_in_a_plain_sequential() -> None:
    module = build(one_conv)
    schemes = all_layers(module, QuantizeConfig(calibrate=MinMax()))
    statistics = statistics_of(dict.fromkeys(observe(module, schemes).tensors, (-4.0, 4.0)))
    passes = tvm.transform.Sequential(
        [
            Quantize(schemes, statistics),
            relax.transform.LegalizeOps(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
        ]
    )
    (x,) = samples(module, 1)
    np.testing.assert_allclose(
        run(passes(module), x), run(quantize(module), x), rtol=1e-5, atol=1e-5
    )


def test_missing_statistics_are_named() -> None:
    module = build(one_conv)
    with pytest.raises(DataError, match="no tensor 'x'; calibrate the module"):
        Quantize(all_layers(module, QuantizeConfig()), statistics_of({}))(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, "weights: none with activations: int8"),
        ({"granularity": PerGroup(32)}, "per_group with weights: int8, activations: int8"),
        ({"weights": "int4", "granularity": PerGroup(12)}, "must be a multiple of 8"),
        (
            {"weights": "int4", "granularity": PerGroup(8), "activations": "int16"},
            "multiply bytes",
        ),
        ({"table_channels": 4}, "table_channels: 4 with weights: int8"),
        ({"weights": "codebook4", "table_channels": 6}, "4 output channels or a multiple"),
        ({"weights": "codebook4", "activations": None}, "codebook4 without activations"),
        ({"weights": "codebook4", "activations": "int16"}, "multiply bytes"),
        ({"weights": "normal4", "granularity": PerTensor()}, "needs a float scale for each"),
        ({"weights": "int4", "zero_points": True}, "zero points are for int4 or int8"),
        ({"activations": "int16", "symmetric": False}, "int16 with symmetric: false"),
    ],
)
def test_bad_combinations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_weights_of_fewer_bits_are_stored_in_bytes(bits: int) -> None:
    config = QuantizeConfig(weights=f"int{bits}")  # type: ignore[arg-type]
    module = quantize(build(lambda net, x: net.conv("a", x, 8)), config)
    integers, scale, _ = stored(module, "a_weight")
    assert integers.dtype == np.int8
    # Symmetric, and each channel uses all of its range.
    assert (np.abs(integers.astype(int)).max(axis=(1, 2, 3)) == 2 ** (bits - 1) - 1).all()
    assert scale.shape == (8,)


def test_fewer_bits_without_integer_activations_are_refused() -> None:
    with pytest.raises(RecipeError, match="int6 without activations"):
        QuantizeConfig(weights="int6", activations=None)
