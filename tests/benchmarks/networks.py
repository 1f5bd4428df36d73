"""Networks with random weights for benchmarks of speed, as ONNX models of opset 17.

Batch normalisation is folded into the convolutions, as inference runs it. Weights are
He-initialised from a fixed seed: activations keep their magnitude, and a model is the same
everywhere.
"""

from __future__ import annotations

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

    def __init__(self, shape: tuple[int, ...], sparsity: float = 0.0) -> None:
        self.shape = shape
        self.sparsity = sparsity
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
        if self.sparsity and o % 16 == 0 and i > 3:
            weight = self._pruned(weight)
        pad = k // 2
        return self._node(
            "Conv", [x, self._weight(weight), self._weight(np.zeros(o))],
            strides=[stride] * 2, pads=[pad] * 4, group=groups, kernel_shape=[k, k],
        )  # fmt: skip

    def _pruned(self, weight: np.ndarray) -> np.ndarray:
        """Zeros for a share of the inputs of every 16 outputs, as many for each; the rest grows to
        the same variance."""
        blocks = weight.reshape(weight.shape[0] // 16, 16, -1)
        places = self.random.random((len(blocks), blocks.shape[2])).argsort(axis=1)
        kept = places >= round(self.sparsity * blocks.shape[2])
        pruned = blocks * kept[:, None] / np.sqrt(1 - self.sparsity)
        return np.asarray(pruned.reshape(weight.shape))

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

    def max_pool(self, x: str) -> str:
        """3x3, stride 2, padding 1."""
        return self._node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)

    def linear(self, x: str, i: int, o: int) -> str:
        weight = self._weight(self.random.normal(scale=1 / np.sqrt(i), size=(i, o)))
        return self.add(self._node("MatMul", [x, weight]), self._weight(self._small(o)))

    def heads(self, x: str, length: int, count: int, width: int, last: bool) -> str:
        """[1, length, count * width] => [1, count, length, width]; `last`: the last two swapped."""
        shape = self._integers([1, length, count, width])
        perm = [0, 2, 3, 1] if last else [0, 2, 1, 3]
        return self._node("Transpose", [self._node("Reshape", [x, shape])], perm=perm)

    def attention(self, x: str, length: int, count: int, width: int) -> str:
        """Multi-head self-attention as exporters write it, without a mask."""
        size = count * width
        query, key, value = (
            self.heads(self.linear(x, size, size), length, count, width, last=part == "key")
            for part in ("query", "key", "value")
        )
        scores = self._node("MatMul", [query, key])
        scores = self._node("Div", [scores, self._weight(np.array(np.sqrt(width)))])
        mixed = self._node("MatMul", [self._node("Softmax", [scores], axis=-1), value])
        mixed = self._node("Transpose", [mixed], perm=[0, 2, 1, 3])
        return self.linear(
            self._node("Reshape", [mixed, self._integers([1, length, size])]), size, size
        )

    def layer_norm(self, x: str, size: int) -> str:
        scale, bias = self._weight(1 + self._small(size)), self._weight(self._small(size))
        return self._node("LayerNormalization", [x, scale, bias], axis=-1, epsilon=1e-12)

    def gelu(self, x: str) -> str:
        """x / 2 * (1 + erf(x / sqrt(2))), one by one, as exporters of opset 17 write it."""
        root, one, half = (self._weight(np.array(v)) for v in (np.sqrt(2), 1.0, 0.5))
        erf = self._node("Erf", [self._node("Div", [x, root])])
        return self._node("Mul", [self._node("Mul", [x, self.add(erf, one)]), half])

    def _small(self, size: int) -> np.ndarray:
        return self.random.normal(scale=0.1, size=size)

    def _integers(self, values: list[int]) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def model(self, output: str, *shape: int) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
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
    return net.model(net.head(x, 1280, 1000), 1, 1000)


def resnet_50(sparsity: float = 0.0) -> onnx.ModelProto:
    """ResNet-50-class (v1.5: 3x3 convolutions stride): 53 convolutions, a classifier, 224x224.
    `sparsity`: zeros in blocks of 16 outputs by 1 input of all convolutions but the first."""
    net = Network((1, 3, 224, 224), sparsity)
    x, width = net.max_pool(net.relu(net.conv("input", 3, 64, 7, 2))), 64
    for hidden, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 and hidden != 64 else 1
            y = net.relu(net.conv(x, width, hidden, 1))
            y = net.relu(net.conv(y, hidden, hidden, 3, stride))
            y = net.conv(y, hidden, 4 * hidden, 1)
            if block == 0:
                x, width = net.conv(x, width, 4 * hidden, 1, stride), 4 * hidden
            x = net.relu(net.add(y, x))
    return net.model(net.head(x, 2048, 1000), 1, 1000)


def resnet_50_sparse() -> onnx.ModelProto:
    """The same, pruned to 80 % zeros."""
    return resnet_50(0.8)


def bert_encoder(
    layers: int = 6, width: int = 384, heads: int = 12, length: int = 128
) -> onnx.ModelProto:
    """BERT-class encoder (MiniLM-L6's sizes): embeddings in, hidden states out, erf GELU."""
    net = Network((1, length, width))
    x = net.layer_norm("input", width)
    for _ in range(layers):
        x = net.layer_norm(net.add(net.attention(x, length, heads, width // heads), x), width)
        y = net.linear(net.gelu(net.linear(x, width, 4 * width)), 4 * width, width)
        x = net.layer_norm(net.add(y, x), width)
    return net.model(x, 1, length, width)
