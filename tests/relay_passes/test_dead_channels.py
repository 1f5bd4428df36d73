"""Channels that are the same whatever the input leave the graph; the integers stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import Expr

from tvm_compress.pipeline import reference_pipeline
from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.dead_channels import (
    DEAD_CHANNELS_ATTR,
    UNIT,
    RemoveDeadChannels,
)
from tvm_compress.relay_passes.lower import REQUANTIZE_ATTR
from tvm_compress.relay_passes.select import list_layers

from .qdq import Graph, compile_module, graph, random_inputs

CHANNELS = 12
DEAD = [1, 4, 5, 6, 9, 10, 11]


def codes_of(module: tvm.IRModule) -> list[tuple[int, ...]]:
    """Shapes of the stored codes, in order."""
    found = []
    for binding in ir.bindings(module["main"]):
        if ir.op_name(binding.value) == "relax.dequantize":
            codes = ir.constant(binding.value.args[0])
            if codes is not None:
                found.append(codes.shape)
    return found


def stored(g: Graph, codes: np.ndarray, scale: float, axis: int, name: str) -> relax.Var:
    scales = np.full(codes.shape[axis], scale, np.float32)
    arguments = (ir.array_const(codes), ir.array_const(scales), relax.const(0, "int32"), axis)
    return g.emit(relax.op.dequantize(*arguments, "float32"), name)


def layer(
    g: Graph,
    x: Expr,
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    padding: int = 0,
    nhwc: bool = True,
    zero_point: int = -128,
) -> Expr:
    """A convolution of `x`, whose codes have steps of 1/16; int8 codes with the same steps come
    out. Kernels are [H, W, I, O], or [H, W, 1, O] for depthwise ones."""
    inputs, outputs = weight.shape[2:]
    channels = int(ir.shape_of(x)[3 if nhwc else 1])  # type: ignore[index]
    groups = outputs if inputs == 1 and channels > 1 else 1
    layouts = ("NHWC", "HWIO") if nhwc else ("NCHW", "OIHW")
    if groups > 1 and nhwc:
        weight, layouts = weight.transpose(0, 1, 3, 2), ("NHWC", "HWOI")
    if not nhwc:
        weight = weight.transpose(3, 2, 0, 1)
    w = stored(g, weight, 1 / 64, layouts[1].index("O"), "w")
    y = relax.op.nn.conv2d(
        x, w, padding=padding, groups=groups, data_layout=layouts[0], kernel_layout=layouts[1]
    )
    shape = (1, 1, 1, outputs) if nhwc else (1, outputs, 1, 1)
    b = stored(g, bias.reshape(shape).astype(np.int32), 1 / 1024, 3 if nhwc else 1, "b")
    return g.qdq(g.emit(relax.op.add(g.emit(y, "sums"), b), "y"), 1 / 16, zero_point, name="y")


def separable(nhwc: bool, dead: list[int], bias: int, depthwise_bias: int) -> tvm.IRModule:
    """1x1 with `dead` outputs of the given bias, depthwise 3x3, 1x1, mean, product."""

    def body(g: Graph, x: Expr) -> Expr:
        def codes(*shape: int) -> np.ndarray:
            return g.rng.integers(-127, 128, shape).astype(np.int8)

        x = g.qdq(x, 1 / 16, -128)
        first = codes(1, 1, 4, CHANNELS)
        first[..., dead] = 0
        biases = np.where(np.isin(np.arange(CHANNELS), dead), bias, 600)
        x = layer(g, x, first, biases, nhwc=nhwc)
        biases = np.full(CHANNELS, depthwise_bias)
        x = layer(g, x, codes(3, 3, 1, CHANNELS), biases, padding=1, nhwc=nhwc)
        x = layer(g, x, codes(1, 1, CHANNELS, 8), g.rng.integers(-2000, 2000, 8), nhwc=nhwc)
        axes = [1, 2] if nhwc else [2, 3]
        x = g.qdq(g.emit(relax.op.mean(x, axes), "mean"), 1 / 16, -128, name="m")
        product = relax.op.matmul(x, stored(g, codes(8, 3), 1 / 64, 1, "fc"))
        return g.quantize(g.emit(product, "scores"), 1 / 4, 0)

    shape = (1, 6, 5, 4) if nhwc else (1, 4, 6, 5)
    return graph({"x": shape}, body, seed=3)


def lowered(module: tvm.IRModule, rule: str) -> Callable[..., Any]:
    module = module.clone()
    module["main"] = module["main"].with_attr(REQUANTIZE_ATTR, rule)
    return compile_module(reference_pipeline()(module))


@pytest.mark.parametrize(("nhwc", "rule"), [(True, "tflite"), (False, "float32")])
@pytest.mark.parametrize(
    ("bias", "depthwise_bias"), [(-500, 300), (0, -40), (-64, 5000)], ids=["fold", "zero", "clamp"]
)
def test_the_same_integers(nhwc: bool, bias: int, depthwise_bias: int, rule: str) -> None:
    """Dead channels hold 0 (their biases are clamped); behind the depthwise kernel they hold what
    its bias makes of it, which the next bias takes over."""
    before = separable(nhwc, DEAD, bias, depthwise_bias)
    after = RemoveDeadChannels()(before)
    kept = -(-(CHANNELS - len(DEAD)) // UNIT) * UNIT
    noted = json.loads(str(after["main"].attrs[DEAD_CHANNELS_ATTR]))
    assert set(noted.values()) == {f"{CHANNELS} -> {kept} channels, the others dead"}
    assert len(noted) == 2 and set(noted) <= {layer.name for layer in list_layers(before)}
    outputs = [shape[3 if nhwc else 0] for shape in codes_of(after)[:1]]
    assert outputs == [kept] and kept < CHANNELS
    assert [ir.shape_of(param) for param in after["main"].params] == [
        ir.shape_of(param) for param in before["main"].params
    ]
    one, other = lowered(before, rule), lowered(after, rule)
    results = set()
    for seed in range(4):
        arrays = random_inputs(before, seed)
        found = other(*arrays)
        np.testing.assert_array_equal(found, one(*arrays))
        results.add(found.tobytes())
    assert len(results) > 1


def test_a_constant_that_a_border_surrounds_stays() -> None:
    """It is not what is around it, so that the depthwise kernel's results differ at the border."""
    module = separable(True, DEAD, 900, 300)
    assert RemoveDeadChannels()(module).same_as(module)


