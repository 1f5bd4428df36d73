"""Build small `.tflite` files for tests, without TensorFlow.

    x, y = Tensor("x", (1, 8), "int8", 0.1, 3), Tensor("y", (1, 8), "int8", 0.1, 3)
    content = build([x, y], [Operator("RELU", ["x"], ["y"])], ["x"], ["y"])

Uses the object API of the schema that ships with ai-edge-litert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FILE_IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph; a constant when `data` is set. `scale` may be one float or a sequence
    along `axis`; None means not quantised."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | Sequence[float] | None = None
    zero_point: int | Sequence[int] = 0
    axis: int = 0
    data: np.ndarray | None = None


@dataclass(frozen=True)
class Operator:
    """One operator: names of its tensors, and the fields of its options table."""

    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    options: dict[str, Any] = field(default_factory=dict)
    options_table: str | None = None
    version: int = 1


def build(
    tensors: Sequence[Tensor],
    operators: Sequence[Operator],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> bytes:
    """The file's bytes."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    index = {tensor.name: k for k, tensor in enumerate(tensors)}
    model = schema.ModelT()
    model.version = SCHEMA_VERSION
    model.description = b"test"
    model.buffers = [schema.BufferT()]
    graph = schema.SubGraphT()
    graph.name = b"main"
    graph.tensors = []
    for tensor in tensors:
        table = schema.TensorT()
        table.name = tensor.name.encode()
        table.shape = list(tensor.shape)
        table.type = getattr(schema.TensorType, tensor.dtype.upper())
        table.buffer = 0
        if tensor.data is not None:
            buffer = schema.BufferT()
            stored = np.ascontiguousarray(tensor.data.astype(tensor.dtype))
            buffer.data = np.frombuffer(stored.tobytes(), np.uint8)
            model.buffers.append(buffer)
            table.buffer = len(model.buffers) - 1
        if tensor.scale is not None:
            quantisation = schema.QuantizationParametersT()
            scales = np.atleast_1d(np.asarray(tensor.scale, np.float32))
            quantisation.scale = scales
            quantisation.zeroPoint = np.broadcast_to(
                np.atleast_1d(np.asarray(tensor.zero_point, np.int64)), scales.shape
            ).copy()
            quantisation.quantizedDimension = tensor.axis
            table.quantization = quantisation
        graph.tensors.append(table)
    graph.inputs = [index[name] for name in inputs]
    graph.outputs = [index[name] for name in outputs]
    kinds: list[tuple[str, int]] = []
    graph.operators = []
    model.operatorCodes = []
    for operator in operators:
        key = (operator.kind, operator.version)
        if key not in kinds:
            kinds.append(key)
            code = schema.OperatorCodeT()
            value = getattr(schema.BuiltinOperator, operator.kind)
            code.builtinCode = value
            code.deprecatedBuiltinCode = min(value, 127)
            code.version = operator.version
            model.operatorCodes.append(code)
        node = schema.OperatorT()
        node.opcodeIndex = kinds.index(key)
        node.inputs = [index[name] if name else -1 for name in operator.inputs]
        node.outputs = [index[name] for name in operator.outputs]
        if operator.options_table is not None:
            options = getattr(schema, f"{operator.options_table}T")()
            for name, setting in operator.options.items():
                if not hasattr(options, name):
                    raise KeyError(f"{operator.options_table} has no field {name}")
                setattr(options, name, setting)
            node.builtinOptions = options
            node.builtinOptionsType = getattr(schema.BuiltinOptions, operator.options_table)
        graph.operators.append(node)
    model.subgraphs = [graph]
    writer = flatbuffers.Builder(1024)
    writer.Finish(model.Pack(writer), FILE_IDENTIFIER)
    return bytes(writer.Output())


class Reference:
    """The TFLite interpreter with its reference kernels, every tensor kept."""

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.interpreter = Interpreter(
            model_content=content,
            experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
            experimental_preserve_all_tensors=True,
            num_threads=1,
        )
        self.interpreter.allocate_tensors()
        self.inputs = self.interpreter.get_input_details()
        self.outputs = self.interpreter.get_output_details()

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        for detail in self.inputs:
            self.interpreter.set_tensor(detail["index"], arrays[detail["name"]])
        self.interpreter.invoke()
        return {d["name"]: self.interpreter.get_tensor(d["index"]) for d in self.outputs}

    def tensor(self, index: int) -> np.ndarray:
        """A tensor of the last run by its place in the file."""
        return self.interpreter.get_tensor(index)


def with_all_outputs(content: bytes) -> tuple[bytes, list[int]]:
    """The model with the result of every operator among its outputs, in order, and their places."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(bytearray(content), 0)
    graph = model.subgraphs[0]
    places = [int(place) for operator in graph.operators for place in operator.outputs]
    graph.outputs = places
    model.signatureDefs = []
    writer = flatbuffers.Builder(len(content))
    writer.Finish(model.Pack(writer), FILE_IDENTIFIER)
    return bytes(writer.Output()), places
