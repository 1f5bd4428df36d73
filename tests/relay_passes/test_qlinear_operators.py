"""Each quantised ONNX operator alone, on random codes and parameters, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_compress.build import build
from tvm_compress.importers import load_model
from tvm_compress.runtime import Session
from tvm_compress.targets import get_target

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

PARAMETER_SETS = 6


@dataclass
class Graph:
    """Independent nodes on shared inputs of codes; every node has its own random parameters."""

    dtype: np.dtype
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def codes(self, name: str, array: np.ndarray) -> str:
        self.inputs[name] = array.astype(self.dtype)
        return name

    def random(self, name: str, *shape: int) -> str:
        info = np.iinfo(self.dtype)
        return self.codes(name, self.rng.integers(info.min, info.max + 1, shape))

    def constant(self, array: np.ndarray | float) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def scale(self) -> float:
        return float(np.float32(np.exp(self.rng.uniform(-5, -2.5))))

    def parameters(self, scale: float | None = None, zero_point: int | None = None) -> list[str]:
        """Names of a scale and a zero point, random unless given."""
        info = np.iinfo(self.dtype)
        if zero_point is None:
            zero_point = int(self.rng.integers(info.min, info.max + 1))
        scale = self.scale() if scale is None else scale
        return [self.constant(np.float32(scale)), self.constant(np.array(zero_point, self.dtype))]

    def weight(self, shape: tuple[int, ...], scales: np.ndarray) -> list[str]:
        codes = self.rng.integers(-127, 128, shape).astype(np.int8)
        return [self.constant(a) for a in (codes, scales, np.zeros(scales.shape, np.int8))]

    def node(self, op: str, inputs: list[str], domain: str = "com.microsoft", **attrs: Any) -> None:
        out = f"y{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], name=out, domain=domain, **attrs))

    def save(self, path: Path) -> None:
        kind = TensorProto.UINT8 if self.dtype == np.uint8 else TensorProto.INT8
        graph = helper.make_graph(
            self.nodes, "operators",
            [helper.make_tensor_value_info(n, kind, a.shape) for n, a in self.inputs.items()],
            [helper.make_tensor_value_info(n.output[0], kind, None) for n in self.nodes],
            self.constants,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def every_code(g: Graph) -> np.ndarray:
    info = np.iinfo(g.dtype)
    return np.arange(info.min, info.max + 1)


def every_pair(g: Graph) -> list[str]:
    first, second = np.meshgrid(every_code(g), every_code(g), indexing="ij")
    return [g.codes("a", first.ravel()), g.codes("b", second.ravel())]


def add(g: Graph) -> None:
    a, b = every_pair(g)
    g.node("QLinearAdd", [a, *g.parameters(), b, *g.parameters(), *g.parameters()])


def multiply(g: Graph) -> None:
    a, b = every_pair(g)
    first, second = g.scale(), g.scale()
    out = first * second * g.rng.uniform(50, 200)
    g.node("QLinearMul", [a, *g.parameters(first), b, *g.parameters(second), *g.parameters(out)])


def sigmoid(g: Graph) -> None:
    a = g.codes("a", every_code(g))
    out = g.parameters(1 / 256, np.iinfo(g.dtype).min)
    g.node("QLinearSigmoid", [a, *g.parameters(), *out])


def leaky_relu(g: Graph) -> None:
    a = g.codes("a", every_code(g))
    g.node("QLinearLeakyRelu", [a, *g.parameters(), *g.parameters()], alpha=0.1)


def softmax(g: Graph) -> None:
    a = g.random("a", 64, 100)
    out = g.parameters(1 / 256, np.iinfo(g.dtype).min)
    g.node("QLinearSoftmax", [a, *g.parameters(), *out], axis=-1, opset=13)


def global_average_pool(g: Graph) -> None:
    a, middle = g.random("a", 2, 64, 7, 7), int(every_code(g)[128])
    scale = g.scale()
    inputs = [a, *g.parameters(scale, middle), *g.parameters(scale / 5, middle)]
    g.node("QLinearGlobalAveragePool", inputs, channels_last=0)


def average_pool(g: Graph) -> None:
    a = g.random("a", 2, 16, 14, 14)
    g.node(
        "QLinearAveragePool", [a, *g.parameters(), *g.parameters()],
        kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=len(g.nodes) % 2,
    )  # fmt: skip


def concatenate(g: Graph) -> None:
    a, b = g.random("a", 2, 8, 5, 5), g.random("b", 2, 4, 5, 5)
    out = g.parameters()
    g.node("QLinearConcat", [*out, a, *g.parameters(), b, *g.parameters()], axis=1)


def convolution(g: Graph) -> None:
    a, scale = g.random("a", 2, 16, 10, 10), g.scale()
    weights = np.exp(g.rng.uniform(-6, -4, 24)).astype(np.float32)
    bias = g.constant(g.rng.integers(-9000, 9000, 24).astype(np.int32))
    out = g.parameters(scale * float(weights.mean()) * 800)
    g.node(
        "QLinearConv",
        [a, *g.parameters(scale), *g.weight((24, 16, 3, 3), weights), *out, bias],
        "",
        pads=[1, 1, 1, 1],
    )


def matmul(g: Graph) -> None:
    a, scale = g.random("a", 64, 48), g.scale()
    weight = g.weight((48, 40), np.array(g.scale(), np.float32))
    g.node("QLinearMatMul", [a, *g.parameters(scale), *weight, *g.parameters(scale * 5)], "")


def gemm(g: Graph) -> None:
    a, scale = g.random("a", 64, 48), g.scale()
    weights = np.exp(g.rng.uniform(-6, -4, 40)).astype(np.float32)
    bias = g.constant(g.rng.integers(-9000, 9000, 40).astype(np.int32))
    out = g.parameters(scale * float(weights.mean()) * 500)
    g.node("QGemm", [a, *g.parameters(scale), *g.weight((40, 48), weights), bias, *out], transB=1)


# Share of elements that must be equal; the others are one step apart. The last two add the zero
# point in float32 before they round, so that what lies within 10^-5 of half a step may differ.
OPERATORS: dict[Callable[[Graph], None], float] = {
    add: 1.0, sigmoid: 1.0, leaky_relu: 1.0, softmax: 1.0, global_average_pool: 1.0,
    concatenate: 1.0, convolution: 1.0, matmul: 1.0, gemm: 1.0,
    multiply: 0.9999, average_pool: 0.999,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda function: function.__name__)
def test_equals_onnx_runtime(operator: Callable[[Graph], None], dtype: str, tmp_path: Path) -> None:
    graph = Graph(np.dtype(dtype))
    for _ in range(PARAMETER_SETS):
        operator(graph)
    path = tmp_path / "operators.onnx"
    graph.save(path)
    theirs = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = theirs.run(None, graph.inputs)
    model = load_model(path)
    built = build(model.module, get_target("host"))
    assert built.left_float == ()
    got = Session(built.executable, model.inputs, model.outputs).run(graph.inputs)
    for node, codes in zip(graph.nodes, expected, strict=True):
        assert len(np.unique(codes)) > 8, "the parameters leave nothing to compare"
        difference = np.abs(got[node.output[0]].astype(np.int32) - codes.astype(np.int32))
        assert difference.max() <= 1
        assert (difference == 0).mean() >= OPERATORS[operator]
