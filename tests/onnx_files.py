"""Small ONNX files of one input called `image`, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save_onnx(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    image: Sequence[int | str],
    result: str,
    shape: Sequence[int],
) -> Path:
    """`path`, with the nodes from `image` of that shape to `result` of `shape`; floats are
    float32."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def save_samples(path: Path, random: np.random.Generator, count: int, *shape: int) -> None:
    """Images beside a model, as calibration data."""
    np.savez(path.with_suffix(".npz"), image=random.standard_normal((count, *shape), np.float32))
