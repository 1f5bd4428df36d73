"""What was done to each layer, in words, read off the compressed graph itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm

FLOAT = "float"
MOVES = {
    "relax.reshape",
    "relax.permute_dims",
    "relax.expand_dims",
    "relax.squeeze",
    "relax.astype",
}
ENCODING_ATTR = "tvm_compress.encoding"


def describe_schemes(module: tvm.IRModule) -> dict[str, str]:
    """Layer name => e.g. `int8 weights per channel, int8 activations`."""
    from ..relay_passes.graph import Graph
    from ..relay_passes.op_kinds import ANCHORS

    graph = Graph(module["main"])
    schemes = {}
    for variable in graph.values:
        if graph.op(variable) not in ANCHORS:
            continue
        call = graph.values[variable]
        weights = _stored(module, graph, call.args[1])
        activations = _codes(graph, call.args[0])
        words = [weights] if weights else []
        if activations:
            words.append(f"{activations} activations")
        schemes[variable.name] = ", ".join(words) or FLOAT
    return schemes


def _behind_moves(graph: Any, expr: Any) -> Any:
    from tvm import relax

    from ..relay_passes.ir import op_name

    while True:
        value = graph.values.get(expr) if isinstance(expr, relax.Var) else expr
        if value is None:
            return expr
        if isinstance(value, relax.Var):
            expr = value
        elif op_name(value) in MOVES:
            expr = value.args[0]
        else:
            return value


def _stored(module: tvm.IRModule, graph: Any, weight: Any) -> str | None:
    """How a weight is stored, `None` for a plain float constant or a computed operand."""
    import math

    import tvm

    from ..relay_passes.ir import dtype_of, op_name, shape_of

    value = _behind_moves(graph, weight)
    if not isinstance(value, tvm.ir.Call):
        return None
    if op_name(value) == "relax.dequantize":
        codes = value.args[0]
        if graph.constant(codes) is None:
            return None
        scales = math.prod(shape_of(value.args[1]) or ())
        how = "per channel" if scales > 1 else "per tensor"
        return f"{dtype_of(codes)} weights {how}"
    if isinstance(value.op, tvm.ir.GlobalVar):
        kind = (module[value.op].attrs or {}).get(ENCODING_ATTR)
        return None if kind is None else f"{str(kind).replace('_', ' ')} weights"
    return None


def _codes(graph: Any, data: Any) -> str | None:
    """Integer type that an operand is handed over in, `None` for float."""
    import tvm

    from ..relay_passes.ir import dtype_of, op_name

    value = _behind_moves(graph, data)
    if isinstance(value, tvm.ir.Call) and op_name(value) == "relax.dequantize":
        return dtype_of(value.args[0])
    return None
