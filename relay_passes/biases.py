"""Changes of the biases of a function's layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.relax import op

from .encodings import FourBit, match_encoding
from .graph import Graph, Reader, rebuild
from .ir import constant, op_name, shape_of, variable_beside
from .placement import bias_vector, channel_axis

CORRECTED = "_corrected"  # ends the name of a layer's output behind a bias that it did not have


class BiasWriter:
    """Takes numbers off the biases of layers; a layer without a bias gets one. Biases of integer
    layers are int32 codes."""

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
        variable = variable_beside(layer, f"{reader.name}_corrected", operand.ty)
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
        corrected = variable_beside(layer, f"{layer.name}{CORRECTED}", layer.ty)
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
        variable = variable_beside(layer, f"{layer.name}_bias", relax.TensorType(shape, "float32"))
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

    def write(self, replace: Mapping[relax.Var, tvm.ir.Expr] | None = None) -> relax.Function:
        """The function with these biases; `replace` gives other values to other variables."""

        def read(reader: Reader, variable: relax.Var) -> relax.Var:
            corrected = self._corrected.get(variable)
            if corrected is None or (reader is not None and reader.same_as(corrected)):
                return variable
            return corrected

        function = rebuild(
            self.graph.function,
            read=read,
            replace={**self._replace, **(replace or {})},
            before=self._before,
            after=self._after,
        )
        return relax.analysis.remove_all_unused(function)
