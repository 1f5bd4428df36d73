"""Convolutions and matrix products in integers, against the float simulation and against NumPy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tvm import relax

from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.lower import TENSORS_ATTR
from tvm_compress.relay_passes.numerics import requantize as rules

from .qdq import Expr, Graph, calls, check, compile_module, fuse, graph, lower, random_inputs

CONV = ["quantize", "permute_dims", "conv2d", "requantize", "permute_dims"]
NHWC = {"data_layout": "NHWC", "kernel_layout": "HWIO"}


def conv2d_graph(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    axis: int | None = 0,
    *,
    bias: bool = True,
    clamp: Any = relax.op.nn.relu,
    zero_point: int = 3,
    dtype: str = "int8",
    weight_options: dict[str, Any] | None = None,
    out: tuple[float, int, str] = (0.07, -11, "int8"),
    op: Any = relax.op.nn.conv2d,
    **options: Any,
) -> Any:
    x_scale = 0.0002 if dtype == "int16" else 0.04

    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, x_scale, zero_point, dtype)
        w = g.weight(weight, axis, **(weight_options or {}))
        y = g.emit(op(x, w, **options), "conv")
        if bias:
            layout = options.get("data_layout", "NCHW" if len(shape) == 4 else "NCW")
            out_shape = ir.shape_of(y)
            assert out_shape is not None
            channels = [
                d if letter == "C" else 1 for d, letter in zip(out_shape, layout, strict=True)
            ]
            y = g.emit(relax.op.add(y, g.bias(channels, x_scale)), "biased")
        if clamp is not None:
            y = g.emit(clamp(y), "clamped")
        return g.quantize(y, *out)

    return graph({"x": shape}, body)


CONV2D = {
    "plain": ((1, 3, 7, 6), (5, 3, 3, 3), {}),
    "pointwise": ((2, 17, 5, 3), (9, 17, 1, 1), {}),
    "one": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "strided, asymmetric padding": (
        (1, 4, 9, 8),
        (6, 4, 3, 3),
        {"strides": 2, "padding": (0, 1, 2, 1)},
    ),
    "dilated": ((1, 4, 11, 9), (3, 4, 3, 2), {"dilation": (2, 3), "padding": (2, 1, 2, 2)}),
    "grouped": ((1, 6, 6, 5), (8, 3, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((1, 19, 7, 7), (19, 1, 3, 3), {"groups": 19, "padding": 1}),
    "depthwise, multiplier 2": (
        (1, 5, 6, 7),
        (10, 1, 3, 3),
        {"groups": 5, "strides": 2, "padding": (0, 0, 1, 1)},
    ),
}


@pytest.mark.parametrize("case", CONV2D)
def test_conv2d_from_nchw(case: str) -> None:
    shape, weight, options = CONV2D[case]
    lowered = check(conv2d_graph(shape, weight, **options))
    assert [k for k in lowered.kernels if k not in ("permute_dims", "reshape")] == CONV[0::2][
        :2
    ] + ["requantize"]
    assert "conv" in lowered.names
    assert "y" in lowered.names


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 2, 0, 1)])
def test_conv2d_from_nhwc_needs_no_transpose(padding: tuple[int, ...]) -> None:
    module = conv2d_graph((1, 6, 7, 5), (3, 3, 5, 4), 3, padding=padding, **NHWC)
    check(module, ["quantize", "conv2d", "requantize"])


@pytest.mark.parametrize("zero_point", [-128, 0, 127])
def test_padding_holds_the_zero_point(zero_point: int) -> None:
    check(conv2d_graph((1, 2, 4, 4), (3, 2, 3, 3), zero_point=zero_point, padding=2))


def test_conv2d_equals_numpy_bit_for_bit() -> None:
    """Independent of every kernel description: sums by einsum, then the module's rule."""
    module = conv2d_graph(
        (2, 3, 8, 7), (5, 3, 3, 2), padding=(1, 0, 2, 1), strides=(2, 1), clamp=None
    )
    lowered = lower(module)
    run = compile_module(lowered.module)
    calls = {b.var.name: b.value for b in ir.bindings(module["main"])}
    codes, scale = (ir.constant(calls["weight"].args[k]) for k in (0, 1))
    bias = ir.constant(calls["bias"].args[0])
    assert codes is not None
    assert scale is not None
    assert bias is not None
    x_scale = np.float64(np.float32(0.04))
    for seed in range(3):
        (x,) = random_inputs(module, seed)
        q = np.clip(np.rint(x / np.float32(0.04)) + 3, -128, 127).astype(np.int64)
        padded = np.pad(q - 3, ((0, 0), (0, 0), (1, 2), (0, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 2), (2, 3))[:, :, ::2]
        sums = np.einsum("ncyxhw,ochw->noyx", windows, codes.astype(np.int64))
        total = (sums + bias).astype(np.int32)
        product = (x_scale * scale.astype(np.float64)).astype(np.float32)
        multiplier = (product / np.float32(0.07)).reshape(1, -1, 1, 1)
        expected = rules.requantize(
            total, np.zeros((), np.int32), multiplier, -11, (-128, 127), "int8"
        )
        np.testing.assert_array_equal(run(x), expected)


CLAMPS = {
    "none": None,
    "relu": relax.op.nn.relu,
    "relu6": relax.op.nn.relu6,
    "clip": lambda x: relax.op.clip(x, -1.5, 2.25),
    "minimum, maximum": lambda x: relax.op.minimum(
        relax.op.maximum(relax.const(np.float32(-0.5)), x), relax.const(np.float32(3))
    ),
}


@pytest.mark.parametrize("clamp", CLAMPS)
def test_clamps_become_bounds(clamp: str) -> None:
    module = conv2d_graph((1, 3, 5, 5), (4, 3, 3, 3), clamp=CLAMPS[clamp])
    check(module, CONV)


@pytest.mark.parametrize("out", [(0.05, 128, "uint8"), (0.0005, 0, "int16"), (2.0, 5, "int8")])
def test_output_dtypes(out: tuple[float, int, str]) -> None:
    check(conv2d_graph((1, 3, 5, 5), (4, 3, 3, 3), out=out), CONV)


@pytest.mark.parametrize(
    ("dtype", "zero_point", "axis"),
    [("uint8", 128, 0), ("uint8", 7, None), ("int8", -3, 0), ("int16", 0, 0)],
)
def test_weight_dtypes_and_zero_points(dtype: str, zero_point: int, axis: int | None) -> None:
    options = {
        "dtype": dtype,
        "zero_point": zero_point,
        "scale": 3e-5 if dtype == "int16" else 0.01,
    }
    check(conv2d_graph((1, 5, 6, 6), (7, 5, 3, 3), axis, weight_options=options, padding=1), CONV)


def test_weight_zero_point_per_channel() -> None:
    options = {"dtype": "uint8", "zero_point": np.array([0, 255, 128, 7])}
    lowered = check(conv2d_graph((1, 3, 6, 6), (4, 3, 3, 3), 0, weight_options=options, padding=1))
    assert lowered.kernels == CONV


def test_weight_with_a_scale_per_input_channel_is_left_float_and_listed() -> None:
    lowered = check(conv2d_graph((1, 3, 6, 6), (4, 3, 3, 3), 1, bias=False), integer=False)
    assert [entry["name"] for entry in lowered.left_float] == ["conv"]


def test_int16_activations_sum_in_int64_where_int32_could_overflow() -> None:
    module = conv2d_graph((1, 128, 5, 5), (3, 128, 3, 3), dtype="int16", zero_point=0)
    lowered = check(
        module, CONV, inputs=[[np.full((1, 128, 5, 5), 6.5, np.float32)], *extremes((1, 128, 5, 5))]
    )
    assert accumulators(lowered) == ["int64"]
    small = conv2d_graph(
        (1, 2, 5, 5), (3, 2, 3, 3), dtype="int16", zero_point=0, out=(0.0005, 0, "int16")
    )
    assert accumulators(check(small, CONV)) == ["int32"]


def extremes(shape: tuple[int, ...]) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(1)
    return [[np.where(rng.random(shape) < 0.5, 6.6, -6.6).astype(np.float32)]]


def accumulators(lowered: Any) -> list[str]:
    return [
        ir.dtype_of(binding.var)
        for binding in ir.bindings(lowered.module["main"])
        if binding.var.name == "conv"
    ]


def test_bias_that_does_not_fit_beside_the_sum_is_added_in_int64() -> None:
    """A sum of 2^31 - small and a bias in the same direction must not wrap round."""

    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, 1.0)
        w = g.weight((4, 3, 1, 1), None, scale=1.0)
        y = g.emit(relax.op.nn.conv2d(x, w), "conv")
        y = g.emit(relax.op.add(y, g.const(np.full((1, 4, 1, 1), 2.1e9))), "biased")
        return g.quantize(y, 2e7, 0)

    module = graph({"x": (1, 3, 4, 4)}, body)
    check(module, CONV, spread=60.0)
    full = lambda value: [np.full((1, 3, 4, 4), value, np.float32)]  # noqa: E731
    check(module, inputs=[full(127), full(-128)])


