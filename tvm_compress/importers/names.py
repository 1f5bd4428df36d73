"""Layer names: from a source's node path to a short, unique identifier.

Relax keeps only letters, digits and `_` in a variable name, so the dots and slashes of a module
path become `_`: ONNX node `/layer1/layer1.0/conv1/Conv` => `layer1_0_conv1`.
"""

from __future__ import annotations

import re

# What exporters append to a module path for the operator itself; it says nothing about the layer.
_OPERATOR_WORDS = frozenset(
    """
    Add AvgPool AveragePool BatchNormalization BiasAdd Clip Concat Conv Conv1D Conv2D
    Conv2DBackpropInput ConvTranspose DepthwiseConv2dNative Flatten FusedBatchNorm FusedBatchNormV3
    Gemm GlobalAveragePool MatMul MaxPool Mul Pad ReadVariableOp Relu Relu6 Reshape Sigmoid Softmax
    Squeeze Sub Tanh Transpose QLinearConv QLinearMatMul QGemm ConvInteger MatMulInteger convolution
    """.split()
)
_MAX_LENGTH = 64


def sanitise(name: str) -> str:
    """Letters, digits and single `_` only, starting with a letter: `Mfcc:0` => `Mfcc_0`."""
    identifier = re.sub(r"_+", "_", re.sub(r"[^0-9A-Za-z]", "_", name)).strip("_")
    if not identifier:
        return ""
    return identifier if identifier[0].isalpha() else f"n{identifier}"


def _is_operator(component: str) -> bool:
    """Whether a path component only names operators: `Relu6`, `MatMul_Gemm__7`."""
    words = [w for w in component.split("_") if w and not w.isdigit()]
    return bool(words) and all(w in _OPERATOR_WORDS for w in words)


def _path(name: str) -> list[str]:
    """The components of a module path, without repetitions.

    `layer1/layer1.0/conv1` => [`layer1.0`, `conv1`]: torch exporters repeat the parent's name.
    """
    parts = [p for p in re.split(r"[/;]", name) if p]
    kept: list[str] = []
    for part in parts:
        if kept and (part == kept[-1] or part.startswith(kept[-1] + ".")):
            kept.pop()
        kept.append(part)
    return kept


def layer_name(node_name: str, operator: str, weight_name: str = "") -> str:
    """Readable identifier for an anchor: from its weight's module path, else its node's path.

    `operator` is the fallback when neither says anything (`conv`).
    """
    match = re.fullmatch(r"(.*[A-Za-z_].*)[./](?:weight|kernel)(?:_quantized)?", weight_name)
    if match:
        name = sanitise("_".join(_path(match.group(1))))
        if name:
            return _shorten(name)
    path = _path(node_name)
    stripped = list(path)
    while stripped and _is_operator(stripped[-1]):
        stripped.pop()
    # Keras ends the path of a depthwise layer, whatever its name, in `depthwise`.
    if stripped[-1:] == ["depthwise"] and "depthwise" in "".join(stripped[-2:-1]):
        stripped.pop()
    name = sanitise("_".join(stripped)) or sanitise("_".join(path[-1:])).lower()
    return _shorten(name or operator.lower())


def value_name(node_name: str, node_operator: str, operator: str) -> str:
    """Identifier for any other node: its path, ending in the Relax operator (`layer1_0_add`)."""
    path = _path(node_name)
    number = ""
    if path:
        match = re.fullmatch(rf"{re.escape(node_operator)}((?:_+\d+)?)", path[-1], re.IGNORECASE)
        if match:
            path.pop()
            number = match.group(1).replace("__", "_")
    if path and path[-1].lower() == operator:  # a module named after what it does: `relu`
        path.pop()
    name = sanitise("_".join(path))
    ending = operator.lower() + number
    return _shorten(name, reserve=len(ending) + 1) + "_" + ending if name else ending


def _shorten(name: str, reserve: int = 0) -> str:
    limit = _MAX_LENGTH - reserve
    return name if len(name) <= limit else name[-limit:].lstrip("_0123456789") or name[:limit]


class UniqueNames:
    """Hands out each identifier once; a repetition gets `_2`, `_3`, ... in order of asking."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._count: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        candidate = name
        while candidate in self._taken:
            self._count[name] = self._count.get(name, 1) + 1
            candidate = f"{name}_{self._count[name]}"
        self._taken.add(candidate)
        return candidate
