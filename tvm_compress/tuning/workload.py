"""A naive, fused function as a text key: equal for functions that schedule alike.

Names do not matter, nor do the values of zero points, clip bounds and padding: they come from
calibration and change no schedule, so models that differ in them share a record. Weights and scales
are arguments. What a kernel's spec says (shapes, layouts, dtypes) is part of the key.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..schedules.choice import digest

if TYPE_CHECKING:
    from tvm import ir, tirx

    from ..schedules.fused import Stage

# Fields of kernel specs whose exact value changes no schedule; zero or not may.
_CALIBRATED = ("pad_value", "weight_zero_point", "a_zero_point", "b_zero_point")
_CONDITIONS = ("EQ", "NE", "LT", "LE", "GT", "GE", "And", "Or", "Not")


def workload_key(func: tirx.PrimFunc) -> str | None:
    """The key of a function as it arrives at `ScheduleKernels`; None: nothing to tune in it.

    Stable across processes and models. The text it stands for is `workload_text`.
    """
    text = workload_text(func)
    return None if text is None else digest(text)


def workload_text(func: tirx.PrimFunc) -> str | None:
    """What the key is the digest of: arguments and stages of the function, one a line."""
    from ..schedules.fused import analyse

    fused = analyse(func)
    if fused is None or fused.anchor is None:
        return None
    names = _Names()
    lines = [names.buffer(param) for param in func.params]
    try:
        for stage in fused.stages:
            lines.append(_stage(stage, names))
    except NotImplementedError:
        return None
    return "\n".join(lines)


class _Names:
    """Variables and buffers numbered in the order in which they appear."""

    def __init__(self) -> None:
        self._variables: dict[Any, str] = {}
        self._buffers: dict[Any, str] = {}

    def buffer(self, buffer: tirx.Buffer) -> str:
        if buffer not in self._buffers:
            shape = "x".join(str(side) for side in buffer.shape)
            self._buffers[buffer] = f"b{len(self._buffers)}:{shape}:{buffer.dtype}"
        return self._buffers[buffer]

    def variable(self, variable: tirx.Var) -> str:
        return self._variables.setdefault(variable, f"v{len(self._variables)}")


def _stage(stage: Stage, names: _Names) -> str:
    variables = " ".join(
        f"{names.variable(variable)}<{extent}{'r' if axis in stage.reduction else ''}"
        for axis, (variable, extent) in enumerate(zip(stage.variables, stage.extents, strict=True))
    )
    parts = [
        variables,
        names.buffer(stage.buffer),
        ",".join(_text(index, names, exact=True) for index in stage.indices),
        _text(stage.value, names, exact=False),
    ]
    if stage.init is not None:
        parts.append(_text(stage.init, names, exact=True))
    if stage.spec is not None:
        fields = json.loads(stage.spec.to_json())
        for name in _CALIBRATED:
            if name in fields:
                fields[name] = int(fields[name] != 0)
        parts.append(json.dumps(fields, sort_keys=True))
    return " | ".join(parts)


def _text(expr: ir.Expr, names: _Names, exact: bool) -> str:
    """An expression as text. Not `exact`: numbers outside of indices and conditions are left out,
    but for their dtype."""
    from tvm import ir, tirx

    kind = type(expr).__name__
    if isinstance(expr, tirx.Var):
        return names.variable(expr)
    if isinstance(expr, ir.TensorLoad):
        indices = ",".join(_text(index, names, exact=True) for index in expr.indices)
        return f"{names.buffer(expr.source)}[{indices}]"
    if isinstance(expr, (tirx.IntImm, tirx.FloatImm)):
        return f"{expr.value if exact else '#'}:{expr.ty.dtype}"
    if isinstance(expr, tirx.Cast):
        return f"cast({expr.ty.dtype},{_text(expr.value, names, exact)})"
    if isinstance(expr, tirx.Select):
        children, conditions = [expr.condition, expr.true_value, expr.false_value], 1
    elif isinstance(expr, ir.Call):
        kind = str(expr.op.name)
        children = list(expr.args)
        conditions = int(kind.endswith("if_then_else"))
    elif hasattr(expr, "a"):
        children, conditions = [expr.a, *([expr.b] if hasattr(expr, "b") else [])], 0
        exact = exact or kind in _CONDITIONS
        if kind == "Sub" and not exact and isinstance(expr.b, (tirx.IntImm, tirx.FloatImm)):
            kind = "Add"  # of a zero point below zero
    elif isinstance(expr, ir.StringImm):
        return json.dumps(str(expr.value))
    else:
        raise NotImplementedError(f"expression {kind}")
    texts = [_text(c, names, exact or i < conditions) for i, c in enumerate(children)]
    return f"{kind}({','.join(texts)})"
