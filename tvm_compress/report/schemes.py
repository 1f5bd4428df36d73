"""What was done to each layer, in words, read off the compressed graph itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .rows import StepEffect

if TYPE_CHECKING:
    import tvm

    from ..recipe import Step

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
    """Layer name => what steps did to its shape and weights, or why they left it, in words, in the
    steps' order."""
    from ..relay_passes.step_notes import read_left_alone, words_by_step

    changes: dict[str, list[str]] = {}
    left = read_left_alone(module)
    for step, noted in words_by_step(module).items():
        for name, words in noted.items():
            changes.setdefault(name, []).append(words)
        for name, reason in left.get(step, {}).items():
            changes.setdefault(name, []).append(f"left by {step}: {reason}")
    return {name: "; ".join(words) for name, words in changes.items()}


def describe_effects(
    module: tvm.IRModule, steps: Iterable[Step], firsts: Mapping[str, str]
) -> tuple[StepEffect, ...]:
    """What each of the `steps` that take weights away did, the calls of a loop (`firsts`: name =>
    the first of them) as one layer."""
    from ..relay_passes.step_notes import PUT_BACK, read_left_alone, words_by_step

    left_alone = read_left_alone(module)
    shares: dict[str, list[str]] = {}
    for item in steps:
        shares.setdefault(item.name, []).extend(_share_of(item))
    effects = []
    for step, noted in words_by_step(module).items():
        if step not in shares:
            continue
        words = {firsts.get(name, name): text for name, text in noted.items()}
        left = {
            firsts.get(name, name): reason
            for name, reason in left_alone.get(step, {}).items()
            if firsts.get(name, name) not in words
        }
        back = {name: text for name, text in words.items() if text.startswith(PUT_BACK)}
        effects.append(
            StepEffect(
                step=step,
                changed=len(words) - len(back),
                put_back=len(back),
                left=len(left),
                put_back_because=_example(back),
                left_because=_example(left),
                share_of=", ".join(dict.fromkeys(shares[step])),
            )
        )
    return tuple(effects)


def _share_of(step: Step) -> tuple[str, ...]:
    """The selectors of a step that is to reach a share of its layers together; () for all layers,
    or where each has a share of its own."""
    from ..relay_passes.low_rank_config import Network
    from ..relay_passes.shrink_config import Operations

    asked = getattr(step.config, "keep", getattr(step.config, "rank", None))
    is_total = isinstance(asked, Network | Operations)
    return step.layers if is_total and "all" not in step.layers else ()


def _example(reasons: Mapping[str, str]) -> str:
    """The reason that most layers have, with the first of them."""
    if not reasons:
        return ""
    texts = list(reasons.values())
    common = max(dict.fromkeys(texts), key=texts.count)
    return f"{next(name for name, text in reasons.items() if text == common)}, {common}"


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
