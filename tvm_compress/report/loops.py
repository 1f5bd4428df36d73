"""Calls that share one weight: the steps of an unrolled loop are one row of a report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .rows import LayerRow, OtherKernelRow

if TYPE_CHECKING:
    import tvm


def loop_firsts(module: tvm.IRModule) -> dict[str, str]:
    """Layer name => the first layer of the same operator, weight and output shape: itself, but for
    the later steps of a loop."""
    from ..relay_passes.graph import Graph
    from ..relay_passes.ir import shape_of
    from ..relay_passes.op_kinds import ANCHORS

    graph = Graph(module["main"])
    firsts: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for variable in graph.values:
        operator = graph.op(variable)
        if operator not in ANCHORS:
            continue
        weight = _constants_of(graph, graph.values[variable].args[1])
        firsts[variable.name] = variable.name
        if weight is not None:
            key = (operator, shape_of(variable), weight)
            firsts[variable.name] = seen.setdefault(key, variable.name)
    return firsts


def _constants_of(graph: Any, expr: Any) -> tuple[Any, ...] | None:
    """What a stored weight is made of, operators and constants; `None` for a computed tensor."""
    import tvm
    from tvm import relax

    from ..relay_passes.ir import constant

    array = constant(expr)
    if array is not None:
        return (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
    if isinstance(expr, relax.Var):
        expr = graph.values.get(expr)
    if not isinstance(expr, tvm.ir.Call):
        return None
    parts = [_constants_of(graph, item) for item in expr.args if not isinstance(item, relax.Tuple)]
    known = tuple(part for part in parts if part is not None)
    return (str(expr.op), *known) if known and len(known) == len(parts) else None


def joined(rows: Sequence[LayerRow], firsts: Mapping[str, str]) -> tuple[LayerRow, ...]:
    """One row for the calls of each loop, with the sums of their costs and the worst of their
    errors."""
    groups: dict[str, list[LayerRow]] = {}
    for row in rows:
        groups.setdefault(firsts.get(row.name, row.name), []).append(row)
    return tuple(group[0] if len(group) == 1 else _one_row(group) for group in groups.values())


def _one_row(rows: Sequence[LayerRow]) -> LayerRow:
    def known(key: str) -> list[Any]:
        return [value for row in rows if (value := getattr(row, key)) is not None]

    added: dict[str, Any] = {
        key: sum(values) if (values := known(key)) else None
        for key in (
            "macs", "macs_after", "parameters", "bytes_before", "bytes_after", "time_before_us",
            "time_after_us", "time_share", "instructions", "instructions_before",
        )
    }  # fmt: skip
    worst: dict[str, Any] = {
        key: min(known(key), default=None) for key in ("sqnr_db", "own_sqnr_db", "cosine")
    }
    return replace(
        rows[0],
        **added,
        **worst,
        max_abs_error=max(known("max_abs_error"), default=None),
        kernels=tuple(dict.fromkeys(name for row in rows for name in row.kernels)),
        calls=len(rows),
    )


def joined_others(rows: Sequence[OtherKernelRow]) -> tuple[OtherKernelRow, ...]:
    """One row for the calls of each kernel."""
    groups: dict[str, list[OtherKernelRow]] = {}
    for row in rows:
        groups.setdefault(row.kernel, []).append(row)
    return tuple(
        replace(
            group[0],
            time_us=_sum(row.time_us for row in group),
            time_share=_sum(row.time_share for row in group),
            sqnr_db=min((r.sqnr_db for r in group if r.sqnr_db is not None), default=None),
            calls=len(group),
        )
        for group in groups.values()
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
