"""Evaluate ONNX nodes whose inputs are constants, with onnx's own reference implementation.

Shape arithmetic (what exporters write for Pad, Reshape, Resize) thereby becomes plain constants.
Quantised weights stay integers: QuantizeLinear and DequantizeLinear are never evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

# Larger results stay in the graph: a model of a few bytes must not make gigabytes here.
MAX_ELEMENTS = 1 << 24

FOLDABLE = frozenset(
    """Abs Add And BitShift Cast CastLike Ceil Clip Concat ConstantOfShape CumSum Div Equal Erf Exp
    Expand Flatten Floor Gather GatherElements GatherND Greater GreaterOrEqual Identity Less
    LessOrEqual Log Max Min Mod Mul Neg NonZero Not OneHot Or Pad Pow Range Reciprocal ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum Reshape Round ScatterElements ScatterND Shape Sign
    Size Slice Split Sqrt Squeeze Sub Tile Transpose Trilu Unsqueeze Where Xor""".split()
)


def evaluate(
    node: onnx.NodeProto, inputs: Sequence[np.ndarray | None], opset: int
) -> list[np.ndarray] | None:
    """Outputs of `node` on constant inputs, or `None` when it is not to be folded."""
    if node.op_type not in FOLDABLE or node.domain not in ("", "ai.onnx"):
        return None
    if _result_elements(node, inputs) > MAX_ELEMENTS:
        return None
    anonymous = onnx.NodeProto()
    anonymous.CopyFrom(node)
    feeds: dict[str, np.ndarray] = {}
    for index, value in enumerate(inputs):
        if value is not None:
            anonymous.input[index] = f"in{index}"
            feeds[f"in{index}"] = value
    results = ReferenceEvaluator(anonymous, opsets={"": opset}).run(None, feeds)
    return [np.asarray(result) for result in results]


def _result_elements(node: onnx.NodeProto, inputs: Sequence[np.ndarray | None]) -> int:
    """Upper bound of the result's size, from the inputs' values where the operator can grow."""
    arrays = [value for value in inputs if value is not None]
    largest = max((value.size for value in arrays), default=0)

    def product(values: np.ndarray) -> int:
        return math.prod(max(int(v), 1) for v in values.reshape(-1))

    if node.op_type == "ConstantOfShape":
        return product(arrays[0])
    if node.op_type == "Expand":
        return product(arrays[1]) * arrays[0].size
    if node.op_type == "Tile":
        return product(arrays[1]) * arrays[0].size
    if node.op_type == "Range":
        start, limit, step = (float(value) for value in arrays)
        return math.ceil(abs(limit - start) / abs(step)) if step else MAX_ELEMENTS + 1
    if node.op_type == "Pad":
        pads = arrays[1] if len(arrays) > 1 else np.zeros(2 * arrays[0].ndim)
        if pads.size != 2 * arrays[0].ndim:  # given for some axes only
            return arrays[0].size * product(np.abs(pads) + 1)
        grown = np.asarray(arrays[0].shape) + pads.reshape(2, -1).sum(axis=0)
        return product(grown)
    if node.op_type == "Gather":
        return arrays[1].size * arrays[0].size
    if node.op_type == "OneHot":
        return arrays[0].size * max(int(np.asarray(arrays[1]).reshape(-1)[0]), 1)
    if node.op_type == "Concat":
        return sum(value.size for value in arrays)
    return math.prod(np.broadcast_shapes(*_shapes(arrays))) if _elementwise(arrays) else largest


def _shapes(arrays: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    return [value.shape for value in arrays]


def _elementwise(arrays: Sequence[np.ndarray]) -> bool:
    try:
        np.broadcast_shapes(*_shapes(arrays))
    except ValueError:
        return False
    return True
