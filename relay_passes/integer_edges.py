"""main(x float) { quantize(x, s, z) ... dequantize(q, t, w) } => main(x_q int8) { ... q }.

A microcontroller's sensor delivers integers and its program reads integers, so a float copy of
either would be memory and time for nothing. Applies to an input that only quantisers of one scale
read, and to an output that is dequantised from codes of one scale; other inputs and outputs stay
float. What the codes mean is noted on `main` (`EDGES_ATTR`), also for models that came with integer
inputs and outputs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr

from .canonicalize.rewrite import Rewriter, Var
from .graph import Graph
from .ir import constant, dtype_of, op_name
from .lower import REQUANTIZE_ATTR

EDGES_ATTR = "tvm_compress.edges"


@dataclass(frozen=True)
class Edge:
    """An input or output as the kernels see it: real value = scale * (code - zero_point).

    `scale` None: the numbers are what they are. `converted`: the model itself has floats there.
    `ties_away`: its quantisers round halves away from zero, as TensorFlow Lite's do, not to even.
    """

    dtype: str
    scale: float | None = None
    zero_point: int = 0
    converted: bool = False
    ties_away: bool = False


@tvm.transform.module_pass(opt_level=0, name="IntegerEdges")
class IntegerEdges:
    """Works on `main` of the graph form."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        rewriter = _Edges(module["main"])
        function = rewriter.run()
        attributes = dict(module["main"].attrs or {})
        away = attributes.get(REQUANTIZE_ATTR) == "tflite"
        noted = [
            [asdict(replace(edge, ties_away=away)) for edge in side]
            for side in (rewriter.inputs, rewriter.outputs)
        ]
        function = function.with_attr("global_symbol", "main")
        result = module.clone()
        result["main"] = function.with_attr(EDGES_ATTR, json.dumps(noted))
        return result


def edges_of(module: tvm.IRModule) -> tuple[tuple[Edge, ...], tuple[Edge, ...]]:
    """Inputs and outputs of a module that `IntegerEdges` has seen."""
    inputs, outputs = json.loads(str(module["main"].attrs[EDGES_ATTR]))
    return tuple(Edge(**edge) for edge in inputs), tuple(Edge(**edge) for edge in outputs)


class _Edges(Rewriter):
    def __init__(self, function: relax.Function) -> None:
        super().__init__(function)
        self._graph = Graph(function)
        self.inputs = [self._input(param) for param in function.params]
        body = function.body.body
        results = list(body.fields) if isinstance(body, relax.Tuple) else [body]
        self.outputs = [self._output(result) for result in results]
        self._params = {
            param: relax.Var(param.name, relax.TensorType(param.ty.shape, edge.dtype))
            for param, edge in zip(function.params, self.inputs, strict=True)
            if edge.converted
        }
        self._returned = {
            result for result, edge in zip(results, self.outputs, strict=True) if edge.converted
        }

    def params(self) -> list[Var]:
        """Codes in the place of floats."""
        return [self._params.get(param, param) for param in self._function.params]

    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        if op_name(value) == "relax.quantize" and value.args[0] in self._params:
            return self._params[value.args[0]]
        if var in self._returned:
            return value.args[0]
        return None

    def _input(self, param: Var) -> Edge:
        readers = [r for r in self._graph.readers[param] if r is not None]
        is_float = dtype_of(param) == "float32"
        wanted = "relax.quantize" if is_float else "relax.dequantize"
        calls = [self._graph.values[reader] for reader in readers]
        found = {
            _parameters(call) if op_name(call) == wanted and call.args[0].same_as(param) else None
            for call in calls
        }
        only = found.pop() if len(found) == 1 else None
        is_all = len(readers) == len(self._graph.readers[param])
        if only is None or not (is_all or not is_float):
            return Edge(dtype_of(param))
        dtype = dtype_of(readers[0]) if is_float else dtype_of(param)
        return Edge(dtype, only[0], only[1], converted=is_float)

    def _output(self, result: Expr) -> Edge:
        value = self._graph.values.get(result)
        if value is None:
            return Edge(dtype_of(result))
        is_float = dtype_of(result) == "float32"
        if op_name(value) != ("relax.dequantize" if is_float else "relax.quantize"):
            return Edge(dtype_of(result))
        only = _parameters(value)
        codes = value.args[0]
        is_own = not is_float or (
            self._graph.readers[result] == [None] and isinstance(codes, relax.Var)
        )
        if only is None or not is_own:
            return Edge(dtype_of(result))
        dtype = dtype_of(codes) if is_float else dtype_of(result)
        return Edge(dtype, only[0], only[1], converted=is_float)


def _parameters(call: Expr) -> tuple[float, int] | None:
    """Scale and zero point of a (de)quantiser with one of each."""
    scale, zero_point = constant(call.args[1]), constant(call.args[2])
    if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
        return None
    return float(np.float32(scale.reshape(()))), int(zero_point.reshape(()))