def test_float_bias_is_rounded_to_the_scale_of_the_sums() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, 0.04, 3)
        y = g.emit(relax.op.nn.conv2d(x, g.weight((4, 3, 3, 3))), "conv")
        bias = g.const(g.rng.uniform(-1, 1, (4, 1, 1)))
        return g.quantize(g.emit(relax.op.add(bias, y), "biased"), 0.07, 4)

    check(graph({"x": (1, 3, 6, 5)}, body), CONV)


CONV1D = {
    "plain": ((2, 5, 11), (7, 5, 3), {"padding": (2, 0)}),
    "dilated, strided": ((1, 5, 17), (7, 5, 3), {"dilation": 2, "strides": 2, "padding": 1}),
    "grouped": ((1, 6, 9), (4, 3, 2), {"groups": 2}),
    "depthwise": ((1, 6, 9), (6, 1, 3), {"groups": 6, "padding": 1}),
    "width 1": ((1, 4, 1), (3, 4, 1), {}),
}


@pytest.mark.parametrize("case", CONV1D)
def test_conv1d(case: str) -> None:
    shape, weight, options = CONV1D[case]
    lowered = check(conv2d_graph(shape, weight, op=relax.op.nn.conv1d, **options))
    assert "conv" in lowered.names


def test_conv1d_from_nwc() -> None:
    options = {"data_layout": "NWC", "kernel_layout": "WIO", "op": relax.op.nn.conv1d}
    check(conv2d_graph((1, 9, 4), (3, 4, 6), 2, padding=(1, 1), **options))


