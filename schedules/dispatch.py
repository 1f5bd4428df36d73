"""The entry points of lowering: pack or decode a weight for a target, schedule a fused function
for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..targets import Target
from .choice import CHOICE_ATTR, Choice, SearchSpace, choice_to_json
from .spec import (
    SCHEDULE_ATTR,
    Conv2dSpec,
    KernelSpec,
    MatmulSpec,
    SparseConv2dSpec,
    SparseRowsSpec,
    WeightedSpec,
)

if TYPE_CHECKING:
    from tvm import tirx

    from .decode_weight import DecodedWeight
    from .fused import FusedFunction
    from .sparse_form import SparseForm
    from .template import Template, WrittenKernel


def pack_weight(
    spec: KernelSpec, weight: np.ndarray, target: Target
) -> tuple[WeightedSpec, np.ndarray] | None:
    """(spec', weight') of the same layer in the form the target's kernel reads; None: nothing to
    change."""
    if not isinstance(spec, WeightedSpec):
        return None
    if target.has("dsp"):
        from .arm.pack import pack_weight as pack
    elif target.is_x86:
        from .x86.pack import pack_weight as pack
    elif target.has("neon"):
        from .neon.pack import pack_weight as pack
    elif target.has("rvv"):
        from .riscv.pack import pack_weight as pack
    elif is_scalar(target):
        from .scalar.pack import pack_weight as pack
    else:
        return None
    return pack(spec, weight, target)


def is_scalar(target: Target) -> bool:
    """Whether the target has neither vectors nor the DSP extension."""
    return (target.has("thumb") and not target.has("dsp")) or (
        target.has("riscv") and not target.has("rvv")
    )


def pack_parts(
    spec: KernelSpec, parts: list[np.ndarray], target: Target
) -> tuple[WeightedSpec, list[np.ndarray]] | None:
    """The same for all parts of a stored weight: codes, [tables], [scales, [zero points]]."""
    if not isinstance(spec, WeightedSpec):
        return None
    if target.is_x86 and spec.is_integer and spec.weight_dtype == "int4":
        from .x86.pack_nibbles import pack_parts as pack

        return pack(spec, parts, target)
    if target.has("dsp") and spec.is_integer and spec.group_size and not spec.table_channels:
        from .arm.pack import pack_parts as pack_groups

        return pack_groups(spec, parts, target)
    packed = pack_weight(spec, parts[0], target)
    return None if packed is None else (packed[0], [packed[1], *parts[1:]])


def sparse_parts(
    spec: KernelSpec, parts: list[np.ndarray], target: Target, chosen: str | None = None
) -> tuple[SparseConv2dSpec | SparseRowsSpec, list[np.ndarray]] | None:
    """The layer without its zeros and what its kernel reads; None: there are too few, or no kernel
    of the target skips them. `chosen` as in `sparse_weight.sparse_form`."""
    if not isinstance(spec, WeightedSpec) or len(parts) != 1:
        return None
    from .sparse_weight import sparse_form

    return sparse_form(spec, parts[0], target, chosen)


def sparse_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> Sequence[SparseForm]:
    """In what forms kernels of the target read a weight without its zeros; none: no kernel does."""
    if target.is_x86:
        from .x86.sparse_forms import sparse_forms as forms

        return forms(spec, target)
    if target.has("dsp"):
        from .arm.sparse_forms import sparse_forms as arm_forms

        return arm_forms(spec, target)
    if target.has("neon"):
        from .neon.sparse_forms import sparse_forms as neon_forms

        return neon_forms(spec, target)
    if target.has("rvv"):
        from .riscv.sparse_forms import sparse_forms as rvv_forms

        return rvv_forms(spec, target)
    if is_scalar(target):
        from .scalar.sparse_forms import sparse_forms as scalar_forms

        return scalar_forms(spec, target)
    return ()


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


def templates(target: Target) -> tuple[Template, ...]:
    """Templates for anchors on this target, tried in order."""
    if target.is_x86:
        from .x86 import TEMPLATES

        return TEMPLATES
    if target.has("neon"):
        from .neon import NEON_TEMPLATES

        return NEON_TEMPLATES
    if target.has("rvv"):
        from .riscv import RVV_TEMPLATES

        return RVV_TEMPLATES
    if target.has("mve"):
        from .arm import MVE_TEMPLATES

        return MVE_TEMPLATES
    if target.has("dsp"):
        from .arm import DSP_TEMPLATES

        return DSP_TEMPLATES
    if is_scalar(target):
        from .scalar import SCALAR_TEMPLATES

        return SCALAR_TEMPLATES
    from .sparse_portable import NAME, sparse_kernel
    from .template import Template

    return (Template(NAME, sparse_kernel),)


def _kernel_of(
    fused: FusedFunction | None, target: Target, choice: Choice | None
) -> tuple[str, WrittenKernel] | None:
    """(template's name, kernel) of the first template that takes the function."""
    if fused is None or fused.anchor is None:
        return None
    for name, kernel_of in templates(target):
        kernel = kernel_of(fused, target, choice)
        if kernel is not None:
            return name, kernel
    return None


def is_generic(func: tirx.PrimFunc, target: Target) -> bool:
    """Whether a naive, fused function multiplies weights and the target has no kernel for it."""
    from .fused import analyse

    fused = analyse(func)
    if fused is None or fused.anchor is None:
        return False
    return _kernel_of(fused, target, None) is None


def search_space(func: tirx.PrimFunc, target: Target) -> SearchSpace | None:
    """What the schedule of a naive, fused function leaves open; None: nothing to choose."""
    from .fused import analyse

    found = _kernel_of(analyse(func), target, None)
    return None if found is None else found[1].space()


def schedule(func: tirx.PrimFunc, target: Target, choice: Choice | None = None) -> tirx.PrimFunc:
    """`func`, naive and fused, as a scheduled function for `target`, marked "tirx.is_scheduled".

    `choice` is one of `search_space(func, target)`; None is the template's own default.
    `SCHEDULE_ATTR` names the form, `CHOICE_ATTR` the choice. Whatever no template takes gets the
    generic schedule.
    """
    from .default import schedule_default
    from .fused import analyse
    from .stored_weight import NAME as STORED_WEIGHT
    from .stored_weight import kernel_of as decoding_kernel

    decoding = decoding_kernel(func, target)
    if decoding is not None:
        return _finish(decoding.build(), func, STORED_WEIGHT)
    fused = analyse(func)
    found = _kernel_of(fused, target, choice)
    if found is not None:
        name, kernel = found
        scheduled = _finish(kernel.build(), func, name)
        if choice is not None:
            scheduled = scheduled.with_attr(CHOICE_ATTR, choice_to_json(choice))
        return scheduled
    scheduled, name = schedule_default(func, fused, target)
    return _finish(scheduled, func, name)


def _finish(scheduled: tirx.PrimFunc, func: tirx.PrimFunc, name: str) -> tirx.PrimFunc:
    attrs = dict((func.attrs or {}).items())
    return scheduled.with_attr(
        {**attrs, "tirx.noalias": True, "tirx.is_scheduled": True, SCHEDULE_ATTR: name}
    )
