"""Read an ONNX file safely: bounded, external data inside the model's folder only, no NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from ...errors import ModelError

# protobuf cannot hold more in one message, so a larger file is not an ONNX model.
MAX_FILE_BYTES = 2**31 - 1

# Operators whose constant inputs are weights: an infinity there cannot be meant.
_WEIGHTED = frozenset(
    """Conv ConvTranspose Gemm MatMul BatchNormalization LSTM GRU RNN QuantizeLinear
    DequantizeLinear QLinearConv QLinearMatMul QGemm""".split()
)


def read(path: Path) -> onnx.ModelProto:
    """Parse `path` and its external data. Raises `ModelError` for anything unreadable."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelError(
            f"{path}: {size} bytes is more than an ONNX file can hold ({MAX_FILE_BYTES}); "
            "store large weights as external data"
        )
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX file, or a damaged one ({error})") from None
    if not model.graph.node:
        raise ModelError(f"{path}: not an ONNX file, or one without any operator")
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            _load_external(tensor, path)
    return model


def check_values(graph: onnx.GraphProto) -> None:
    """Refuse NaN in any constant tensor and infinities in weights."""
    weights = {name for node in graph.node if node.op_type in _WEIGHTED for name in node.input[1:]}
    for tensor in _tensors(graph):
        array = tensor_array(tensor)
        if array.dtype.kind != "f" or array.ndim == 0:
            continue
        if np.isnan(array).any():
            raise ModelError(f"tensor {tensor.name!r} contains NaN; export the model again")
        if tensor.name in weights and np.isinf(array).any():
            raise ModelError(f"weight {tensor.name!r} contains Inf; export the model again")


def tensor_array(tensor: onnx.TensorProto) -> np.ndarray:
    """The values of a constant tensor; `ModelError` when its bytes do not fit its shape."""
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"tensor {tensor.name!r} is damaged: {str(error).splitlines()[0]}"
        ) from None


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Initialisers and tensor attributes of a graph and of its branches and loop bodies."""
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found.append(attribute.t)
            found.extend(attribute.tensors)
            if attribute.HasField("g"):
                found.extend(_tensors(attribute.g))
            for subgraph in attribute.graphs:
                found.extend(_tensors(subgraph))
    return found


def _load_external(tensor: onnx.TensorProto, path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    data = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not data.is_relative_to(folder):
        raise ModelError(
            f"{path}: external data of tensor {tensor.name!r} lies outside the model's folder "
            f"({location!r}); put it beside the model"
        )
    if not data.is_file():
        raise ModelError(
            f"{path}: external data file {location!r} of tensor {tensor.name!r} is missing"
        )
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", data.stat().st_size - offset))
    except ValueError:
        raise ModelError(f"{path}: external data of tensor {tensor.name!r} is damaged") from None
    if offset < 0 or length < 0 or offset + length > data.stat().st_size:
        raise ModelError(
            f"{path}: external data file {location!r} is too short for tensor {tensor.name!r}"
        )
    try:
        load_external_data_for_tensor(tensor, str(folder))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise ModelError(f"{path}: external data of tensor {tensor.name!r}: {error}") from None
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]
