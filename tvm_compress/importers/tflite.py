"""TFLite => graph form. A quantised model keeps its integers, scales and rounding rule."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tvm
from tvm import relax

from ..errors import ModelError
from ..model import INPUT_NAMES_ATTR, OUTPUT_NAMES_ATTR, REQUANTIZE_ATTR
from ..relay_passes.ir import op_name
from ..relay_passes.numerics.tflite_tables import Codes
from . import names
from .failures import close_blocks, first_line
from .freeze import freeze_inputs
from .shapes import Dim, resolve_shapes, unknown_input

try:
    import tflite
    from tvm.relax.frontend.tflite import from_tflite
    from tvm.relax.frontend.tflite.tflite_frontend import OperatorConverter, get_tensor_name
except ImportError as error:
    raise ModelError(
        f"reading TFLite needs the package {error.name!r}: pip install tflite"
    ) from error

MAX_FILE_BYTES = 2**31 - 1  # flatbuffers cannot address more

# Quantised tensors whose integers these operators only move (equal scales in and out).
_MOVEMENT = frozenset(
    """DEPTH_TO_SPACE EXPAND_DIMS GATHER PACK PAD PADV2 MIRROR_PAD RESIZE_NEAREST_NEIGHBOR
    REVERSE_V2 SLICE SPACE_TO_DEPTH SPLIT SPLIT_V SQUEEZE STRIDED_SLICE TILE TRANSPOSE
    UNPACK""".split()
)
# On integers these give no quantised result.
_INDEX = frozenset({"ARG_MAX", "ARG_MIN", "SHAPE"})


def import_tflite(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]] | None,
    input_values: Mapping[str, float | np.ndarray] | None,
) -> tvm.IRModule:
    """Relax module in graph form, not yet canonical. Raises `ModelError`."""
    model = _read(path)
    try:
        graph = model.Subgraphs(0)
        declared = _inputs(graph)
        output_names = [_name(graph.Tensors(int(i))) for i in graph.OutputsAsNumpy()]
    except Exception as error:
        raise ModelError(f"{path}: damaged TFLite file ({first_line(error)})") from error
    for name in input_values or {}:
        if name not in declared:
            raise ModelError(unknown_input(name, declared))
    static = resolve_shapes(declared, shapes)
    labels: dict[tvm.ir.Var, str] = {}

    class Converter(_Converter):
        layer_labels = labels

    try:
        module = from_tflite(model, shape_dict=dict(static), op_converter=Converter)
    except Exception as error:
        if Converter.builder is not None:
            close_blocks(Converter.builder)
        if isinstance(error, ModelError):
            raise
        where = f" at operator {Converter.current}" if Converter.current else ""
        raise ModelError(f"{path}: cannot import{where}: {first_line(error)}") from error
    main = module["main"].without_attr("params").without_attr("num_input")
    main = main.with_attr(INPUT_NAMES_ATTR, list(declared))
    main = main.with_attr(OUTPUT_NAMES_ATTR, output_names)
    if any(op_name(b.value) == "relax.quantize" for b in _bindings(main)):
        main = main.with_attr(REQUANTIZE_ATTR, "tflite")
    renamed = tvm.IRModule({"main": _rename(main, labels)})
    return freeze_inputs(renamed, input_values)


def _read(path: Path) -> Any:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelError(f"{path}: {size} bytes is more than a TFLite file can hold")
    content = path.read_bytes()
    if content[4:8] != b"TFL3":
        raise ModelError(f"{path}: not a TFLite file, or a damaged one")
    try:
        model = tflite.Model.GetRootAsModel(content, 0)
        if model.SubgraphsLength() < 1 or model.SubgraphsLength() > size:
            raise ValueError("no graph")
        graph = model.Subgraphs(0)
        counts = (graph.TensorsLength(), graph.OperatorsLength(), graph.InputsLength())
        if max(counts) > size or graph.OperatorsLength() < 1:
            raise ValueError("impossible sizes")
        _check_tensors(model, graph)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path}: damaged TFLite file ({first_line(error)})") from error
    return model


def _check_tensors(model: Any, graph: Any) -> None:
    """Refuse NaN and infinity in float constants, and in scales."""
    for index in range(graph.TensorsLength()):
        tensor = graph.Tensors(index)
        name = _name(tensor)
        if any(int(size) < 0 for size in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else False:
            raise ModelError(f"tensor {name!r} has a negative size; the file is damaged")
        quantisation = tensor.Quantization()
        if quantisation is not None and quantisation.ScaleLength():
            scales = np.asarray(quantisation.ScaleAsNumpy())
            if not np.isfinite(scales).all():
                raise ModelError(f"tensor {name!r} has a scale that is NaN or Inf")
        data = model.Buffers(tensor.Buffer()).DataAsNumpy()
        if isinstance(data, np.ndarray) and tensor.Type() == tflite.TensorType.FLOAT32:
            values = np.frombuffer(data.tobytes(), "float32")
            if not np.isfinite(values).all():
                raise ModelError(f"tensor {name!r} contains NaN or Inf; export the model again")


def _inputs(graph: Any) -> dict[str, list[Dim]]:
    declared: dict[str, list[Dim]] = {}
    for index in graph.InputsAsNumpy() if graph.InputsLength() else []:
        tensor = graph.Tensors(int(index))
        shape = tensor.ShapeAsNumpy() if tensor.ShapeLength() else []
        signature = tensor.ShapeSignatureAsNumpy() if tensor.ShapeSignatureLength() else shape
        declared[_name(tensor)] = [int(size) if size >= 0 else None for size in signature]
    return declared


def _name(tensor: Any) -> str:
    return (tensor.Name() or b"").decode("utf-8", "replace")


class _Converter(OperatorConverter):
    """TVM's converter, with layer names and the quantised operators it refuses or rounds."""

    _SUPPORTED_QUANTIZED_OPS = (
        OperatorConverter._SUPPORTED_QUANTIZED_OPS
        | _MOVEMENT
        | _INDEX
        | {"BATCH_MATMUL", "GELU", "PRELU"}
    )
    layer_labels: ClassVar[dict[tvm.ir.Var, str]] = {}
    builder: ClassVar[relax.BlockBuilder | None] = None
    current: ClassVar[str] = ""  # the operator being converted

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        type(self).builder = self.bb
        self.convert_map["AVERAGE_POOL_2D"] = self._average_pool
        self.convert_map["BATCH_MATMUL"] = self._batch_matmul
        self.convert_map["FULLY_CONNECTED"] = self._fully_connected
        self.convert_map["GELU"] = self._gelu
        self.convert_map["PRELU"] = self._prelu

    def check_unsupported_ops(self) -> None:
        for index in range(self.subgraph.OperatorsLength()):
            op = self.subgraph.Operators(index)
            kind = self.get_op_code_str(op)
            inputs, outputs = self.get_input_tensors(op), self.get_output_tensors(op)
            where = repr(_name(outputs[0].tensor)) if outputs else "?"
            if kind not in self.convert_map:
                raise ModelError(f"operator {kind} of {where} is not supported; replace it")
            quantised_in = bool(inputs) and inputs[0].qnn_params is not None
            quantised_out = any(tensor.qnn_params is not None for tensor in outputs)
            weights = any(tensor.qnn_params is not None for tensor in inputs[1:])
            if not quantised_in and not quantised_out and weights:
                raise ModelError(
                    f"operator {kind} of {where} is quantised dynamically (integer weights, float "
                    "activations); convert with full integer quantisation or without any"
                )
            quantised = quantised_in or quantised_out or weights
            if quantised and kind not in self._SUPPORTED_QUANTIZED_OPS:
                raise ModelError(
                    f"operator {kind} of {where} is not supported on quantised tensors; "
                    "keep it in float or replace it"
                )
            moves = kind in _MOVEMENT and quantised_in and quantised_out
            if moves and not self.has_same_qnn_params(inputs[0], outputs[0]):
                raise ModelError(
                    f"operator {kind} of {where} changes the scale of what it moves; "
                    "convert the model again with a newer TensorFlow"
                )

    def convert_op_to_relax(self) -> None:
        for index in range(self.subgraph.OperatorsLength()):
            op = self.subgraph.Operators(index)
            outputs = self.get_output_tensors(op)
            kind = self.get_op_code_str(op)
            type(self).current = f"{kind} of {_name(outputs[0].tensor)!r}" if outputs else kind
            result = self.convert_map[kind](op=op)
            if result is None:
                continue
            result = self.bb.normalize(result)
            if isinstance(result, tvm.ir.Call):
                result = self.bb.emit(result)
            self._label(result, self._layer(op, kind))
            for position, tensor in enumerate(outputs):
                name = get_tensor_name(self.subgraph, tensor.tensor_idx)
                self.exp_tab.set_expr(name, result if len(outputs) == 1 else result[position])
        type(self).current = ""

    def _layer(self, op: Any, kind: str) -> str:
        weights = [_name(t.tensor) for t in self.get_input_tensors(op)[1:2]]
        return layer_name([_name(t.tensor) for t in self.get_output_tensors(op)[:1]], weights, kind)

    def _label(self, expr: Any, layer: str) -> None:
        """Name what an operator became: the anchor after the layer, the rest `<layer>_<op>`."""
        pending = [expr]
        while pending:
            current = pending.pop()
            if isinstance(current, relax.Tuple):
                pending.extend(current.fields)
            elif isinstance(current, relax.TupleGetItem):
                pending.append(current.tuple_value)
            elif isinstance(current, tvm.ir.Var) and current not in self.layer_labels:
                value = self.bb.lookup_binding(current)
                if value is None:  # an input of the model
                    continue
                operator = (op_name(value) or "value").split(".")[-1]
                anchor = operator.startswith("conv") or operator == "matmul"
                self.layer_labels[current] = layer if anchor else f"{layer}_{operator}"
                if isinstance(value, tvm.ir.Call):
                    pending.extend(value.args)
                else:
                    pending.append(value)

    # ---- quantised operators that TVM's converter rounds otherwise, or has not -------------------

    def dequantize(self, expr: Any, tensor: Any) -> Any:
        """64-bit biases (16-bit activations) become 32-bit ones: Relax has no others here."""
        if tensor.tensor.Type() == tflite.TensorType.INT64:
            values = self.get_tensor_value(tensor)
            if np.abs(values).max(initial=0) >= 2**31:
                raise ModelError(f"bias {_name(tensor.tensor)!r} does not fit 32 bits")
            expr = relax.const(values.astype(np.int32))
        return super().dequantize(expr, tensor)

    def convert_qnn_fused_activation_function(
        self, expr: Any, fused_activation_fn: int, scale: float, zero_point: int, dtype: str
    ) -> Any:
        """Bounds as TFLite computes them: float32 division, half away from zero."""
        kinds = tflite.ActivationFunctionType
        bounds = {
            kinds.RELU: (0.0, np.inf), kinds.RELU6: (0.0, 6.0), kinds.RELU_N1_TO_1: (-1.0, 1.0)
        }.get(fused_activation_fn)  # fmt: skip
        if bounds is None:
            return super().convert_qnn_fused_activation_function(
                expr, fused_activation_fn, scale, zero_point, dtype
            )
        codes = Codes(float(scale), int(zero_point), dtype)
        info = np.iinfo(dtype)
        low, high = codes.bound(bounds[0]), codes.bound(bounds[1])
        lowest = info.min if low is None else max(low, info.min)
        highest = info.max if high is None else min(high, info.max)
        return relax.op.clip(expr, float(lowest), float(highest))

    def _average_pool(self, op: Any) -> Any:
        """On integers: `quantize(avg_pool2d(dequantize(x)))`, for the model's rounding rule."""
        tensor = self.get_input_tensors(op)[0]
        if tensor.qnn_params is None:
            return self.convert_pool2d(op, "average")
        integer = self.convert_pool2d(op, "average")  # clip?(astype(avg_pool2d(astype(x))))
        bounds = None
        if op_name(integer) == "relax.clip":
            bounds = integer.args[1:]
            integer = integer.args[0]
        attrs = integer.args[0].attrs
        averaged = relax.op.nn.avg_pool2d(
            self.dequantize(self.get_expr(tensor.tensor_idx), tensor),
            [int(k) for k in attrs.pool_size],
            [int(s) for s in attrs.strides],
            [int(p) for p in attrs.padding],
            layout="NHWC",
        )
        result = self.quantize(averaged, self.get_output_tensors(op)[0])
        return result if bounds is None else relax.op.clip(result, *bounds)

    def _fully_connected(self, op: Any) -> Any:
        """Unless the operator keeps the dimensions, its input is rows of the weight's length."""
        source, weight = self.get_input_tensors(op)[:2]
        options = tflite.FullyConnectedOptions()
        table = op.BuiltinOptions()
        options.Init(table.Bytes, table.Pos)
        if options.KeepNumDims() or source.tensor.ShapeLength() == 2:
            return self.convert_fully_connected(op)
        name = get_tensor_name(self.subgraph, source.tensor_idx)
        expr = self.get_tensor_expr(source)
        depth = int(weight.tensor.ShapeAsNumpy()[1])
        rows = self.bb.normalize(relax.op.reshape(expr, (-1, depth)))
        self.exp_tab.set_expr(name, rows, force_override=True)
        try:
            return self.convert_fully_connected(op)
        finally:
            self.exp_tab.set_expr(name, expr, force_override=True)

    def _batch_matmul(self, op: Any) -> Any:
        """On integers: `quantize(matmul(dequantize(a), dequantize(b)))`.

        The result's dtype is given: it tells the operator from FULLY_CONNECTED, which rounds
        otherwise.
        """
        inputs, output = self.get_input_tensors(op), self.get_output_tensors(op)[0]
        if inputs[0].qnn_params is None:
            return self.convert_batch_matmul(op)
        options = tflite.BatchMatMulOptions()
        table = op.BuiltinOptions()
        options.Init(table.Bytes, table.Pos)
        operands = []
        for tensor, adjoint in zip(inputs, (options.AdjX(), options.AdjY()), strict=True):
            value = self.dequantize(self.get_tensor_expr(tensor), tensor)
            if adjoint:
                rank = len(tensor.tensor.ShapeAsNumpy())
                value = relax.op.permute_dims(value, [*range(rank - 2), rank - 1, rank - 2])
            operands.append(value)
        return self.quantize(relax.op.matmul(*operands, out_dtype="float32"), output)

    def _gelu(self, op: Any) -> Any:
        """By the error function or, when `approximate` is set, by tanh."""
        options = tflite.GeluOptions()
        table = op.BuiltinOptions()
        options.Init(table.Bytes, table.Pos)
        function = relax.op.nn.gelu_tanh if options.Approximate() else relax.op.nn.gelu
        source, output = self.get_input_tensors(op)[0], self.get_output_tensors(op)[0]
        expr = self.get_tensor_expr(source)
        if source.qnn_params is None:
            return function(expr)
        return self.quantize(function(self.dequantize(expr, source)), output)

    def _prelu(self, op: Any) -> Any:
        """On integers with a constant slope by channel: `quantize(prelu(dequantize(x), slope))`."""
        source, slope = self.get_input_tensors(op)
        output = self.get_output_tensors(op)[0]
        if source.qnn_params is None:
            return self.convert_prelu(op)
        channels = int(source.tensor.ShapeAsNumpy()[-1])
        shape = [int(size) for size in slope.tensor.ShapeAsNumpy()]
        if self.has_expr(slope.tensor_idx) or np.prod(shape) not in (1, shape[-1]):
            raise ModelError(
                f"operator PRELU of {_name(output.tensor)!r} is not supported on quantised tensors "
                f"with slopes of shape {shape}; allowed: constant slopes by channel"
            )
        codes = np.broadcast_to(self.get_tensor_value(slope).reshape(-1), (channels,)).copy()
        slopes = self.dequantize(relax.const(codes), slope)
        rectified = relax.op.nn.prelu(
            self.dequantize(self.get_tensor_expr(source), source), slopes, axis=-1
        )
        return self.quantize(rectified, output)