TRANSPOSE = {
    "stride 2": ((1, 3, 4, 5), (3, 4, 3, 3), {"strides": 2, "padding": 1}),
    "output padding": (
        (1, 3, 4, 5),
        (3, 4, 3, 3),
        {"strides": (2, 3), "padding": (1, 0, 1, 0), "output_padding": (1, 2)},
    ),
    "groups": ((1, 6, 4, 3), (6, 2, 2, 3), {"strides": 2, "groups": 3}),
    "dilated": ((1, 2, 5, 4), (2, 3, 3, 2), {"dilation": (2, 1), "padding": (1, 2, 0, 1)}),
    "depthwise": ((1, 4, 3, 3), (4, 1, 2, 2), {"strides": 2, "groups": 4}),
}


@pytest.mark.parametrize("case", TRANSPOSE)
def test_conv2d_transpose(case: str) -> None:
    shape, weight, options = TRANSPOSE[case]
    module = conv2d_graph(shape, weight, 1, op=relax.op.nn.conv2d_transpose, **options)
    lowered = check(module)
    assert "conv2d_transpose" in lowered.kernels


@pytest.mark.parametrize(("groups", "output_padding"), [(1, 0), (1, 1), (2, 0)])
def test_conv1d_transpose(groups: int, output_padding: int) -> None:
    module = conv2d_graph(
        (1, 4, 7), (4, 3, 3), 1, op=relax.op.nn.conv1d_transpose, groups=groups, strides=2,
        padding=1, output_padding=output_padding,
    )  # fmt: skip
    lowered = check(module)
    assert "conv2d_transpose" in lowered.kernels


