"""The entry points of lowering: pack or decode a weight for a target, schedule a fused function
for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..targets import Target
from .spec import SCHEDULE_ATTR, KernelSpec, WeightedSpec

if TYPE_CHECKING:
    from tvm import tirx

    from .decode_weight import DecodedWeight
    from .fused import FusedFunction

Template = Callable[["FusedFunction", Target], "tirx.PrimFunc | None"]


def pack_weight(
    spec: KernelSpec, weight: np.ndarray, target: Target
) -> tuple[WeightedSpec, np.ndarray] | None:
    """(spec', weight') of the same layer in the form the target's kernel reads; None: nothing to
    change."""
    if not isinstance(spec, WeightedSpec) or not target.is_x86:
        return None
    from .x86.pack import pack_weight as pack

    return pack(spec, weight, target)


def decode_weight(
    spec: WeightedSpec, parts: list[np.ndarray], target: Target
) -> DecodedWeight | None:
    """How to decode a weight (codes, [scales, [zero points]]) before every call of the layer, where
    only a float kernel of the target can serve it; None: not needed, or no help."""
    if not target.is_x86:
        return None
    from .decode_weight import split
    from .x86.pack import decoded_spec

    decoded = decoded_spec(spec, target)
    return None if decoded is None else split(spec, parts, decoded)


def templates(target: Target) -> list[tuple[str, Template]]:
    """Named templates for anchors on this target, tried in order; None from one means: not
    applicable."""
    if not target.is_x86:
        return []
    from .x86 import TEMPLATES

    return list(TEMPLATES)


def schedule(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """`func`, naive and fused, as a scheduled function for `target`, marked "tirx.is_scheduled".

    `SCHEDULE_ATTR` names the form that was chosen. Whatever no template takes gets the generic
    schedule.
    """
    from .default import schedule_default
    from .fused import analyse

    fused = analyse(func)
    if fused is not None and fused.anchor is not None:
        for name, template in templates(target):
            scheduled = template(fused, target)
            if scheduled is not None:
                return _finish(scheduled, func, name)
    scheduled, name = schedule_default(func, fused, target)
    return _finish(scheduled, func, name)


def _finish(scheduled: tirx.PrimFunc, func: tirx.PrimFunc, name: str) -> tirx.PrimFunc:
    attrs = dict((func.attrs or {}).items())
    return scheduled.with_attr(
        {**attrs, "tirx.noalias": True, "tirx.is_scheduled": True, SCHEDULE_ATTR: name}
    )
