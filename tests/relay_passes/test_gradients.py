"""Gradients of a labelled loss against finite differences, operator by operator, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.errors import RecipeError
from tvm_compress.relay_passes.gradients import with_gradients
from tvm_compress.relay_passes.ir import array_const

RNG = np.random.default_rng(0)


def constant(*shape: int, dtype: str = "float64") -> relax.Constant:
    return array_const(RNG.normal(0, 0.5, shape).astype(dtype))


def build(
    body: Callable[[relax.BlockBuilder, relax.Var], Any], shape: Sequence[int], dtype: str
) -> Any:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(list(shape), dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(body(builder, x), name_hint="out")
        builder.emit_func_output(output)
    return builder.finalize()


def head(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    """Five classes of whatever there is."""
    flat = builder.emit(op.reshape(builder.emit(x), (2, -1)))
    weight = constant(int(flat.ty.shape.values[1]), 5, dtype=str(flat.ty.dtype))
    return builder.emit(op.matmul(flat, weight), name_hint="logits")


def loss(scores: np.ndarray, labels: np.ndarray) -> float:
    scores = scores.reshape(len(scores), -1)
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances = exponents / exponents.sum(axis=1, keepdims=True)
    return float(-np.log(chances[np.arange(len(labels)), labels]).sum())


def plain_conv(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    y = op.nn.conv2d(x, constant(6, 4, 3, 3), padding=1, strides=2)
    y = op.nn.relu(op.add(y, constant(1, 6, 1, 1)))
    y = op.nn.conv2d(y, constant(6, 2, 2, 3), padding=[1, 0, 2, 1], dilation=[2, 1], groups=3)
    y = builder.emit(y)
    z = builder.emit(op.clip(op.nn.conv2d(y, constant(4, 6, 1, 1), strides=[2, 1]), -0.5, 0.5))
    return head(builder, op.concat([op.reshape(y, (2, -1)), op.reshape(z, (2, -1))], axis=1))


def channels_last(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    y = op.permute_dims(x, [0, 2, 3, 1])
    y = op.nn.conv2d(
        y, constant(3, 3, 4, 6), strides=[2, 3], padding=1, data_layout="NHWC",
        kernel_layout="HWIO",
    )  # fmt: skip
    y = op.nn.max_pool2d(op.nn.relu6(y), [2, 1], padding=[1, 0, 0, 0], layout="NHWC")
    return head(builder, op.nn.avg_pool2d(y, [1, 2], layout="NHWC"))


def pads_wider_than_kernels(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    return head(
        builder, op.nn.conv2d(x, constant(3, 4, 1, 2), padding=[2, 3, 1, 2], strides=[1, 3])
    )


def transposed(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    y = op.nn.conv2d_transpose(
        x, constant(4, 3, 3, 3), strides=2, padding=1, output_padding=1, groups=2
    )
    y = builder.emit(op.nn.leakyrelu(y, 0.1))
    y = op.nn.adaptive_avg_pool2d(y, [7, 1])
    return head(builder, y)


def one_dimension(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    y = op.reshape(x, (2, 4, -1))
    y = op.nn.conv1d(y, constant(6, 2, 3), strides=2, padding=[1, 2], groups=2)
    y = builder.emit(op.nn.max_pool1d(y, 3, 2, padding=1, ceil_mode=True))
    y = op.nn.avg_pool1d(y, 2, 2, padding=1, count_include_pad=False)
    return head(builder, op.nn.conv1d_transpose(y, constant(6, 2, 3), strides=2))


def movement(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    y = builder.emit(op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 1], "constant", 0.5))
    parts = builder.emit(op.split(y, [1, 3], axis=1))
    first = builder.emit(relax.TupleGetItem(parts, 0))  # nobody reads the second
    last = builder.emit(relax.TupleGetItem(parts, 2))
    y = op.concat([op.multiply(first, last), last], axis=1)
    y = builder.emit(op.strided_slice(builder.emit(y), [2, 3], [1, 2], [9, 8], [3, 1]))
    y = op.squeeze(op.expand_dims(op.permute_dims(y, [0, 3, 1, 2]), 1), 1)
    return head(builder, op.subtract(op.mean(y, [2, 3], keepdims=True), y))


def attention(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    y = builder.emit(op.reshape(x, (2, 7, -1)))
    width = int(y.ty.shape.values[2])
    size, shift, weight = (
        constant(*shape, dtype="float32") for shape in [[width]] * 2 + [[width] * 2]
    )
    y = builder.emit(op.nn.layer_norm(y, size, shift, axes=-1, epsilon=0.1))
    scores = op.matmul(y, op.permute_dims(op.matmul(y, weight), [0, 2, 1]))
    y = op.add(op.matmul(op.nn.softmax(scores, axis=-1), y), y)
    return head(builder, op.nn.gelu(y))


def functions(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    small = builder.emit(op.multiply(x, relax.const(0.3, "float64")))
    terms = [
        op.nn.gelu_tanh(small), op.nn.silu(small), op.erf(small), op.square(small), op.tanh(small),
        op.nn.softplus(small, 2.0, 20.0), op.sigmoid(small), op.maximum(small, constant(1, 4, 1, 1)),
        op.rsqrt(op.add(op.square(small), relax.const(1.0, "float64"))),
        op.divide(small, op.exp(small)),
    ]  # fmt: skip
    return op.nn.softmax(head(builder, op.concat(terms, axis=1)), axis=-1)


NETWORKS = [
    plain_conv, channels_last, pads_wider_than_kernels, transposed, one_dimension, movement,
    attention, functions,
]  # fmt: skip


@pytest.mark.parametrize("body", NETWORKS, ids=lambda body: body.__name__)
def test_finite_differences(body: Callable[..., Any]) -> None:
    # TVM's layer norm computes in float32 alone.
    dtype, step, close = ("float32", 1e-2, 1e-2) if body is attention else ("float64", 1e-5, 1e-4)
    program = with_gradients(build(body, (2, 4, 7, 9), dtype), ["x", "logits"])
    x = RNG.normal(size=(2, 4, 7, 9))
    labels = np.array([3, 1])
    one_hot = np.eye(5)[labels]

    # A few small runs: compiling takes longest.
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    machine = relax.VirtualMachine(tvm.compile(program, target=target), tvm.cpu())

    def compute(at: np.ndarray) -> list[np.ndarray]:
        arrays = [tvm.runtime.tensor(item.astype(dtype)) for item in (at, one_hot)]
        return [item.numpy() for item in machine["main"](*arrays)]

    def value(at: np.ndarray) -> float:
        return loss(compute(at)[1].astype(np.float64), labels)

    activation, _, gradient, by_logits = compute(x)
    np.testing.assert_array_equal(activation, x.astype(dtype))
    np.testing.assert_allclose(by_logits.sum(axis=1), 0, atol=1e-6)
    for _ in range(6):
        direction = RNG.normal(size=x.shape) * (RNG.random(x.shape) < 0.3)
        change = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
        found = np.sum(gradient * direction)
        np.testing.assert_allclose(found, change, rtol=close, atol=close * np.abs(gradient).max())


def test_operators_without_a_gradient_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    """One line with the operator; what lies before the tensors asked for does not matter."""

    def body(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
        return head(builder, builder.emit(op.round(x), name_hint="steps"))

    module = build(body, (2, 4, 7, 9), "float64")
    with pytest.raises(RecipeError, match=r"'steps': no gradient is known of relax\.round"):
        with_gradients(module, ["x"])
    assert len(with_gradients(module, ["steps"])["main"].params) == 2
    with pytest.raises(RecipeError, match="no tensor 'y'"):
        with_gradients(module, ["y"])
    assert capfd.readouterr().err == ""


def test_tensors_that_do_not_reach_the_output() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 5), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            aside = builder.emit(op.exp(x), name_hint="aside")
            outputs = [builder.emit_output(op.nn.relu(x)), builder.emit_output(aside)]
        builder.emit_func_output(relax.Tuple(outputs))
    module = builder.finalize()
    with pytest.raises(RecipeError, match="'aside' does not reach"):
        with_gradients(module, ["aside"], output=0)
    assert with_gradients(module, ["aside"], output=1)