def matmul_graph(
    left: tuple[int, ...], weight: tuple[int, ...], axis: int | None = 1, logits: bool = False
) -> Any:
    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, 0.04, -7)
        w = g.weight(weight, axis)
        y = g.emit(relax.op.matmul(x, w), "linear")
        y = g.emit(relax.op.add(y, g.bias((weight[-1],), 0.04)), "biased")
        return y if logits else g.quantize(y, 0.08, 9)

    return graph({"x": left}, body)


@pytest.mark.parametrize(
    ("left", "weight"),
    [((1, 1), (1, 1)), ((3, 17), (17, 9)), ((2, 5, 8), (8, 3)), ((2, 1, 3, 16), (16, 33))],
)
def test_matmul(left: tuple[int, ...], weight: tuple[int, ...]) -> None:
    lowered = check(matmul_graph(left, weight))
    assert "linear" in lowered.names
    assert [k for k in lowered.kernels if k != "reshape"] == ["quantize", "matmul", "requantize"]


def test_matmul_per_tensor_and_transposed_weight() -> None:
    check(matmul_graph((3, 12), (12, 5), None))

    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, 0.04)
        w = g.emit(relax.op.permute_dims(g.weight((6, 12), 0)), "turned")
        return g.quantize(g.emit(relax.op.matmul(x, w), "linear"), 0.08, 9)

    check(graph({"x": (2, 12)}, body), ["quantize", "matmul", "requantize"])


def test_logits_are_dequantised_behind_the_sum() -> None:
    lowered = check(matmul_graph((2, 30), (30, 10), logits=True), steps=0)
    assert lowered.kernels == ["quantize", "matmul", "dequantize"]


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 3, 5), (2, 5, 4)), ((1, 2, 3, 5), (1, 2, 5, 4)), ((2, 3, 4, 5), (5, 4)), ((2, 2, 3, 5), (1, 2, 5, 4)),
     ((2, 5, 3), (1, 3, 2)), ((1, 5, 3), (4, 3, 2))],
)  # fmt: skip
def test_product_of_two_activations(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    def body(g: Graph, a: Expr, b: Expr) -> Expr:
        a, b = g.qdq(a, 0.0317, 11), g.qdq(b, 0.0511, -20, name="b")
        return g.quantize(g.emit(relax.op.matmul(a, b), "attention"), 0.2037, 1)

    lowered = check(graph({"a": left, "b": right}, body))
    assert "batch_matmul" in lowered.kernels


def test_product_of_two_int16_activations_sums_in_int64() -> None:
    def body(g: Graph, a: Expr, b: Expr) -> Expr:
        a, b = g.qdq(a, 0.000207, 0, "int16"), g.qdq(b, 0.000207, 0, "int16", name="b")
        return g.quantize(g.emit(relax.op.matmul(a, b), "attention"), 0.00107, 0, "int16")

    check(graph({"a": (2, 3, 40), "b": (2, 40, 4)}, body), spread=6.0)


def test_attention_with_transposed_keys() -> None:
    def body(g: Graph, a: Expr, b: Expr) -> Expr:
        a, b = g.qdq(a, 0.0317), g.qdq(b, 0.0317, name="b")
        heads = [2, 5, 3, 4]
        q = g.emit(
            relax.op.permute_dims(g.emit(relax.op.reshape(a, heads), "qr"), [0, 2, 1, 3]), "q"
        )
        k = g.emit(
            relax.op.permute_dims(g.emit(relax.op.reshape(b, heads), "kr"), [0, 2, 3, 1]), "k"
        )
        scores = g.emit(relax.op.matmul(q, k), "scores")
        scores = g.emit(relax.op.multiply(scores, g.const(0.5)), "scaled")
        return g.quantize(scores, 0.1013)

    check(graph({"a": (2, 5, 12), "b": (2, 5, 12)}, body))


def test_integer_result_of_conv_integer() -> None:
    """uint8 in, int32 out, every scale 1: the sums themselves."""

    def body(g: Graph, x: Expr) -> Expr:
        x = g.dequantize(x, 1.0, 121)
        codes = g.rng.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8)
        w = g.emit(
            relax.op.dequantize(
                ir.array_const(codes), g.const(1.0), relax.const(0, "int8"), 0, "float32"
            ),
            "ones",
        )
        y = g.emit(relax.op.nn.conv2d(x, w, padding=1), "conv")
        return g.emit(relax.op.astype(y, "int32"), "sums")

    lowered = check(graph({"x": ((1, 3, 6, 5), "uint8")}, body), equal=1.0)
    assert "requantize" not in lowered.kernels
    assert lowered.float_tensors == []