def test_a_constant_that_may_be_rounded_either_way_stays() -> None:
    module = separable(True, DEAD, 32, 300)  # half a step
    assert RemoveDeadChannels()(module).same_as(module)


def test_channels_that_nobody_reads() -> None:
    """Zeros of the second layer are enough."""

    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, 1 / 16, -128)
        first = g.rng.integers(-127, 128, (1, 1, 4, CHANNELS)).astype(np.int8)
        second = g.rng.integers(-127, 128, (3, 3, CHANNELS, 5)).astype(np.int8)
        second[:, :, DEAD] = 0
        x = layer(g, x, first, np.full(CHANNELS, 100))
        return layer(g, x, second, np.zeros(5), padding=1)

    module = graph({"x": (1, 6, 5, 4)}, body, seed=5)
    after = RemoveDeadChannels()(module)
    assert codes_of(after)[0] == (1, 1, 4, 8) and codes_of(after)[2] == (3, 3, 8, 5)
    arrays = random_inputs(module, 1)
    found, wanted = (lowered(m, "tflite")(*arrays) for m in (after, module))
    np.testing.assert_array_equal(found, wanted)


def test_what_other_operators_read_stays() -> None:
    """Both sides of an addition need the same channels, which nobody here works out."""

    def body(g: Graph, x: Expr) -> Expr:
        x = g.qdq(x, 1 / 16, -128)
        weight = g.rng.integers(-127, 128, (1, 1, 4, CHANNELS)).astype(np.int8)
        weight[..., DEAD] = 0
        y = layer(g, x, weight, np.full(CHANNELS, -100))
        z = layer(g, x, weight[..., ::-1], np.full(CHANNELS, -100))
        return g.quantize(g.emit(relax.op.add(y, z), "sum"), 1 / 8, 0)

    module = graph({"x": (1, 6, 5, 4)}, body, seed=5)
    assert RemoveDeadChannels()(module).same_as(module)


def test_no_channel_lives() -> None:
    """A unit is kept: no tensor is empty."""
    before = separable(True, list(range(CHANNELS)), -500, 300)
    after = RemoveDeadChannels()(before)
    assert codes_of(after)[0] == (1, 1, 4, UNIT)
    arrays = random_inputs(before, 2)
    np.testing.assert_array_equal(
        lowered(after, "tflite")(*arrays), lowered(before, "tflite")(*arrays)
    )
