"""Kernels: naive descriptions, and scheduled forms per target. See README.md of this folder."""

from .anchors import describe, prim_func, reference
from .decode_weight import DecodedWeight
from .dispatch import decode_weight, pack_weight, schedule
from .spec import (
    KERNEL_ATTR,
    SCHEDULE_ATTR,
    BatchMatmulSpec,
    Conv2dSpec,
    Conv2dTransposeSpec,
    KernelSpec,
    MatmulSpec,
    SpecError,
    WeightedSpec,
    spec_from_json,
)

__all__ = [
    "KERNEL_ATTR",
    "SCHEDULE_ATTR",
    "BatchMatmulSpec",
    "Conv2dSpec",
    "Conv2dTransposeSpec",
    "DecodedWeight",
    "KernelSpec",
    "MatmulSpec",
    "SpecError",
    "WeightedSpec",
    "decode_weight",
    "describe",
    "pack_weight",
    "prim_func",
    "reference",
    "schedule",
    "spec_from_json",
]
