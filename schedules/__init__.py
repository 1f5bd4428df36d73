"""Kernels: naive descriptions, and scheduled forms per target. See README.md of this folder."""

from .anchors import describe, prim_func, reference
from .choice import (
    CHOICE_ATTR,
    Choice,
    SearchSpace,
    choice_from_json,
    choice_to_json,
)
from .decode_weight import DecodedWeight
from .dispatch import (
    decode_weight,
    is_generic,
    pack_parts,
    pack_weight,
    schedule,
    search_space,
    sparse_parts,
)
from .spec import (
    KERNEL_ATTR,
    SCHEDULE_ATTR,
    BatchMatmulSpec,
    Conv2dSpec,
    Conv2dTransposeSpec,
    KernelSpec,
    MatmulSpec,
    SparseConv2dSpec,
    SparseRowsSpec,
    SpecError,
    WeightedSpec,
    spec_from_json,
)

__all__ = [
    "CHOICE_ATTR",
    "KERNEL_ATTR",
    "SCHEDULE_ATTR",
    "BatchMatmulSpec",
    "Choice",
    "Conv2dSpec",
    "Conv2dTransposeSpec",
    "DecodedWeight",
    "KernelSpec",
    "MatmulSpec",
    "SearchSpace",
    "SparseConv2dSpec",
    "SparseRowsSpec",
    "SpecError",
    "WeightedSpec",
    "choice_from_json",
    "choice_to_json",
    "decode_weight",
    "describe",
    "is_generic",
    "pack_parts",
    "pack_weight",
    "prim_func",
    "reference",
    "schedule",
    "search_space",
    "sparse_parts",
    "spec_from_json",
]
