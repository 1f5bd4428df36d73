"""What compiling costs: from an ONNX file to a runnable int8 library, by step and by depth.

    python tests/benchmarks/build_time.py [--layers 20,50,100,200]

Random weights: first a MobileNetV2-class network at 224x224, then plain stacks of convolutions of
growing depth (distinct shapes, so that no two layers share a kernel).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# (expansion, channels, repeats, stride): Sandler et al. 2018, table 2
MOBILENET_V2 = [
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
    (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
]  # fmt: skip


class Network:
    """A tiny ONNX writer: nodes in order, He-initialised random weights."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def _node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def _weight(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def conv(self, x: str, i: int, o: int, k: int, stride: int = 1, groups: int = 1) -> str:
        fan_in = i // groups * k * k
        weight = self.random.normal(scale=np.sqrt(2 / fan_in), size=(o, i // groups, k, k))
        pad = k // 2
        return self._node(
            "Conv", [x, self._weight(weight), self._weight(np.zeros(o))],
            strides=[stride] * 2, pads=[pad] * 4, group=groups, kernel_shape=[k, k],
        )  # fmt: skip

    def relu6(self, x: str) -> str:
        low, high = self._weight(np.array(0.0)), self._weight(np.array(6.0))
        return self._node("Clip", [x, low, high])

    def relu(self, x: str) -> str:
        return self._node("Relu", [x])

    def add(self, a: str, b: str) -> str:
        return self._node("Add", [a, b])

    def head(self, x: str, channels: int, classes: int) -> str:
        x = self._node("Flatten", [self._node("GlobalAveragePool", [x])])
        weight = self._weight(self.random.normal(scale=0.05, size=(channels, classes)))
        return self._node("Gemm", [x, weight, self._weight(np.zeros(classes))])

    def model(self, output: str, classes: int) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, (1, classes))],
            self.weights,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def mobilenet_v2() -> onnx.ModelProto:
    """MobileNetV2-class: 52 convolutions and a classifier, 224x224."""
    net = Network((1, 3, 224, 224))
    x, width = net.relu6(net.conv("input", 3, 32, 3, 2)), 32
    for expansion, channels, repeats, first_stride in MOBILENET_V2:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            shortcut, hidden = x, width * expansion
            if expansion != 1:
                x = net.relu6(net.conv(x, width, hidden, 1))
            x = net.relu6(net.conv(x, hidden, hidden, 3, stride, hidden))
            x = net.conv(x, hidden, channels, 1)
            if stride == 1 and width == channels:
                x = net.add(shortcut, x)
            width = channels
    x = net.relu6(net.conv(x, width, 1280, 1))
    return net.model(net.head(x, 1280, 1000), 1000)


def stack(layers: int) -> onnx.ModelProto:
    """`layers` 3x3 convolutions with ReLU, no two of the same shape."""
    net = Network((1, 3, 32, 32))
    x, width = "input", 3
    for layer in range(layers):
        channels = 16 + 8 * (layer % 7) + layer // 7
        x, width = net.relu(net.conv(x, width, channels, 3)), channels
    return net.model(net.head(x, width, 10), 10)


def measure(label: str, model: onnx.ModelProto) -> None:
    """Compress with 16 calibration samples and print the seconds of every step."""
    from tvm_compress import compress

    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    random = np.random.default_rng(1)
    samples = [{"input": random.normal(size=shape).astype(np.float32)} for _ in range(16)]
    layers = sum(node.op_type in ("Conv", "Gemm") for node in model.graph.node)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path))
        started = time.perf_counter()
        artefact = compress(path, recipe="int8", calibration=samples, out=Path(folder) / "out")
        total = time.perf_counter() - started
        steps = {step["name"]: step["seconds"] for step in artefact.report["steps"]}
    parts = "  ".join(f"{name} {seconds:.1f}" for name, seconds in steps.items())
    print(f"{label:14s} {layers:4d} layers  total {total:6.1f} s  ({parts})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", default="20,50,100,200")
    arguments = parser.parse_args()
    measure("MobileNetV2", mobilenet_v2())
    for layers in (int(part) for part in arguments.layers.split(",") if part):
        measure(f"stack of {layers}", stack(layers))


if __name__ == "__main__":
    main()
