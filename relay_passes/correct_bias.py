"""b => b - (mean of conv(x, decode(w)) - mean of conv(x, w)) for each output channel

Bias correction (Nagel et al. 2019, section 4.2, with means from calibration as in appendix D):
quantised weights shift the mean of each output channel by ΔW·E[x], and the bias takes the shift
back. Runs after the weights were compressed, with statistics of the float original. Costs nothing
at run time; a layer without a bias gets one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.relax import op

from ..errors import DataError
from .encodings import FourBit, match_encoding
from .graph import Graph, Reader, rebuild
from .ir import constant, op_name, shape_of
from .numerics.statistics import Statistics
from .observations import Observations
from .op_kinds import ANCHORS
from .patches import patch_shape, weight_matrix
from .placement import bias_vector, channel_axis

CORRECTED = "_corrected"  # ends the name of a layer's output behind a bias that it did not have


@dataclass(frozen=True)
class CorrectBiasConfig:
    """Correct the selected layers' biases for what their compressed weights do to the mean."""


def observe(module: tvm.IRModule, schemes: Mapping[str, CorrectBiasConfig]) -> Observations:
    """Means of the layers' input patches and of their output channels, on the float module."""
    graph = Graph(module["main"])
    layers = [item for item in graph.values if item.name in schemes and _has_patches(graph, item)]
    return Observations(
        channels={item.name: channel_axis(graph.values[item]) for item in layers},
        first_moments=frozenset(item.name for item in layers),
    )


def _has_patches(graph: Graph, variable: relax.Var) -> bool:
    if graph.op(variable) not in ANCHORS:
        return False
    call = graph.values[variable]
    is_weight = not graph.tensor_operands(variable)[1:]
    return is_weight and patch_shape(call, shape_of(call.args[1]) or ()) is not None


@tvm.transform.module_pass(opt_level=0, name="CorrectBias")
class CorrectBias:
    """Correct the biases of the layers in `schemes` that have a compressed weight.

    `statistics` is what `observe` asks for, gathered on the module before its weights were
    compressed. Transposed convolutions and weights with a batch axis are left alone, and so are the
    steps of a loop: one bias serves all of them, and none has the mean of all.
    Raises `DataError` when statistics are missing.
    """

    def __init__(self, schemes: Mapping[str, CorrectBiasConfig], statistics: Statistics) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        graph = Graph(module["main"])
        writer = _Writer(graph, module)
        layers = [
            item for item in graph.values if item.name in self.schemes and graph.op(item) in ANCHORS
        ]
        kernels = Counter(_kernel(graph, layer) for layer in layers)
        for layer in layers:
            if kernels[_kernel(graph, layer)] == 1:
                shift = _mean_shift(graph, layer, module, self.statistics)
                if shift is not None:
                    writer.subtract(layer, shift)
        module = module.clone()
        module["main"] = writer.write()
        return relax.transform.Normalize()(module)


def _kernel(graph: Graph, layer: relax.Var) -> Hashable:
    """Equal for layers with the same scale in and the same weights: the steps of a loop."""
    found: list[Hashable] = []
    for operand in graph.values[layer].args[:2]:
        value = graph.values.get(operand) if isinstance(operand, relax.Var) else None
        if value is None or not _is_decoded(value):
            return layer
        arrays = [constant(item) for item in value.args]
        found += [None if array is None else (array.shape, array.tobytes()) for array in arrays]
    return tuple(found)


def _is_decoded(value: tvm.ir.Expr) -> bool:
    """Whether it is a weight or a tensor of codes as a float: dequantised, or in an encoding."""
    is_function = isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.GlobalVar)
    return is_function or op_name(value) == "relax.dequantize"


def _mean_shift(
    graph: Graph, variable: relax.Var, module: tvm.IRModule, statistics: Statistics
) -> NDArray[np.float64] | None:
    """How much further each output channel's mean lies than the float original's. [O]"""
    call = graph.values[variable]
    weight = decoded_weight(graph, call.args[1], module)
    if weight is None or patch_shape(call, weight.shape) is None:
        return None
    observed = statistics.channels.get(variable.name)
    moments = statistics.moments.get(variable.name)
    if observed is None or moments is None:
        raise DataError(
            f"the calibration statistics lack the means of layer {variable.name!r}; calibrate the "
            "float module with what `correct_bias.observe` lists"
        )
    rows = weight_matrix(weight, call).astype(np.float64)  # [G, O/G, K]
    mean = np.einsum("gok,gk->go", rows, moments.mean).reshape(-1)
    return mean - observed.mean


def decoded_weight(
    graph: Graph, weight: tvm.ir.Expr, module: tvm.IRModule
) -> NDArray[np.float32] | None:
    """The float values of a compressed weight; `None` for a plain constant or a computed tensor."""
    value = graph.values.get(weight) if isinstance(weight, relax.Var) else weight
    if value is None:
        return None
    if op_name(value) == "relax.dequantize":
        return _dequantized(value)
    encoding = match_encoding(value, module)
    return None if encoding is None else encoding.decode()


def _dequantized(call: relax.Call) -> NDArray[np.float32] | None:
    codes, scale, zero_point = (constant(item) for item in call.args)
    if codes is None or scale is None or zero_point is None:
        return None
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[int(call.attrs.axis)] = scale.size
    scale = scale.reshape(shape)
    zero_point = zero_point.reshape(shape) if zero_point.size > 1 else zero_point
    return (codes.astype(np.int32) - zero_point.astype(np.int32)).astype(np.float32) * scale


