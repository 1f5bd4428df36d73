"""Kernels: naive descriptions, and scheduled forms per target. See README.md of this folder."""

from .anchors import describe, prim_func, reference
from .spec import (
    KERNEL_ATTR,
    SCHEDULE_ATTR,
    BatchMatmulSpec,
    Conv2dSpec,
    Conv2dTransposeSpec,
    KernelSpec,
    MatmulSpec,
    SpecError,
    spec_from_json,
)

__all__ = [
    "KERNEL_ATTR",
    "SCHEDULE_ATTR",
    "BatchMatmulSpec",
    "Conv2dSpec",
    "Conv2dTransposeSpec",
    "KernelSpec",
    "MatmulSpec",
    "SpecError",
    "describe",
    "prim_func",
    "reference",
    "spec_from_json",
]