def layer_name(outputs: list[str], weights: list[str], kind: str) -> str:
    """The layer that most of a fused operator's tensor names agree on.

    The converter joins the names of what it fused with `;`: activation, batch-norm, convolution,
    bias, and sometimes a neighbour whose constant is shared.
    """
    votes: collections.Counter[str] = collections.Counter()
    fallback = ""
    for joined in [*outputs, *weights]:
        for name in joined.split(";"):
            path = re.sub(r"/(ReadVariableOp|resource)\d*", "", name)
            layer = names.layer_name(
                re.sub(r"(Conv2D|MatMul|BiasAdd|depthwise)\d+$", r"\1", path), ""
            )
            layer = re.sub(r"^(functional|model|sequential)_(\d+_)?(?=[A-Za-z])", "", layer)
            if re.search(
                r"activation|batch_norm|Identity|weights|_Const$|^Const|shape|^arg\d", layer
            ):
                fallback = fallback or layer
            elif layer:
                votes[layer] += 1
    return votes.most_common(1)[0][0] if votes else fallback or kind.lower()


def _bindings(function: relax.Function) -> Iterator[relax.Binding]:
    for block in function.body.blocks:
        yield from block.bindings


def _rename(function: relax.Function, labels: Mapping[tvm.ir.Var, str]) -> relax.Function:
    """Bindings under their labels; unique names come with canonicalisation."""
    from ..relay_passes.canonicalize.name_layers import rename

    return rename(function, labels)
