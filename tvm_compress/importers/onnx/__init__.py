"""ONNX => graph form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import tvm
from onnx import inliner

from ...errors import ModelError
from ...model import INPUT_NAMES_ATTR, OUTPUT_NAMES_ATTR, REQUANTIZE_ATTR
from ..shapes import Dim, resolve_shapes, unknown_input
from .graph import GraphImporter, quiet
from .read import check_values, read

_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "QLinear", "QGemm", "Integer")


def import_onnx(
    source: Path | onnx.ModelProto,
    shapes: Mapping[str, tuple[int, ...]] | None,
    input_values: Mapping[str, float | np.ndarray] | None,
) -> tvm.IRModule:
    """Relax module in graph form, not yet canonical. Raises `ModelError`."""
    model = read(source) if isinstance(source, Path) else source
    if model.functions:
        model = inliner.inline_local_functions(model)
    graph = model.graph
    check_values(graph)
    declared = _inputs(graph)
    values = {name: np.asarray(value) for name, value in (input_values or {}).items()}
    for name in values:
        if name not in declared:
            raise ModelError(unknown_input(name, declared))
    static = resolve_shapes(
        {
            name: [None if d is None and values[name].ndim == 0 else d for d in dims]
            if name in values
            else dims
            for name, dims in declared.items()
        },
        {**{n: v.shape for n, v in values.items() if v.ndim}, **(shapes or {})},
    )
    with quiet():
        importer = GraphImporter(static, values)
        module = importer.build(graph, _opset(model))
    attributes: dict[str, object] = {
        INPUT_NAMES_ATTR: [name for name in declared if name not in values],
        OUTPUT_NAMES_ATTR: [value.name for value in graph.output],
    }
    if any(word in node.op_type for node in graph.node for word in _QUANTISED):
        attributes[REQUANTIZE_ATTR] = "float32"
    module["main"] = module["main"].with_attrs(attributes)
    return module


def _opset(model: onnx.ModelProto) -> int:
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            newest = onnx.defs.onnx_opset_version()
            if opset.version > newest:
                raise ModelError(
                    f"the model uses ONNX operator set {opset.version}; the installed onnx package "
                    f"knows them up to {newest}: export the model with opset 13 to 18"
                )
            return int(opset.version)
    raise ModelError("the model does not say which ONNX operator set it uses; it is damaged")


def _inputs(graph: onnx.GraphProto) -> dict[str, list[Dim]]:
    constants = {tensor.name for tensor in graph.initializer}
    declared: dict[str, list[Dim]] = {}
    for value in graph.input:
        if value.name in constants:
            continue
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"input {value.name!r} is no tensor, which is not supported")
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            raise ModelError(f"input {value.name!r} has no rank; export the model with shapes")
        declared[value.name] = [
            int(dim.dim_value) if dim.dim_value > 0 else (dim.dim_param or None)
            for dim in tensor.shape.dim
        ]
    return declared
