"""Walk an ONNX graph and build Relax with TVM's converters, under names that people recognise.

What TVM 0.27's own walker lacks and this one adds: constant folding as it goes, layer names,
branches whose condition is known, real branches, `Scan` and `Loop` unrolled, and converters of ours
that go before TVM's (`CONVERTERS`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper
from tvm import relax
from tvm.relax.frontend.onnx.onnx_frontend import (
    ONNXGraphImporter,
    _get_convert_map,
    get_type,
    onnx_input,
)

from ...errors import ModelError
from ...relay_passes.ir import array_const, constant, op_name, shape_of
from .. import names
from ..failures import close_blocks, first_line
from .fold import evaluate
from .read import tensor_array

ANCHORS = frozenset(
    {
        *(f"relax.nn.conv{n}d" for n in (1, 2, 3)),
        *(f"relax.nn.conv{n}d_transpose" for n in (1, 2, 3)),
        "relax.matmul",
    }
)

# Whose operators the converters implement: ONNX itself and ONNX Runtime's contributed ones.
DOMAINS = ("", "ai.onnx", "com.microsoft")

# Unrolled loops: enough for any sequence model of the sizes in scope, and bounded for hostile
# input.
MAX_UNROLLED_NODES = 200_000


class GraphImporter(ONNXGraphImporter):
    """One ONNX graph => Relax `main`. `shapes` gives every input's static shape."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], input_values: Mapping[str, np.ndarray]
    ) -> None:
        super().__init__(dict(shapes), {}, keep_params_in_input=False, sanitize=True)
        self._nodes: dict[str, tvm.ir.Expr] = {}
        self._input_values = dict(input_values)
        self._unique = names.UniqueNames()
        self._base = names.UniqueNames()  # before the step's suffix
        self._bases: dict[tuple[str, str], str] = {}
        self._suffix = ""  # `_t3` inside the fourth pass of an unrolled loop
        self._converted_nodes = 0
        self._in_branch = False

    # ---- the whole graph ---------------------------------------------------------------------

    def build(self, graph: onnx.GraphProto, opset: int) -> tvm.IRModule:
        """The module; raises `ModelError` naming the node that cannot be converted."""
        from .converters import CONVERTERS

        self.opset = opset
        self._converters = CONVERTERS
        self._refuse_unsupported(graph)
        self._add_constants(graph)
        self._add_inputs(graph)
        inputs = [v for v in self._inputs.values() if isinstance(v, tvm.ir.Var)]
        try:
            with self.bb.function("main", params=inputs):
                with contextlib.ExitStack() as stack:
                    dataflow = not _has_subgraph(graph)
                    if dataflow:
                        stack.enter_context(self.bb.dataflow())
                    self._construct_nodes(graph)
                    outputs = [self._output(value) for value in graph.output]
                    result = outputs[0] if len(outputs) == 1 else relax.Tuple(outputs)
                    result = self.bb.emit_output(result) if dataflow else self.bb.emit(result)
                self.bb.emit_func_output(result)
        except BaseException:
            close_blocks(self.bb)
            raise
        return self.bb.get()

    def _output(self, value: onnx.ValueInfoProto) -> tvm.ir.Expr:
        if value.name not in self._nodes:
            raise ModelError(f"output {value.name!r} is produced by no node; the model is damaged")
        expr = self._nodes[value.name]
        return _shape_as_constant(expr)

    def _add_constants(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._nodes[tensor.name] = _const(tensor_array(tensor), tensor.name)
        if graph.sparse_initializer:
            raise ModelError("sparse initialisers are not supported; store the tensors densely")

    def _add_inputs(self, graph: onnx.GraphProto) -> None:
        for value in graph.input:
            if value.name in self._nodes:  # an initialiser's default
                continue
            dtype = get_type(value.type.tensor_type.elem_type)
            if value.name in self._input_values:
                array = np.asarray(self._input_values[value.name]).astype(dtype)
                self._nodes[value.name] = array_const(
                    np.broadcast_to(array, self._shape[value.name])
                )
                continue
            name = self._unique(names.sanitise(value.name) or "input")
            var = relax.Var(name, relax.TensorType(self._shape[value.name], dtype))
            self._nodes[value.name] = var
            self._inputs[value.name] = var

    def _refuse_unsupported(self, graph: onnx.GraphProto) -> None:
        known = _get_convert_map()
        for node in graph.node:
            # Another domain's `Conv` may be anything.
            if node.domain not in DOMAINS or not (
                node.op_type in known
                or node.op_type in self._converters
                or node.op_type in ("If", "Scan", "Loop", "Constant")
            ):
                raise ModelError(
                    f"operator {_qualified(node)} of node {_label(node)} is not supported; "
                    "export the model with standard ONNX operators (opset 13 to 18)"
                )
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self._refuse_unsupported(attribute.g)

    # ---- nodes -------------------------------------------------------------------------------

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for node in graph.node:
            self._converted_nodes += 1
            if self._converted_nodes > MAX_UNROLLED_NODES:
                raise ModelError(
                    f"the model unrolls to more than {MAX_UNROLLED_NODES} nodes at {_label(node)}; "
                    "use a shorter sequence"
                )
            try:
                self._node(node)
            except ModelError:
                raise
            except Exception as error:
                raise ModelError(
                    f"cannot import operator {_qualified(node)} of node {_label(node)}: "
                    f"{first_line(error)}"
                ) from error

    def _node(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            if name and name not in self._nodes:
                raise ModelError(
                    f"node {_label(node)} reads {name!r}, which nothing produces; "
                    "the model is damaged"
                )
        inputs = onnx_input(self._nodes[name] if name else None for name in node.input)
        if node.op_type == "If":
            results = self._if(node, inputs)
        elif node.op_type == "Scan":
            results = self._scan(node, inputs)
        elif node.op_type == "Loop":
            results = self._loop(node, inputs)
        else:
            folded = self._fold(node, inputs)
            results = self._convert(node, inputs) if folded is None else folded
        if len(results) < sum(1 for name in node.output if name):
            raise ModelError(f"operator {_qualified(node)} of node {_label(node)} lacks outputs")
        for name, value in zip(node.output, results, strict=False):
            if name:
                self._nodes[name] = value

    def _fold(self, node: onnx.NodeProto, inputs: list[Any]) -> list[tvm.ir.Expr] | None:
        if node.op_type == "Constant":
            return [_const(_constant_attribute(node), _label(node))]
        if node.op_type in ("Shape", "Size") and inputs:
            shape = shape_of(inputs[0])
            if shape is None:
                return None
            dims = np.array(shape, "int64")
            if node.op_type == "Size":
                return [array_const(np.array(dims.prod(), "int64"))]
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            start, end = attributes.get("start", 0), attributes.get("end", len(dims))
            return [array_const(dims[start:end])]
        arrays = [None if value is None else constant(value) for value in inputs]
        if not inputs or any(
            array is None for array, value in zip(arrays, inputs, strict=True) if value is not None
        ):
            return None
        results = evaluate(node, arrays, self.opset)
        return None if results is None else [_const(array, _label(node)) for array in results]

    def _convert(self, node: onnx.NodeProto, inputs: list[Any]) -> list[tvm.ir.Expr]:
        attributes = self._parse_attr(node.attribute)
        attributes["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        weight = node.input[1] if len(node.input) > 1 else ""
        converter = self._converters.get(node.op_type)
        if converter is not None:
            result = converter(self.bb, inputs, attributes, self.opset)
        else:
            table = _get_convert_map()
            if node.op_type not in table:
                raise NotImplementedError("no converter")
            implementation = table[node.op_type].get_converter(self.opset)
            result = implementation(self.bb, inputs, attributes, [self._nodes, self._params])
        return self._named_results(node, weight, result)

    def _named_results(self, node: onnx.NodeProto, weight: str, result: Any) -> list[tvm.ir.Expr]:
        if isinstance(result, list | tuple | relax.Tuple):
            return [self._emit(node, weight, value) for value in result]
        result = self._emit(node, weight, result)
        if isinstance(result.ty, relax.TupleType):
            return [
                self.bb.emit(relax.TupleGetItem(result, index))
                for index in range(len(result.ty.fields))
            ]
        return [result]

    def _emit(self, node: onnx.NodeProto, weight: str, expr: Any) -> tvm.ir.Expr:
        """Bind a converter's result: the anchor under the layer's name, the rest after the node."""
        if not isinstance(expr, tvm.ir.Call):
            if isinstance(expr, relax.TupleGetItem):
                return self.bb.emit(expr)
            return expr
        arguments = [
            self._emit(node, weight, argument) if isinstance(argument, tvm.ir.Call) else argument
            for argument in expr.args
        ]
        operator = op_name(expr)
        if any(new is not old for new, old in zip(arguments, expr.args, strict=True)):
            expr = relax.Call(expr.op, arguments, expr.attrs, expr.ty_args)
        if operator in ANCHORS:
            hint = names.layer_name(node.name, node.op_type, weight)
        elif operator == "relax.add" and node.op_type != "Add":
            hint = names.layer_name(node.name, node.op_type, weight) + "_bias"
        else:
            short = (operator or node.op_type).split(".")[-1]
            hint = names.value_name(node.name, node.op_type, short)
        key = (node.output[0], hint)
        if key not in self._bases:  # an unrolled node keeps its base in every step
            self._bases[key] = self._base(hint)
        return self.bb.emit(expr, self._unique(self._bases[key] + self._suffix))

    # ---- branches and loops ------------------------------------------------------------------

    @contextlib.contextmanager
    def _scope(self, suffix: str = "") -> Iterator[None]:
        """Names defined inside are forgotten afterwards."""
        outer_nodes: dict[str, tvm.ir.Expr] = self._nodes
        outer_suffix = self._suffix
        self._nodes, self._suffix = dict(outer_nodes), outer_suffix + suffix
        try:
            yield
        finally:
            self._nodes, self._suffix = outer_nodes, outer_suffix

    def _subgraph(self, graph: onnx.GraphProto, suffix: str = "") -> list[tvm.ir.Expr]:
        with self._scope(suffix):
            self._add_constants(graph)
            self._construct_nodes(graph)
            return [self._output(value) for value in graph.output]

    def _if(self, node: onnx.NodeProto, inputs: list[Any]) -> list[tvm.ir.Expr]:
        branches = {a.name: a.g for a in node.attribute}
        condition = constant(inputs[0])
        if condition is not None:
            taken = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
            return self._subgraph(branches[taken])
        scalar = inputs[0]
        if shape_of(scalar) != ():
            scalar = self.bb.emit(relax.op.reshape(scalar, ()))
        then_branch = self._branch(branches["then_branch"])
        else_branch = self._branch(branches["else_branch"])
        result = self.bb.emit(
            relax.If(scalar, then_branch, else_branch),
            self._unique(names.value_name(node.name, "If", "if")),
        )
        if len(node.output) == 1:
            results = [result]
        else:
            results = [self.bb.emit(relax.TupleGetItem(result, i)) for i in range(len(node.output))]
        for name, value in zip(node.output, results, strict=True):
            if shape_of(value) is None:
                raise ModelError(
                    f"the branches of node {_label(node)} give {name!r} different shapes; pass the "
                    "value that its condition depends on with --input-value, or give all shapes"
                )
        return results

    def _branch(self, graph: onnx.GraphProto) -> relax.SeqExpr:
        self.bb._begin_binding_block()
        try:
            outputs = self._subgraph(graph)
            # A branch must end in a variable of its own, also when it only passes a value on.
            result = self.bb.emit(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
        finally:
            block = self.bb._end_block()
        return relax.SeqExpr([block], result)

    def _scan(self, node: onnx.NodeProto, inputs: list[Any]) -> list[tvm.ir.Expr]:
        """Scan => its body once per step (the trip count is the scanned axis' static size)."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if self.opset < 9:
            raise ModelError(f"Scan of node {_label(node)} is older than opset 9; export it again")
        body: onnx.GraphProto = attributes["body"]
        scanned_count = int(attributes["num_scan_inputs"])
        state = list(inputs[: len(inputs) - scanned_count])
        scanned = list(inputs[len(inputs) - scanned_count :])
        stacked_count = len(body.output) - len(state)
        axes = attributes.get("scan_input_axes", [0] * scanned_count)
        backwards = attributes.get("scan_input_directions", [0] * scanned_count)
        out_axes = attributes.get("scan_output_axes", [0] * stacked_count)
        out_backwards = attributes.get("scan_output_directions", [0] * stacked_count)
        steps = {(shape_of(x) or (0,))[axis] for x, axis in zip(scanned, axes, strict=True)}
        if len(steps) != 1:
            raise ModelError(f"the inputs of Scan node {_label(node)} differ in length")
        (length,) = steps

        collected: list[list[tvm.ir.Expr]] = [[] for _ in range(stacked_count)]
        with self._scope():
            self._add_constants(body)  # once, so that every step shares the same weights
            for step in range(length):
                slices = [
                    self._at(x, axis, length - 1 - step if back else step)
                    for x, axis, back in zip(scanned, axes, backwards, strict=True)
                ]
                outputs = self._step(body, [*state, *slices], f"_t{step}")
                state = outputs[: len(state)]
                for values, value in zip(collected, outputs[len(state) :], strict=True):
                    values.append(value)
        stacked = [
            self._stack(values[::-1] if back else values, axis)
            for values, axis, back in zip(collected, out_axes, out_backwards, strict=True)
        ]
        return [*state, *stacked]

    def _loop(self, node: onnx.NodeProto, inputs: list[Any]) -> list[tvm.ir.Expr]:
        """Loop with a constant trip count and a constant condition => its body unrolled."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        body: onnx.GraphProto = attributes["body"]
        refusal = ModelError(
            f"Loop of node {_label(node)} runs a number of times that is not known; "
            "export the model with a fixed number of steps"
        )
        limit = None if inputs[0] is None else constant(inputs[0])
        if inputs[0] is not None and limit is None:
            raise refusal
        proceed = np.array(True) if len(inputs) < 2 or inputs[1] is None else constant(inputs[1])
        state = list(inputs[2:])
        collected: list[list[tvm.ir.Expr]] = [[] for _ in range(len(body.output) - 1 - len(state))]
        step = 0
        with self._scope():
            self._add_constants(body)
            while True:
                if proceed is None:
                    raise refusal
                if not bool(proceed.reshape(-1)[0]) or (
                    limit is not None and step >= int(limit.reshape(-1)[0])
                ):
                    break
                arguments = [array_const(np.array(step, "int64")), array_const(proceed), *state]
                outputs = self._step(body, arguments, f"_t{step}")
                proceed = constant(outputs[0])
                state = outputs[1 : 1 + len(state)]
                for values, value in zip(collected, outputs[1 + len(state) :], strict=True):
                    values.append(value)
                step += 1
        if step == 0 and collected:
            raise ModelError(f"Loop of node {_label(node)} never runs; remove it from the model")
        return [*state, *(self._stack(values, 0) for values in collected)]

    def _step(
        self, body: onnx.GraphProto, arguments: list[tvm.ir.Expr], suffix: str
    ) -> list[tvm.ir.Expr]:
        with self._scope(suffix):
            for value, argument in zip(body.input, arguments, strict=True):
                self._nodes[value.name] = argument
            self._construct_nodes(body)
            return [self._output(value) for value in body.output]

    def _at(self, expr: tvm.ir.Expr, axis: int, index: int) -> tvm.ir.Expr:
        """`expr[..., index, ...]` along `axis`."""
        array = constant(expr)
        if array is not None:
            return array_const(np.array(np.take(array, index, axis)))
        piece = self.bb.emit(relax.op.strided_slice(expr, [axis], [index], [index + 1]))
        return self.bb.emit(relax.op.squeeze(piece, [axis]))

    def _stack(self, values: list[tvm.ir.Expr], axis: int) -> tvm.ir.Expr:
        arrays = [constant(value) for value in values]
        if all(array is not None for array in arrays):
            return array_const(np.stack(arrays, axis))  # type: ignore[arg-type]
        expanded = [self.bb.emit(relax.op.expand_dims(value, axis)) for value in values]
        return self.bb.emit(relax.op.concat(expanded, axis))


# ---- small helpers ---------------------------------------------------------------------------


def _has_subgraph(graph: onnx.GraphProto) -> bool:
    return any(node.op_type == "If" for node in graph.node) or any(
        a.HasField("g") and _has_subgraph(a.g) for node in graph.node for a in node.attribute
    )


def _const(array: np.ndarray, label: str) -> tvm.ir.Expr:
    if array.dtype.kind not in "fiub" or array.dtype.itemsize == 16:
        raise ModelError(f"tensor {label} has element type {array.dtype}, which is not supported")
    return array_const(array)


def _constant_attribute(node: onnx.NodeProto) -> np.ndarray:
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return tensor_array(value)
    dtypes = {
        "value_float": "float32",
        "value_floats": "float32",
        "value_int": "int64",
        "value_ints": "int64",
    }
    if attribute.name not in dtypes:
        raise ModelError(f"Constant of node {_label(node)} holds {attribute.name}: not supported")
    return np.array(value, dtypes[attribute.name])


def _shape_as_constant(expr: tvm.ir.Expr) -> tvm.ir.Expr:
    if isinstance(expr, relax.ShapeExpr):
        return array_const(np.array([int(v) for v in expr.values], "int64"))
    return expr


def _qualified(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _label(node: onnx.NodeProto) -> str:
    return repr(node.name or (node.output[0] if node.output else "?"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TVM's converters warn about what is handled here (renamed inputs, unknown sizes)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
