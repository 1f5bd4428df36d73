"""What was done to each layer, in words, read off the compressed graph itself."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

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


def describe_schemes(module: tvm.IRModule) -> dict[str, str]:
    """Layer name => weights x activations, e.g. `int8/channel × int8`, `int4/group 32 × float`."""
    from ..relay_passes.branches import functions_in_order
    from ..relay_passes.graph import Graph
    from ..relay_passes.op_kinds import ANCHORS

    schemes = {}
    graphs = [Graph(module[global_var]) for global_var in functions_in_order(module)]
    for owner, variable in [(graph, item) for graph in graphs for item in graph.values]:
        if owner.op(variable) not in ANCHORS:
            continue
        call = owner.values[variable]
        weights = _stored(module, owner, call.args[1])
        activations = _codes(owner, call.args[0])
        is_plain = weights is None and activations is None
        schemes[variable.name] = (
            FLOAT if is_plain else f"{weights or activations or FLOAT} × {activations or FLOAT}"
        )
    return schemes


def describe_changes(module: tvm.IRModule) -> dict[str, str]:
    """Layer name => what steps did to its shape and weights, in words, in the steps' order."""
    changes: dict[str, str] = {}
    for noted in _words_by_step(module).values():
        for name, words in noted.items():
            changes[name] = "; ".join(filter(None, [changes.get(name), words]))
    return changes


def steps_left_alone(module: tvm.IRModule, steps: Collection[str]) -> list[str]:
    """A line for each of the `steps` that left layers as they were, with one of the reasons."""
    lines = []
    for step, words in _words_by_step(module).items():
        if step not in steps:
            continue
        left = {n: text for n, text in words.items() if text.startswith(("dense: ", "whole: "))}
        if not words:
            lines.append(f"{step} changed nothing: no layer that it is for has what it asks for")
        elif left:
            name, reason = next(iter(left.items()))
            lines.append(
                f"{step}: {len(left)} of {len(words)} layers stay as they were, such as {name}, "
                f"{reason}"
            )
    return lines


def _words_by_step(module: tvm.IRModule) -> dict[str, dict[str, str]]:
    """Step => layer => what it noted, in the order in which the steps make sense."""
    from ..relay_passes.low_rank import read_low_rank
    from ..relay_passes.shrink import read_shrunk
    from ..relay_passes.sparsify import read_sparsified
    from ..relay_passes.structured import read_structured

    return {
        "shrink": read_shrunk(module),
        "lowrank": read_low_rank(module),
        "structured": read_structured(module),
        "sparsify": read_sparsified(module),
    }


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

    from ..relay_passes.encodings import match_encoding
    from ..relay_passes.ir import op_name, shape_of

    value = _behind_moves(graph, weight)
    if not isinstance(value, tvm.ir.Call):
        return None
    if op_name(value) == "relax.dequantize":
        codes = graph.constant(value.args[0])
        if codes is None:
            return None
        scales = math.prod(shape_of(value.args[1]) or ())
        return f"{_integer_type(codes)}/{'channel' if scales > 1 else 'tensor'}"
    encoding = match_encoding(value, module)
    return None if encoding is None else encoding.words


def _integer_type(codes: np.ndarray) -> str:
    """The dtype; for symmetric int8 codes that stay within fewer bits, the type of those bits."""
    if codes.dtype != "int8":
        return str(codes.dtype)
    largest = int(np.abs(codes.astype(np.int32)).max(initial=0))
    return next((f"int{bits}" for bits in (4, 5, 6, 7) if largest < 2 ** (bits - 1)), "int8")


def _codes(graph: Any, data: Any) -> str | None:
    """Integer type that an operand is handed over in, `None` for float."""
    import tvm

    from ..relay_passes.ir import dtype_of, op_name

    value = _behind_moves(graph, data)
    if isinstance(value, tvm.ir.Call) and op_name(value) == "relax.dequantize":
        return dtype_of(value.args[0])
    return None
