"""What the steps that take weights away made of each layer, and why they left layers alone.

What became of a layer that a step could change is in the step's own notes (`words_by_step`). Those
that it cannot change at all the flow takes out of its schemes and notes, with those that it reached
but had no reason to change, in `tvm_compress.left_alone` of `main` (JSON: step => layer => words).
A step that is left with no layer is refused beforehand (`tvm_compress/step_order.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import relax

from .channel_costs import missed, why_whole
from .channel_groups import find_channels
from .graph import Graph
from .ir import shape_of
from .layer_spec import layer_spec
from .low_rank import read_low_rank
from .low_rank_ranks import UNSPLIT
from .numerics.sparsity_pattern import Block
from .op_kinds import ANCHORS
from .patches import patch_shape
from .select import is_stored_weight
from .shrink import read_shrunk
from .sparsify import read_sparsified
from .sparsify_config import BLOCKS, SparsifyConfig
from .structured import read_structured
from .weight_layers import WeightLayer, read_fixed, weight_layers

LEFT_ALONE_ATTR = "tvm_compress.left_alone"
# What steps could not reach (JSON: words).
MISSED_ATTR = "tvm_compress.missed"
# How the note of a layer begins that a step put back to what it was.
PUT_BACK = ("dense: ", "whole: ")

# In the order in which the steps make sense.
_NOTES: dict[str, Callable[[tvm.IRModule], dict[str, str]]] = {
    "shrink": read_shrunk,
    "lowrank": read_low_rank,
    "structured": read_structured,
    "sparsify": read_sparsified,
}
_UNTOUCHED = {
    "shrink": "what was asked for takes none of its channels",
    "lowrank": UNSPLIT,
    "sparsify": "the total takes none of its weights",
}


def words_by_step(module: tvm.IRModule) -> dict[str, dict[str, str]]:
    """Step => layer => what it noted."""
    return {step: read(module) for step, read in _NOTES.items()}


def untouched(step: str, module: tvm.IRModule, schemes: Mapping[str, Any]) -> dict[str, str]:
    """Layer => why nothing became of it, of those in `schemes` that `step`, which has run, has not
    noted."""
    if step not in _UNTOUCHED:
        return {}
    noted = _NOTES[step](module)
    left = dict.fromkeys((name for name in schemes if name not in noted), _UNTOUCHED[step])
    if step == "shrink":
        left |= why_whole(find_channels(module["main"]), schemes, left)
    return left


def left_alone(step: str, module: tvm.IRModule, schemes: Mapping[str, Any]) -> dict[str, str]:
    """Layer => why the step leaves it; empty for steps that are not about weights."""
    if step not in _WHY_LEFT:
        return {}
    graph = Graph(module["main"])
    layers = {v.name: item for item in weight_layers(graph, schemes) for v in item.variables}
    variables = {v.name: v for v in graph.values if graph.op(v) in ANCHORS}
    found = {}
    for name in schemes:
        if name in layers:
            reason = _WHY_LEFT[step](layers[name])
        elif name in variables:
            reason = _why_no_weight(graph, variables[name])
        else:
            reason = "it is in a branch of an `If`"
        if reason:
            found[name] = reason
    return found


def with_left_alone(module: tvm.IRModule, step: str, left: Mapping[str, str]) -> tvm.IRModule:
    """`module` with a note of the layers that `step` leaves."""
    if not left:
        return module
    noted = read_left_alone(module)
    noted[step] = {**noted.get(step, {}), **left}
    module = module.clone()
    module["main"] = module["main"].with_attr(LEFT_ALONE_ATTR, json.dumps(noted))
    return module


def with_missed(
    module: tvm.IRModule, step: str, before: tvm.IRModule, schemes: Mapping[str, Any]
) -> tvm.IRModule:
    """`module`, which `step` made of `before`, with a note of what it was to reach and did not."""
    if step != "shrink":
        return module
    channels = [find_channels(item["main"]) for item in (before, module)]
    words = missed(channels[0], channels[1], schemes, read_shrunk(module))
    if not words:
        return module
    module = module.clone()
    noted = json.dumps([*read_missed(module), *words])
    module["main"] = module["main"].with_attr(MISSED_ATTR, noted)
    return module


def read_missed(module: tvm.IRModule) -> tuple[str, ...]:
    """What steps did not reach, in words."""
    return tuple(json.loads(str((module["main"].attrs or {}).get(MISSED_ATTR, "[]"))))


def read_left_alone(module: tvm.IRModule) -> dict[str, dict[str, str]]:
    """Step => layer => why the step left it."""
    noted = json.loads(str((module["main"].attrs or {}).get(LEFT_ALONE_ATTR, "{}")))
    return {str(step): dict(words) for step, words in noted.items()}


def _why_no_weight(graph: Graph, variable: relax.Var) -> str:
    """Of a layer that `weight_layers` passes over."""
    call = graph.values[variable]
    if variable.name in read_fixed(graph.function):
        return "its weight is a fixed transform"
    if graph.constant(call.args[1]) is None:
        stored = is_stored_weight(graph, call.args[1])
        return "its weight is compressed already" if stored else "both operands are computed"
    if patch_shape(call, shape_of(call.args[1]) or ()) is None:
        is_transposed = str(ANCHORS[graph.op(variable) or ""]).endswith("transpose")
        return "a transposed convolution" if is_transposed else "its weight has a batch axis"
    return "its weight is not float32"


def _why_not_sparse(layer: WeightLayer[SparsifyConfig]) -> str:
    asked = layer.config.pattern or BLOCKS
    if layer.outputs == 1 < asked.outputs:
        kind = "depthwise: " if layer.patches.groups > 1 else ""
        return f"{kind}one output a group, where {asked.words} need several"
    pattern = layer.pattern(asked)
    if pattern is None:
        kernel = "x".join(map(str, layer.patches.kernel)) or "1x1"
        return f"a {kernel} kernel has no {asked.words}"
    inputs, outputs = layer.matrices().shape[1:]
    if isinstance(pattern, Block) and pattern.outputs >= outputs and pattern.inputs >= inputs > 1:
        return f"one of the {pattern.words} holds all its {outputs} x {inputs} weights"
    return ""


def _why_not_split(layer: WeightLayer[Any]) -> str:
    if layer.outputs == 1 and layer.patches.groups > 1:
        return "depthwise: there is nothing to split"
    return "" if layer_spec(layer.call) is not None else "no kernel is known for it"


def _why_not_structured(layer: WeightLayer[Any]) -> str:
    return "" if str(layer.call.op.name).endswith("matmul") else "only linear layers are changed"


_WHY_LEFT: dict[str, Callable[[WeightLayer[Any]], str]] = {
    "lowrank": _why_not_split,
    "sparsify": _why_not_sparse,
    "structured": _why_not_structured,
}