def test_float_layers_become_kernels_too() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        w = g.const(g.rng.normal(0, 0.3, (4, 3, 3, 3)))
        y = g.emit(relax.op.nn.conv2d(x, w, padding=1), "conv")
        y = g.emit(relax.op.nn.relu(y), "relu")
        y = g.emit(relax.op.reshape(y, [1, 80]), "flat")
        return g.emit(relax.op.matmul(y, g.const(g.rng.normal(0, 0.3, (80, 7)))), "linear")

    lowered = check(graph({"x": (1, 3, 4, 5)}, body), steps=0, integer=False)
    assert [k for k in lowered.kernels if k in ("conv2d", "matmul")] == ["conv2d", "matmul"]
    assert lowered.left_float == []


def test_weight_only_layers_keep_their_codes() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        y = g.emit(relax.op.nn.conv2d(x, g.weight((4, 3, 3, 3)), padding=1), "conv")
        y = g.emit(relax.op.reshape(y, [1, 80]), "flat")
        return g.emit(relax.op.matmul(y, g.weight((80, 7), 1)), "linear")

    module = graph({"x": (1, 3, 4, 5)}, body)
    lowered = check(module, steps=0, integer=False)
    stored = [
        ir.dtype_of(b.value.args[1].fields[1])
        for b in ir.bindings(lowered.module["main"])
        if b.var.name in ("conv", "linear")
    ]
    assert stored == ["int8", "int8"]


def test_layers_called_like_kernels_keep_their_names() -> None:
    """Functions and helper variables make way for the graph's names, whose digits are its own."""

    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, 0.04, 3)
        # The second's weight and sums are others, so its function is too: conv2d and one more.
        y = g.emit(relax.op.nn.conv2d(x, g.weight((4, 3, 3, 3)), padding=1), "conv2d")
        y = g.dequantize(g.quantize(y, 0.07, name="requantize"), 0.07, name="dequantize")
        y = g.emit(relax.op.nn.conv2d(y, g.weight((6, 4, 1, 1))), "conv2d1")
        y = g.dequantize(g.quantize(y, 0.07, name="requantize2"), 0.07, name="d")
        y = g.emit(relax.op.nn.conv2d(y, g.weight((6, 1, 3, 3)), padding=1, groups=6), "transposed")
        y = g.dequantize(g.quantize(y, 0.07, name="depthwise_conv2d"), 0.07, name="e")
        y = g.emit(relax.op.reshape(y, [1, 120]), "flat")
        y = g.emit(relax.op.matmul(y, g.weight((120, 7), 1)), "matmul")
        return g.quantize(y, 0.2, name="requantize1")

    module = graph({"matmul3": (1, 3, 4, 5)}, body)
    lowered = check(module)
    layers = ["conv2d", "conv2d1", "transposed", "matmul"]
    codes = ["requantize", "requantize2", "depthwise_conv2d", "requantize1"]
    assert [name for name in lowered.names if name in layers + codes] == [
        name for pair in zip(layers, codes, strict=True) for name in pair
    ]
    named = set(layers + codes) | {"matmul3"}
    functions = {var.name_hint for var in lowered.module.get_global_vars()}
    assert not functions & named
    tensors = json.loads(str(lowered.module["main"].attrs[TENSORS_ATTR]))
    assert {tensors[name]["source"] for name in codes} == set(layers)
    found = [call["layers"] for call in calls(fuse(lowered.module))]
    assert [layer for layer in layers if any(layer in names for names in found)] == layers