class _Writer:
    def __init__(self, graph: Graph, module: tvm.IRModule) -> None:
        self.graph = graph
        self._module = module
        self._replace: dict[relax.Var, tvm.ir.Expr] = {}
        self._before: dict[relax.Var, list[relax.VarBinding]] = {}
        self._after: dict[relax.Var, list[relax.VarBinding]] = {}
        self._corrected: dict[relax.Var, relax.Var] = {}

    def subtract(self, layer: relax.Var, shift: NDArray[np.float64]) -> None:
        """Take `shift` [O] off the layer's bias, or give the layer the bias -shift."""
        readers = self.graph.readers[layer]
        reader = readers[0] if len(readers) == 1 else None
        if reader is not None and self.graph.op(reader) == "relax.add":
            call = self.graph.values[reader]
            for index, operand in enumerate(call.args):
                corrected = self._corrected_bias(layer, reader, operand, shift)
                if corrected is not None:
                    arguments = [*call.args[:index], corrected, *call.args[index + 1 :]]
                    self._replace[reader] = relax.Call(call.op, arguments, call.attrs, call.ty_args)
                    return
        self._insert(layer, (-shift).astype(np.float32))

    def _corrected_bias(
        self, layer: relax.Var, reader: relax.Var, operand: tvm.ir.Expr, shift: NDArray[np.float64]
    ) -> tvm.ir.Expr | None:
        """The bias without the shift, stored as it was; `None` if `operand` is not a bias."""
        call = self.graph.values[layer]
        stored = self.graph.values.get(operand) if isinstance(operand, relax.Var) else operand
        if stored is None:
            return None
        array = self.graph.constant(operand)
        if array is not None:
            if bias_vector(array, call, layer) is None:
                return None
            if array.size == shift.size:
                return relax.const((array - shift.reshape(array.shape)).astype(np.float32))
            return None
        if op_name(stored) != "relax.dequantize":
            return None
        integers, scale, zero_point = (constant(item) for item in stored.args)
        if integers is None or scale is None or zero_point is None or integers.dtype != np.int32:
            return None
        step = np.broadcast_to(scale.reshape(-1), shift.shape).astype(np.float64)
        steps = np.rint(shift / step).reshape(integers.shape)
        limits = np.iinfo(np.int32)
        corrected = np.clip(integers - steps, limits.min, limits.max).astype(np.int32)
        variable = _like(layer, f"{reader.name}_corrected", operand.ty)
        value = op.dequantize(
            relax.const(corrected), stored.args[1], stored.args[2], axis=int(stored.attrs.axis)
        )
        self._before.setdefault(reader, []).append(relax.VarBinding(variable, value))
        return variable

    def _insert(self, layer: relax.Var, bias: NDArray[np.float32]) -> None:
        call = self.graph.values[layer]
        rank, axis = len(shape_of(layer) or ()), channel_axis(call)
        shape = tuple(bias.size if index == axis else 1 for index in range(rank))
        stored = self._stored_bias(layer, bias, shape, axis)
        corrected = _like(layer, f"{layer.name}{CORRECTED}", layer.ty)
        self._after.setdefault(layer, []).extend(
            [*stored[1], relax.VarBinding(corrected, op.add(layer, stored[0]))]
        )
        self._corrected[layer] = corrected

    def _stored_bias(
        self, layer: relax.Var, bias: NDArray[np.float32], shape: tuple[int, ...], axis: int
    ) -> tuple[tvm.ir.Expr, list[relax.VarBinding]]:
        """int32 at input scale * weight scale for an integer layer, else a float constant."""
        scale = self._sum_scale(layer)
        if scale is None:
            return relax.const(bias.reshape(shape)), []
        steps = np.broadcast_to(scale, bias.shape).astype(np.float32)
        limits = np.iinfo(np.int32)
        integers = np.clip(np.rint(bias / steps), limits.min, limits.max).astype(np.int32)
        variable = _like(layer, f"{layer.name}_bias", relax.TensorType(shape, "float32"))
        value = op.dequantize(
            relax.const(integers.reshape(shape)),
            relax.const(steps),
            relax.const(np.zeros((), np.int32)),
            axis=axis,
        )
        return variable, [relax.VarBinding(variable, value)]

    def _sum_scale(self, layer: relax.Var) -> NDArray[np.float32] | None:
        """Scale of the layer's integer sums; `None` for a layer with a float input."""
        data, weight = self.graph.values[layer].args[:2]
        scales = []
        for operand in (data, weight):
            value = self.graph.values.get(operand) if isinstance(operand, relax.Var) else None
            encoding = None if value is None else match_encoding(value, self._module)
            if isinstance(encoding, FourBit):
                scales.append(encoding.scales)
                continue
            if value is None or op_name(value) != "relax.dequantize":
                return None
            scale = constant(value.args[1])
            if scale is None:
                return None
            scales.append(scale.reshape(-1))
        return scales[0] * scales[1]

    def write(self) -> relax.Function:
        def read(reader: Reader, variable: relax.Var) -> relax.Var:
            corrected = self._corrected.get(variable)
            if corrected is None or (reader is not None and reader.same_as(corrected)):
                return variable
            return corrected

        function = rebuild(
            self.graph.function,
            read=read,
            replace=self._replace,
            before=self._before,
            after=self._after,
        )
        return relax.analysis.remove_all_unused(function)


def _like(variable: relax.Var, name: str, ty: relax.TensorType) -> relax.Var:
    is_inside = isinstance(variable, relax.DataflowVar)
    return relax.DataflowVar(name, ty) if is_inside else relax.Var(name, ty)
