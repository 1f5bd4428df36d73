"""conv(x, w) + b => conv(dequantize(quantize(x)), dequantize(w8)) + dequantize(b32)

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference". The result is still a float graph that runs anywhere and
computes what the integer kernels will; `placement` says where the quantisers stand and `lower`
turns regions into integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

from ..errors import DataError
from .encodings import Encoding
from .graph import Graph, Reader, rebuild
from .ir import shape_of
from .numerics.affine import QuantizationParameters, choose_parameters, quantize_affine
from .numerics.ranges import choose_range
from .numerics.statistics import Statistics
from .observations import Observations
from .op_kinds import ANCHORS
from .placement import LeftFloat, Placement, bias_vector, channel_axis, place
from .quantize_config import QuantizeConfig
from .quantize_weights import (
    EncodedLayer,
    IntegerLayer,
    choose_weight_parameters,
    encode_layer,
    encode_weight,
    needs_encoding,
    output_channel_axis,
    quantize_layer,
    weight_only_config,
)
from .select import list_layers

LEFT_FLOAT_ATTR = "tvm_compress.left_float"


@tvm.transform.module_pass(opt_level=0, name="Quantize")
class Quantize:
    """Quantise the named layers, and every operator between them that has an integer form.

    `schemes` maps layer names (`select.list_layers`) to configs; other layers stay
    float. `statistics` holds the tensors that `observe`
    lists, gathered on this very module. What stays float between quantised layers, and why, is in
    the attribute `tvm_compress.left_float` of `main` (`read_left_float`).
    Raises `DataError` when statistics are missing.
    """

    def __init__(self, schemes: Mapping[str, QuantizeConfig], statistics: Statistics) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        function = module["main"]
        graph = Graph(function)
        placement = place(graph, self.schemes)
        placement.left_float += _inside_branches(module, self.schemes)
        parameters = _choose_all_parameters(graph, placement, self.statistics)
        builder = relax.BlockBuilder(module.clone())
        main = _Writer(graph, placement, parameters, self.schemes, builder).write()
        module = builder.get()
        module["main"] = main
        return relax.transform.Normalize()(module)


def observe(module: tvm.IRModule, schemes: Mapping[str, QuantizeConfig]) -> Observations:
    """The tensors whose ranges `Quantize(schemes, ...)` needs."""
    graph = Graph(module["main"])
    groups = _groups(graph, place(graph, schemes))
    return Observations(
        frozenset(variable.name for members in groups.values() for variable in members)
    )


def read_left_float(module: tvm.IRModule) -> list[LeftFloat]:
    """What `Quantize` left in float among quantised layers, with the reasons."""
    attributes = module["main"].attrs
    if attributes is None or LEFT_FLOAT_ATTR not in attributes:
        return []
    return [LeftFloat(**item) for item in json.loads(str(attributes[LEFT_FLOAT_ATTR]))]


def _inside_branches(
    module: tvm.IRModule, schemes: Mapping[str, QuantizeConfig]
) -> list[LeftFloat]:
    return [
        LeftFloat(layer.name, layer.op, "inside the branch of an If")
        for layer in list_layers(module)
        if layer.is_in_branch and layer.name in schemes
    ]


def _groups(graph: Graph, placement: Placement) -> dict[relax.Var, list[relax.Var]]:
    """Leader => the values whose ranges decide the parameters that the group shares.

    A value that was only moved adds nothing to the range of what it was moved from.
    """
    groups: dict[relax.Var, list[relax.Var]] = {}
    for variable in placement.quantized:
        if variable not in placement.moved:
            groups.setdefault(placement.leader(variable), []).append(variable)
    return groups


def _choose_all_parameters(
    graph: Graph, placement: Placement, statistics: Statistics
) -> dict[relax.Var, QuantizationParameters]:
    by_leader: dict[relax.Var, QuantizationParameters] = {}
    for leader, members in _groups(graph, placement).items():
        configs = [placement.quantized[item] for item in members]
        config = next((item for item in configs if item.activations == "int16"), configs[0])
        by_leader[leader] = _choose_parameters(graph, members, config, statistics)
    return {item: by_leader[placement.leader(item)] for item in placement.quantized}


def _choose_parameters(
    graph: Graph, members: list[relax.Var], config: QuantizeConfig, statistics: Statistics
) -> QuantizationParameters:
    dtype = config.activations
    assert dtype is not None  # placement only takes such configs
    ranges = []
    for variable in members:
        if graph.op(variable) == "relax.nn.softmax":
            ranges.append((0.0, 255 / 256))  # known: scale 1/256 on an 8-bit grid
            continue
        if variable.name not in statistics:
            raise DataError(
                f"the calibration statistics have no tensor {variable.name!r}; calibrate the "
                "module that is quantised, with the tensors that `quantize.observe` lists"
            )
        ranges.append(
            choose_range(statistics[variable.name], config.calibrate, dtype, config.is_symmetric)
        )
    return choose_parameters(
        min(low for low, _ in ranges),
        max(high for _, high in ranges),
        dtype,
        symmetric=config.is_symmetric,
        power_of_two=config.scales == "power_of_two",
    )


class _Writer:
    """Writes the quantisers, integer weights and biases of one plan into the function."""

    def __init__(
        self,
        graph: Graph,
        placement: Placement,
        parameters: Mapping[relax.Var, QuantizationParameters],
        schemes: Mapping[str, QuantizeConfig],
        builder: relax.BlockBuilder,
    ) -> None:
        self._graph = graph
        self._placement = placement
        self._parameters = parameters
        self._schemes = schemes
        self._builder = builder
        self._before: dict[relax.Var, list[relax.VarBinding]] = {}
        self._after: dict[relax.Var, list[relax.VarBinding]] = {}
        self._replace: dict[relax.Var, tvm.ir.Expr] = {}
        self._dequantized: dict[relax.Var, relax.Var] = {}
        blocks = graph.function.body.blocks
        self._is_one_dataflow_block = (
            len(blocks) == 1 and isinstance(blocks[0], relax.DataflowBlock)
        ) and not any(None in graph.readers[item] for item in graph.function.params)

    def write(self) -> relax.Function:
        for variable, parameters in self._parameters.items():
            self._add_quantizer(variable, parameters)
        for variable, config in self._placement.layers.items():
            self._write_layer(variable, config)
        for variable in self._graph.values:
            wanted = self._schemes.get(variable.name)
            if wanted is not None and wanted.is_weight_only:
                self._write_weight_only(variable, wanted)
        function = rebuild(
            self._graph.function,
            read=self._read,
            replace=self._replace,
            before=self._before,
            after=self._after,
        )
        records = [vars(item) for item in self._placement.left_float]
        function = function.with_attr(LEFT_FLOAT_ATTR, json.dumps(records))
        return relax.analysis.remove_all_unused(function)

    def _read(self, reader: Reader, variable: relax.Var) -> relax.Var:
        if reader is not None and (reader, variable) in self._placement.fused:
            return variable
        return self._dequantized.get(variable, variable)

    def _variable(self, like: relax.Var, name: str, ty: relax.TensorType) -> relax.Var:
        is_inside = isinstance(like, relax.DataflowVar) or (
            like not in self._graph.values and self._is_one_dataflow_block
        )
        return relax.DataflowVar(name, ty) if is_inside else relax.Var(name, ty)

    def _add_quantizer(self, variable: relax.Var, parameters: QuantizationParameters) -> None:
        dtype = parameters.storage_dtype
        scale = relax.const(parameters.scale)
        zero_point = relax.const(parameters.zero_point.astype(dtype))
        codes_type = relax.TensorType(variable.ty.shape, dtype)
        codes = self._variable(variable, f"{variable.name}_q", codes_type)
        reals = self._variable(variable, f"{variable.name}_dq", variable.ty)
        self._after[variable] = [
            relax.VarBinding(codes, op.quantize(variable, scale, zero_point, out_dtype=dtype)),
            relax.VarBinding(reals, op.dequantize(codes, scale, zero_point)),
        ]
        self._dequantized[variable] = reals

    def _write_layer(self, variable: relax.Var, config: QuantizeConfig) -> None:
        call = self._graph.values[variable]
        weight = self._graph.constant(call.args[1])
        if weight is None:  # a product of two activations
            return
        input_scale = float(self._parameters[call.args[0]].scale)
        bias_reader, bias_array = self._bias_of(variable)
        bias = None if bias_array is None else bias_vector(bias_array, call, variable)
        layer: IntegerLayer | EncodedLayer | None
        is_wide = self._parameters[call.args[0]].dtype == "int16"  # no kernel opens codes for it
        layer = None if is_wide else encode_layer(weight, bias, input_scale, call, config)
        if layer is not None:
            self._put_encoding(variable, layer.weight)
        else:
            layer = quantize_layer(weight, bias, input_scale, call, config)
            stored = self._decoded_weight(variable, layer.weight, layer.parameters)
            self._put_weight(variable, stored)
        if bias_reader is not None and bias_array is not None:
            self._write_bias(variable, bias_reader, bias_array, layer)

    def _write_weight_only(self, variable: relax.Var, config: QuantizeConfig) -> None:
        call = self._graph.values[variable]
        if self._graph.op(variable) not in ANCHORS:
            return
        weight = self._graph.constant(call.args[1])
        if weight is not None:
            config = weight_only_config(weight.shape, call, config)
        if weight is None:
            reason = "its weight is already compressed, or computed"
        elif weight.dtype != np.float32:
            reason = f"its weight is {weight.dtype}"
        elif not needs_encoding(config):
            axis = output_channel_axis(call, weight.ndim)
            parameters = choose_weight_parameters(weight, axis, config)
            integers = quantize_affine(weight, parameters)
            self._put_weight(variable, self._decoded_weight(variable, integers, parameters))
            return
        else:
            encoding = encode_weight(weight, call, config)
            if encoding is not None:
                self._put_encoding(variable, encoding)
                return
            reason = f"a weight of {weight.ndim} axes has no form in groups or int4"
        kind = ANCHORS[self._graph.op(variable) or ""]
        self._placement.left_float.append(LeftFloat(variable.name, kind, reason))

    def _put_encoding(self, variable: relax.Var, encoding: Encoding) -> None:
        ty = relax.TensorType(list(encoding.shape), "float32")
        stored = self._variable(variable, f"{variable.name}_weight", ty)
        decode = relax.VarBinding(stored, encoding.call(self._builder))
        self._before.setdefault(variable, []).append(decode)
        self._put_weight(variable, stored)

    def _put_weight(self, variable: relax.Var, stored: relax.Var) -> None:
        call = self._graph.values[variable]
        self._replace[variable] = relax.Call(
            call.op, [call.args[0], stored, *call.args[2:]], call.attrs, call.ty_args
        )

    def _decoded_weight(
        self, variable: relax.Var, integers: np.ndarray, parameters: QuantizationParameters
    ) -> relax.Var:
        axis = -1 if parameters.axis is None else parameters.axis
        return self._decoded(variable, "weight", integers, parameters.scale, axis)

    def _bias_of(self, variable: relax.Var) -> tuple[relax.Var | None, np.ndarray | None]:
        """The reader that adds a constant for each output channel, when it is the only reader."""
        readers = self._graph.readers[variable]
        if len(readers) != 1 or readers[0] is None or self._graph.op(readers[0]) != "relax.add":
            return None, None
        for operand in self._graph.operands(readers[0]):
            array = self._graph.constant(operand)
            if array is not None:
                fits = bias_vector(array, self._graph.values[variable], variable) is not None
                return (readers[0], array) if fits else (None, None)
        return None, None

    def _write_bias(
        self,
        layer_var: relax.Var,
        reader: relax.Var,
        array: np.ndarray,
        layer: IntegerLayer | EncodedLayer,
    ) -> None:
        assert layer.bias is not None
        assert layer.bias_scale is not None
        rank = len(shape_of(layer_var) or ())
        axis = channel_axis(self._graph.values[layer_var])
        shape = tuple(layer.bias.size if index == axis else 1 for index in range(rank))
        if array.size == layer.bias.size:  # else one number for all channels: written out for each
            axis -= rank - array.ndim
            shape = array.shape
        stored = self._decoded(reader, "bias", layer.bias.reshape(shape), layer.bias_scale, axis)
        call = self._graph.values[reader]
        arguments = [
            stored if self._graph.constant(item) is not None else item for item in call.args
        ]
        self._replace[reader] = relax.Call(call.op, arguments, call.attrs, call.ty_args)

    def _decoded(
        self,
        reader: relax.Var,
        what: str,
        integers: np.ndarray,
        scale: np.ndarray,
        axis: int,
    ) -> relax.Var:
        """Bind `dequantize(constant)` in front of its reader."""
        name = f"{reader.name}_{what}"
        variable = self._variable(reader, name, relax.TensorType(integers.shape, "float32"))
        value = op.dequantize(
            relax.const(integers),
            relax.const(scale),
            relax.const(np.zeros((), integers.dtype)),
            axis=axis,
        )
        self._before.setdefault(reader, []).append(relax.VarBinding(variable, value))
        return variable
