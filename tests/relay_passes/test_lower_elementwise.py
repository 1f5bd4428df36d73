"""Sums, products, tables and clamps in integers. Scales have no round ratios: where a result falls
on half a step exactly, the float simulation rounds by its own errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from .qdq import Expr, Graph, check, graph

A, B, OUT = (0.0317, 11), (0.0573, -20), (0.0731, 4)
Shape = tuple[int, ...]


def binary(
    op: Callable[[Expr, Expr], Expr], a: Shape, b: Shape, dtype: str = "int8"
) -> tvm.IRModule:
    factor = 1 / 256 if dtype == "int16" else 1.0

    def body(g: Graph, x: Expr, y: Expr) -> Expr:
        x = g.qdq(x, A[0] * factor, A[1], dtype)
        y = g.qdq(y, B[0] * factor, B[1], dtype, name="other")
        return g.quantize(g.emit(op(x, y), "op"), OUT[0] * factor, OUT[1], dtype)

    return graph({"x": a, "y": b}, body)


BROADCASTS = {
    "same": ((1, 3, 4, 5), (1, 3, 4, 5)),
    "one element": ((1,), (1,)),
    "channel": ((2, 3, 4, 5), (1, 3, 1, 1)),
    "lower rank": ((2, 3, 4), (4,)),
    "first is smaller": ((3, 1, 1), (2, 3, 4, 5)),
    "outer": ((4, 1), (1, 5)),
}
OPS = {"add": relax.op.add, "subtract": relax.op.subtract, "multiply": relax.op.multiply}


@pytest.mark.parametrize("case", BROADCASTS)
@pytest.mark.parametrize("name", OPS)
def test_two_tensors(name: str, case: str) -> None:
    lowered = check(binary(OPS[name], *BROADCASTS[case]))
    family = {"multiply": "product"}.get(name, "requantize_sum")
    assert family in lowered.kernels


@pytest.mark.parametrize("name", OPS)
def test_two_int16_tensors(name: str) -> None:
    check(binary(OPS[name], (2, 3, 7), (2, 3, 7), "int16"))


@pytest.mark.parametrize("name", OPS)
def test_clamp_behind_two_tensors(name: str) -> None:
    check(binary(lambda a, b: relax.op.nn.relu(OPS[name](a, b)), (2, 3, 7), (2, 3, 7)))
    check(binary(lambda a, b: relax.op.clip(OPS[name](a, b), -1.0, 2.0), (2, 3, 7), (2, 3, 7)))


def test_round_scale_ratios_round_half_to_even() -> None:
    """Powers of two: half of all sums are ties, and the simulation is exact."""

    def body(g: Graph, x: Expr, y: Expr) -> Expr:
        x, y = g.qdq(x, 0.125), g.qdq(y, 0.0625, 3, name="other")
        return g.quantize(g.emit(relax.op.add(x, y), "sum"), 0.25, 1)

    check(graph({"x": (16, 33), "y": (16, 33)}, body), equal=1.0, spread=8.0)


def test_operand_on_both_sides() -> None:
    check(
        graph({"x": (3, 40)}, lambda g, x: g.quantize(relax.op.add(g.qdq(x, *A), x), *OUT)),
        integer=False,
    )

    def square(g: Graph, x: Expr) -> Expr:
        d = g.qdq(x, *A)
        return g.quantize(g.emit(relax.op.multiply(d, d), "square"), *OUT)

    assert check(graph({"x": (3, 40)}, square)).kernels == ["quantize", "table"]


def conv(g: Graph, x: Expr, name: str = "conv", channels: int = 4) -> Expr:
    """A convolution of codes that keeps [1, channels, H, W]."""
    return g.emit(relax.op.nn.conv2d(x, g.weight((4, channels, 3, 3)), padding=1), name)


RESIDUALS = {
    "plain": lambda g, acc, x: relax.op.add(acc, x),
    "other side, relu": lambda g, acc, x: relax.op.nn.relu(relax.op.add(x, acc)),
    "relu before": lambda g, acc, x: relax.op.add(g.emit(relax.op.nn.relu(acc), "early"), x),
    "relu6 before, subtracted": lambda g, acc, x: relax.op.subtract(
        x, g.emit(relax.op.nn.relu6(acc), "early")
    ),
    "relu of the residual": lambda g, acc, x: relax.op.add(acc, g.emit(relax.op.nn.relu(x), "pos")),
    "silu of the residual": lambda g, acc, x: relax.op.add(
        acc, g.emit(relax.op.nn.silu(x), "silu")
    ),
    "and a constant": lambda g, acc, x: relax.op.add(
        g.emit(relax.op.add(acc, x), "two"), g.const(g.rng.normal(0, 1, (1, 4, 1, 1)))
    ),
}


@pytest.mark.parametrize("case", RESIDUALS)
def test_residual_of_a_convolution(case: str) -> None:
    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, *A)
        return g.quantize(g.emit(RESIDUALS[case](g, conv(g, x), x), "sum"), *OUT)

    lowered = check(graph({"x": (1, 4, 6, 5)}, body))
    assert "requantize_sum" in lowered.kernels


def test_two_convolutions_and_a_third_term() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, *A)
        two = g.emit(relax.op.add(conv(g, x, "left"), conv(g, x, "right")), "two")
        return g.quantize(g.emit(relax.op.add(two, x), "three"), *OUT)

    lowered = check(graph({"x": (1, 4, 6, 5)}, body))
    assert lowered.kernels.count("conv2d") == 2


def test_sum_of_five_stays_inside_int32() -> None:
    def body(g: Graph, x: Expr, y: Expr) -> Expr:
        x, y = g.qdq(x, 3.17), g.qdq(y, 3.29, name="other")
        total = g.emit(relax.op.add(x, y), "s2")
        for k in range(3):
            total = g.emit(relax.op.add(total, (x, y)[k % 2]), f"s{k + 3}")
        return g.quantize(total, 0.011, 0)

    full = [np.full((2, 9), sign * 500.0, np.float32) for sign in (1, -1)]
    module = graph({"x": (2, 9), "y": (2, 9)}, body)
    check(module, inputs=[full, full[::-1], [full[0], full[0]], [full[1], full[1]]])


def test_residual_of_another_layout() -> None:
    """The residual arrives channels first, the sums are channels last."""

    def body(g: Graph, x: Expr, y: Expr) -> Expr:
        acc = conv(g, g.qdq(x, *A))
        y = g.qdq(y, *B, name="other")
        y = g.emit(relax.op.permute_dims(y, [0, 1, 3, 2]), "turned")
        return g.quantize(g.emit(relax.op.add(acc, y), "sum"), *OUT)

    check(graph({"x": (1, 4, 6, 5), "y": (1, 4, 5, 6)}, body))


def test_residual_of_int16_with_int64_sums() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, 0.000207, 0, "int16")
        y = g.emit(
            relax.op.nn.conv2d(x, g.weight((128, 128, 3, 3), scale=0.001), padding=1), "conv"
        )
        return g.quantize(g.emit(relax.op.add(y, x), "sum"), 0.000411, 0, "int16")

    # The simulation's float32 sums of 1,152 products are coarser than an int16 step.
    check(graph({"x": (1, 128, 2, 3)}, body), equal=0.98)


def test_broadcast_term_beside_a_matmul() -> None:
    """The sums are [rows, C] in memory, the other operand is [1, 1, C]."""

    def body(g: Graph, x: Expr, y: Expr) -> Expr:
        x, y = g.qdq(x, *A), g.qdq(y, *B, name="other")
        acc = g.emit(relax.op.matmul(x, g.weight((6, 7), 1)), "linear")
        return g.quantize(g.emit(relax.op.add(acc, y), "sum"), *OUT)

    check(graph({"x": (2, 3, 6), "y": (1, 3, 1)}, body))
    check(graph({"x": (2, 3, 6), "y": (7,)}, body))


CONSTANTS = {
    "add per channel": lambda g, x: relax.op.add(x, g.const(g.rng.normal(0, 1, (3, 1, 1)))),
    "constant minus": lambda g, x: relax.op.subtract(x, g.const(g.rng.normal(0, 1, (1, 3, 1, 1)))),
    "multiply per channel": lambda g, x: relax.op.multiply(x, g.const(g.rng.uniform(0.5, 2, (3, 1, 1)))),
    "divide per channel": lambda g, x: relax.op.divide(x, g.const(g.rng.uniform(0.5, 2, (3, 1, 1)))),
    "scale and shift": lambda g, x: relax.op.add(
        g.emit(relax.op.multiply(x, g.const(g.rng.uniform(0.5, 2, (3, 1, 1)))), "scaled"),
        g.const(g.rng.normal(0, 1, (3, 1, 1))),
    ),
    "per position": lambda g, x: relax.op.add(x, g.const(g.rng.normal(0, 1, (4, 5)))),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTANTS)
def test_constants(case: str) -> None:
    def body(g: Graph, x: Expr) -> Expr:
        return g.quantize(g.emit(CONSTANTS[case](g, g.qdq(x, *A)), "op"), *OUT)

    check(graph({"x": (2, 3, 4, 5)}, body))


def test_constant_minus_tensor_is_a_table() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        return g.quantize(g.emit(relax.op.subtract(g.const(1.0), g.qdq(x, *A)), "op"), *OUT)

    assert check(graph({"x": (2, 31)}, body)).kernels == ["quantize", "table"]


def squeeze_excite(g: Graph, x: Expr) -> Expr:
    x = g.qdq(conv_relu(g, x), *A, name="features")
    pooled = g.qdq(g.emit(relax.op.mean(x, [2, 3], keepdims=True), "mean"), *A, name="pooled")
    gate = g.emit(relax.op.nn.conv2d(pooled, g.weight((4, 4, 1, 1))), "gate_conv")
    gate = g.qdq(gate, *B, name="gate")
    gate = g.qdq(g.emit(relax.op.sigmoid(gate), "sigmoid"), 1 / 256, -128, name="open")
    return g.quantize(g.emit(relax.op.multiply(x, gate), "gated"), *OUT)


def conv_relu(g: Graph, x: Expr) -> Expr:
    return g.emit(relax.op.nn.relu(conv(g, g.qdq(x, *A))), "relu")


def test_squeeze_and_excite() -> None:
    lowered = check(graph({"x": (1, 4, 6, 5)}, squeeze_excite))
    # One transpose into channels last, one out of it at the end.
    assert lowered.kernels.count("permute_dims") == 2
    assert {"sum", "table", "product"} <= set(lowered.kernels)


FUNCTIONS: dict[str, Callable[[Graph, Expr], Expr]] = {
    "sigmoid": lambda g, x: relax.op.sigmoid(x),
    "tanh": lambda g, x: relax.op.tanh(x),
    "silu": lambda g, x: relax.op.nn.silu(x),
    "gelu": lambda g, x: relax.op.nn.gelu(x),
    "gelu_tanh": lambda g, x: relax.op.nn.gelu_tanh(x),
    "leaky relu": lambda g, x: relax.op.nn.leakyrelu(x, 0.1),
    "softplus": lambda g, x: relax.op.nn.softplus(x),
    "exp": lambda g, x: relax.op.exp(x),
    "hard sigmoid": lambda g, x: relax.op.clip(
        g.emit(relax.op.add(g.emit(relax.op.multiply(x, g.const(0.2)), "slope"), g.const(0.5)), "half"), 0, 1
    ),
    "hard swish": lambda g, x: relax.op.multiply(
        x,
        g.emit(
            relax.op.divide(g.emit(relax.op.clip(g.emit(relax.op.add(x, g.const(3.0)), "plus3"), 0, 6), "six"), g.const(6.0)),
            "gate",
        ),
    ),
    "x * sigmoid(x)": lambda g, x: relax.op.multiply(g.emit(relax.op.sigmoid(x), "s"), x),
    "prelu of one slope": lambda g, x: relax.op.nn.prelu(x, g.const([0.25])),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_one_tensor_are_one_table(function: str, dtype: str) -> None:
    a, out = ((0.0317, 11), (0.0273, -9)) if dtype == "int8" else ((0.000217, 0), (0.000193, 0))

    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, *a, dtype)
        return g.quantize(g.emit(FUNCTIONS[function](g, x), "f"), *out, dtype)

    assert check(graph({"x": (3, 217)}, body)).kernels == ["quantize", "table"]


def test_every_code_of_a_table() -> None:
    """All 256 inputs, signed and unsigned, against NumPy."""
    for dtype in ("int8", "uint8"):

        def body(g: Graph, x: Expr) -> Expr:
            return g.quantize(
                g.emit(relax.op.tanh(g.dequantize(x, 0.0317, 11)), "tanh"), 0.0079, 7, "int8"
            )

        info = np.iinfo(dtype)
        codes = np.arange(info.min, info.max + 1).astype(dtype)
        lowered = check(graph({"x": ((256,), dtype)}, body), ["table"], inputs=[[codes]])
        assert lowered.left_float == []


def test_prelu_with_slopes_per_channel() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(conv(g, g.qdq(x, *A)), *B, name="between")
        y = g.emit(relax.op.nn.prelu(x, g.const(g.rng.uniform(-0.5, 0.9, 4)), 1), "prelu")
        return g.quantize(y, *OUT)

    lowered = check(graph({"x": (1, 4, 6, 5)}, body))
    assert "channel_table" in lowered.kernels


def test_relu_at_equal_parameters_clips_the_codes() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        return g.quantize(g.emit(relax.op.nn.relu(g.qdq(x, *A)), "relu"), *A)

    assert check(graph({"x": (3, 40)}, body), equal=1.0).kernels == ["quantize", "clip"]


@pytest.mark.parametrize(
    ("source", "target"),
    [("int8", "int8"), ("int8", "uint8"), ("int16", "int8"), ("int8", "int16")],
)
def test_other_parameters_for_the_same_reals(source: str, target: str) -> None:
    def body(g: Graph, x: Expr) -> Expr:
        scale = 0.000217 if source == "int16" else 0.0317
        return g.quantize(g.qdq(x, scale, 0, source), 0.0573, 5, target)

    lowered = check(graph({"x": (3, 40)}, body))
    assert lowered.float_tensors == []


def test_tensor_used_quantised_and_in_float() -> None:
    def body(g: Graph, x: Expr) -> tuple[Expr, Expr]:
        acc = conv(g, g.qdq(x, *A))
        codes = g.quantize(acc, *OUT)
        return codes, g.emit(relax.op.nn.relu(acc), "real")

    check(graph({"x": (1, 4, 6, 5)}, body), steps=[1, 0], integer=False)


def test_unsupported_operator_is_listed_with_its_reason() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, *A)
        y = g.emit(relax.op.cumsum(x, axis=1), "running_sum")
        return g.quantize(y, *OUT)

    lowered = check(graph({"x": (2, 5)}, body), integer=False)
    assert [(e["name"], e["op"]) for e in lowered.left_float] == [("running_sum", "relax.cumsum")]
    assert lowered.left_float[0]["reason"]
