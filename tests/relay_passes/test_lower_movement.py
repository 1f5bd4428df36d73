"""Pooling, data movement and normalisation in integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tvm import relax

from tvm_compress.relay_passes import ir

from .qdq import Expr, Graph, check, compile_module, graph, lower

A, OUT = (0.0317, 11), (0.0273, 4)


def conv(g: Graph, x: Expr, scale: tuple[float, int] = A) -> Expr:
    """Codes that are channels last in memory, channels first in the graph: [1, 4, H, W]."""
    y = g.emit(relax.op.nn.conv2d(g.qdq(x, *A), g.weight((4, 3, 3, 3)), padding=1), "conv")
    return g.qdq(y, *scale, name="features")


def behind_conv(operator: Callable[[Graph, Expr], Expr], out: tuple[float, int] = OUT) -> Any:
    def body(g: Graph, x: Expr) -> Expr:
        return g.quantize(g.emit(operator(g, conv(g, x)), "op"), *out)

    return graph({"x": (1, 3, 7, 8)}, body)


POOLS: dict[str, dict[str, Any]] = {
    "2x2": {"pool_size": 2, "strides": 2},
    "padded, all positions counted": {"pool_size": 3, "padding": (1, 1, 1, 1), "count_include_pad": True},
    "padded, inner positions counted": {"pool_size": 3, "padding": (1, 0, 1, 2), "strides": 2},
    "ceil": {"pool_size": (2, 3), "strides": (2, 2), "ceil_mode": True},
    "ceil, padded": {"pool_size": 3, "strides": 2, "padding": 1, "ceil_mode": True},
    "ceil, padded, all counted": {
        "pool_size": 3, "strides": 2, "padding": 1, "ceil_mode": True, "count_include_pad": True,
    },
    "whole": {"pool_size": (7, 8)},
}  # fmt: skip


@pytest.mark.parametrize("case", POOLS)
def test_average_pool(case: str) -> None:
    lowered = check(behind_conv(lambda g, x: relax.op.nn.avg_pool2d(x, **POOLS[case])))
    assert "sum_pool2d" in lowered.kernels


def test_average_pool_then_relu_from_nhwc() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        y = g.emit(relax.op.nn.avg_pool2d(g.qdq(x, *A), 3, 2, (1, 1, 1, 1), layout="NHWC"), "pool")
        return g.quantize(g.emit(relax.op.nn.relu(y), "relu"), *OUT)

    check(graph({"x": (2, 7, 8, 5)}, body), ["quantize", "sum_pool2d", "requantize"])


@pytest.mark.parametrize("case", ["2x2", "padded, inner positions counted", "ceil", "ceil, padded"])
def test_max_pool_passes_codes(case: str) -> None:
    options = {k: v for k, v in POOLS[case].items() if k != "count_include_pad"}
    lowered = check(behind_conv(lambda g, x: relax.op.nn.max_pool2d(x, **options), A), equal=1.0)
    assert "nn.max_pool2d" in lowered.kernels
    assert lowered.kernels.count("requantize") == 1


def test_padded_max_pool_of_the_smallest_codes() -> None:
    """The border must lose against the smallest code."""

    def body(g: Graph, x: Expr) -> Expr:
        return g.quantize(
            g.emit(relax.op.nn.max_pool2d(g.dequantize(x, *A), 3, padding=1), "pool"), *A
        )

    lowest = np.full((1, 2, 4, 4), -128, np.int8)
    check(graph({"x": ((1, 2, 4, 4), "int8")}, body), inputs=[[lowest]], equal=1.0)


@pytest.mark.parametrize("op", ["max", "avg"])
def test_pool1d(op: str) -> None:
    def body(g: Graph, x: Expr) -> Expr:
        pool = relax.op.nn.max_pool1d if op == "max" else relax.op.nn.avg_pool1d
        return g.quantize(g.emit(pool(g.qdq(x, *A), 3, 2, (1, 1)), "pool"), *OUT)

    check(graph({"x": (2, 5, 11)}, body))


GLOBAL: dict[str, Callable[[Graph, Expr], Expr]] = {
    "mean": lambda g, x: relax.op.mean(x, [2, 3], keepdims=True),
    "mean, axes dropped": lambda g, x: relax.op.mean(x, [2, 3]),
    "mean of one axis": lambda g, x: relax.op.mean(x, [3]),
    "mean over channels": lambda g, x: relax.op.mean(x, [1], keepdims=True),
    "mean of all": lambda g, x: relax.op.mean(x),
    "global pool": lambda g, x: relax.op.nn.adaptive_avg_pool2d(x, (1, 1)),
    "adaptive pool": lambda g, x: relax.op.nn.adaptive_avg_pool2d(x, (7, 4)),
    "sum": lambda g, x: relax.op.sum(x, [3]),
}


@pytest.mark.parametrize("case", GLOBAL)
def test_means(case: str) -> None:
    # A mean of 56 values moves little: a fine scale makes its steps visible.
    check(behind_conv(GLOBAL[case], (0.00731, -3)))


def test_head_of_a_classifier() -> None:
    """conv, global pool, flatten, linear: no transposes between the kernels."""

    def body(g: Graph, x: Expr) -> Expr:
        y = g.emit(relax.op.nn.adaptive_avg_pool2d(conv(g, x), (1, 1)), "pool")
        y = g.emit(relax.op.reshape(g.qdq(y, *OUT, name="pooled"), [1, 4]), "flat")
        return g.emit(relax.op.matmul(y, g.weight((4, 10), 1)), "logits")

    lowered = check(graph({"x": (1, 3, 7, 8)}, body), steps=0)
    kernels = [k for k in lowered.kernels if k != "reshape"]
    assert kernels == [
        "quantize",
        "permute_dims",
        "conv2d",
        "requantize",
        "sum",
        "requantize",
        "matmul",
        "dequantize",
    ]


MOVES: dict[str, Callable[[Graph, Expr], Expr]] = {
    "flatten": lambda g, x: relax.op.flatten(x),
    "reshape": lambda g, x: relax.op.reshape(x, [2, 2, 7, 8]),
    "permute": lambda g, x: relax.op.permute_dims(x, [0, 2, 3, 1]),
    "permute, reshape": lambda g, x: relax.op.reshape(
        g.emit(relax.op.permute_dims(x, [0, 2, 3, 1]), "nhwc"), [56, 4]
    ),
    "squeeze": lambda g, x: relax.op.squeeze(x, [0]),
    "expand": lambda g, x: relax.op.expand_dims(x, [2]),
    "slice": lambda g, x: relax.op.strided_slice(x, [1, 3], [1, 0], [3, 8], [1, 3]),
    "pad": lambda g, x: relax.op.nn.pad(x, [0, 0, 1, 0, 2, 1, 0, 3], "constant", 0.0),
    "nearest": lambda g, x: relax.op.image.resize2d(
        x, relax.ShapeExpr([14, 12]), None, "NCHW", "nearest_neighbor", "asymmetric", "floor"
    ),
    "nearest, half pixel": lambda g, x: relax.op.image.resize2d(
        x,
        relax.ShapeExpr([5, 16]),
        None,
        "NCHW",
        "nearest_neighbor",
        "half_pixel",
        "round_prefer_floor",
    ),
    "tile": lambda g, x: relax.op.tile(x, [1, 2, 1, 1]),
    "repeat": lambda g, x: relax.op.repeat(x, 2, 3),
    "flip": lambda g, x: relax.op.flip(x, 2),
    "take": lambda g, x: relax.op.take(x, relax.const(np.array([3, 0, 0], np.int32)), 1, "clip"),
    "broadcast": lambda g, x: relax.op.broadcast_to(x, [2, 4, 7, 8]),
}


@pytest.mark.parametrize("case", MOVES)
def test_codes_pass_through(case: str) -> None:
    lowered = check(behind_conv(MOVES[case], A), equal=1.0)
    assert lowered.kernels.count("requantize") == 1
    assert "clip" not in lowered.kernels
    assert "table" not in lowered.kernels


def test_padding_value_without_a_code_stays_float() -> None:
    lowered = check(
        behind_conv(lambda g, x: relax.op.nn.pad(x, [0] * 6 + [0, 1], "constant", -99.0)),
        integer=False,
    )
    assert [e["name"] for e in lowered.left_float] == ["op"]


def split_in_two(g: Graph, x: Expr, sections: Any) -> Expr:
    parts = g.emit(relax.op.split(conv(g, x), sections, 1), "parts")
    return [g.emit(relax.TupleGetItem(parts, k), f"part{k}") for k in range(2)]  # type: ignore[return-value]


@pytest.mark.parametrize("sections", [2, [1]])
def test_split(sections: Any) -> None:
    def body(g: Graph, x: Expr) -> tuple[Expr, ...]:
        return tuple(
            g.quantize(p, *A, name=f"y{k}") for k, p in enumerate(split_in_two(g, x, sections))
        )  # type: ignore[arg-type]

    check(graph({"x": (1, 3, 5, 6)}, body), equal=1.0)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("axis", [1, 3, -2])
def test_concat(same: bool, axis: int) -> None:
    def body(g: Graph, x: Expr) -> Expr:
        left = conv(g, x)
        right = conv(g, x) if same else conv(g, x, (0.0519, -7))
        joined = g.emit(relax.op.concat([left, right], axis), "joined")
        return g.quantize(joined, *(A if same else OUT))

    lowered = check(graph({"x": (1, 3, 5, 6)}, body), equal=1.0 if same else 0.99)
    assert "concat" in lowered.kernels


def test_channel_shuffle() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        y = g.emit(relax.op.reshape(conv(g, x), [1, 2, 2, 7, 8]), "groups")
        y = g.emit(relax.op.permute_dims(y, [0, 2, 1, 3, 4]), "turned")
        return g.quantize(g.emit(relax.op.reshape(y, [1, 4, 7, 8]), "shuffled"), *A)

    check(graph({"x": (1, 3, 7, 8)}, body), equal=1.0)


@pytest.mark.parametrize("axis", [-1, 1, 0])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_softmax(axis: int, dtype: str) -> None:
    zero = 128 if dtype == "uint8" else 0
    out = {"int8": (1 / 256, -128), "uint8": (1 / 256, 0), "int16": (1 / 32768, 0)}[dtype]

    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, 0.000317 if dtype == "int16" else 0.0717, zero, dtype)
        return g.quantize(g.emit(relax.op.nn.softmax(x, axis), "softmax"), *out, dtype)

    lowered = check(graph({"x": (5, 33, 10)}, body), spread=4.0)
    assert lowered.kernels == ["quantize", "softmax"]


def test_softmax_of_one_and_of_extremes() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        return g.quantize(relax.op.nn.softmax(g.dequantize(x, 0.5)), 1 / 256, -128)

    check(graph({"x": ((3, 1), "int8")}, body))
    codes = np.array([[-128, 127, -128], [127, 127, 127], [-128, -128, -128]], np.int8)
    check(graph({"x": ((3, 3), "int8")}, body), inputs=[[codes]])


def test_softmax_rounds_half_to_even() -> None:
    """Of 512 equal codes each has half a step of 1/256."""

    def body(g: Graph, x: Expr) -> Expr:
        return g.quantize(relax.op.nn.softmax(g.dequantize(x, 0.5)), 1 / 256, -128)

    check(graph({"x": ((1, 512), "int8")}, body), inputs=[[np.zeros((1, 512), np.int8)]], equal=1.0)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64)])
def test_layer_norm(shape: tuple[int, ...], dtype: str) -> None:
    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, *((0.000217, 0) if dtype == "int16" else A), dtype)
        channels = shape[-1]
        gamma, beta = (
            g.const(g.rng.uniform(0.5, 1.5, channels)),
            g.const(g.rng.normal(0, 1, channels)),
        )
        y = g.emit(relax.op.nn.layer_norm(x, gamma, beta, axes=[-1]), "norm")
        return g.quantize(y, *((0.000193, 0) if dtype == "int16" else OUT), dtype)

    lowered = check(graph({"x": shape}, body), equal=0.97 if dtype == "int16" else 0.99)
    assert lowered.kernels == ["quantize", "layer_norm"]


def test_layer_norm_of_equal_values() -> None:
    """Variance 0: epsilon alone stands below the fraction."""

    def body(g: Graph, x: Expr) -> Expr:
        ones, zeros = g.const(np.ones(8)), g.const(np.zeros(8))
        return g.quantize(relax.op.nn.layer_norm(g.qdq(x, *A), ones, zeros, axes=[-1]), *OUT)

    check(graph({"x": (2, 8)}, body), inputs=[[np.full((2, 8), 1.0, np.float32)]])


def test_embedding_of_codes() -> None:
    """The table keeps its codes; rows are scaled after they are picked."""
    for axis in (None, 0, 1):

        def body(g: Graph, ids: Expr, axis: int | None = axis) -> Expr:
            table = g.weight((11, 6), axis)
            return g.emit(relax.op.take(table, ids, 0, "clip"), "rows")

        module = graph({"ids": ((2, 3), "int64")}, body)
        ids = np.array([[0, 10, 3], [5, 5, 9]], np.int64)
        lowered = check(module, steps=0, inputs=[[ids]], integer=False)
        constants = [
            ir.dtype_of(argument)
            for binding in ir.bindings(lowered.module["main"])
            for argument in getattr(binding.value, "args", [])
            if ir.constant(argument) is not None and ir.constant(argument).size == 66
        ]
        assert constants == ["int8"], axis


def test_integer_output_and_several_outputs() -> None:
    def body(g: Graph, x: Expr) -> tuple[Expr, ...]:
        features = conv(g, x)
        pooled = g.emit(relax.op.mean(features, [2, 3]), "mean")
        codes = g.quantize(pooled, *OUT, name="codes")
        return features, codes, g.dequantize(codes, *OUT, name="reals")

    lowered = check(graph({"x": (1, 3, 7, 8)}, body), steps=[A[0], 1, OUT[0]])
    assert {"codes", "conv", "features_q"} <= set(lowered.names)


def test_input_returned_as_it_is() -> None:
    def body(g: Graph, x: Expr) -> tuple[Expr, Expr]:
        return x, g.quantize(x, *A)

    check(graph({"x": (2, 3)}, body), steps=[1, 1], integer=False)


def test_branches_use_lowered_values() -> None:
    """A condition known at run time only; both branches read a quantised tensor from outside."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 3, 5, 6], "float32"))
    flag = relax.Var("flag", relax.TensorType([], "bool"))
    with builder.function("main", [x, flag]):
        g = Graph(builder, 0)
        features = conv(g, x)
        branches = []
        for operator in (relax.op.nn.relu, relax.op.negative):
            inner = relax.Var("inner", relax.TensorType([1, 4, 5, 6], "float32"))
            value = builder.normalize(operator(features))
            block = relax.BindingBlock([relax.VarBinding(inner, value)])
            branches.append(relax.SeqExpr([block], inner))
        result = builder.emit(relax.If(flag, *branches), name_hint="branch")
        builder.emit_func_output(g.quantize(result, *OUT))
    module = builder.finalize()
    data = np.random.default_rng(0).normal(0, 2, (1, 3, 5, 6)).astype(np.float32)
    feeds = [[data, np.array(flag, bool)] for flag in (True, False)]
    lowered = check(module, inputs=feeds, integer=False)
    assert "conv2d" in lowered.kernels


def test_lowering_twice_changes_nothing() -> None:
    module = behind_conv(lambda g, x: relax.op.nn.relu(x))
    once = lower(module).module
    assert lower(once).module.same_as(once)
    assert callable(compile_module(once))
