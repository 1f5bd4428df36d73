"""The anchor kernels by spec: what lowering, packing and scheduling dispatch on."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from . import batch_matmul, conv2d, conv2d_transpose, depthwise, matmul, sparse_conv2d, sparse_rows
from .spec import (
    KERNEL_ATTR,
    BatchMatmulSpec,
    Conv2dSpec,
    Conv2dTransposeSpec,
    KernelSpec,
    MatmulSpec,
    SparseConv2dSpec,
    SparseRowsSpec,
    SpecError,
)

if TYPE_CHECKING:
    from tvm import te, tirx

# relax::OpPatternKind::kOutEWiseFusable: elementwise consumers may be fused behind it.
OUT_ELEMWISE_FUSABLE = 4


def _kernel(spec: KernelSpec) -> ModuleType:
    if isinstance(spec, Conv2dSpec):
        return depthwise if spec.is_depthwise else conv2d
    if isinstance(spec, Conv2dTransposeSpec):
        return conv2d_transpose
    if isinstance(spec, MatmulSpec):
        return matmul
    if isinstance(spec, BatchMatmulSpec):
        return batch_matmul
    if isinstance(spec, SparseConv2dSpec):
        return sparse_conv2d
    if isinstance(spec, SparseRowsSpec):
        return sparse_rows
    raise SpecError(f"{type(spec).__name__} is not an anchor kernel")


def describe(spec: KernelSpec) -> tuple[list[te.Tensor], te.Tensor]:
    """TE placeholders of the kernel's arguments, in order, and its result."""
    inputs, acc = _kernel(spec).describe(spec)
    return inputs, acc


def reference(spec: KernelSpec, *arrays: np.ndarray) -> np.ndarray:
    """The kernel in NumPy on the same arguments."""
    result: np.ndarray = _kernel(spec).reference(spec, *arrays)
    return result


def prim_func(spec: KernelSpec) -> tirx.PrimFunc:
    """The naive kernel; the last parameter is the result. Marked with `KERNEL_ATTR` and
    "op_pattern"."""
    from tvm import te

    inputs, acc = describe(spec)
    func = te.create_prim_func([*inputs, acc]).without_attr("global_symbol")
    return func.with_attr({KERNEL_ATTR: spec.to_json(), "op_pattern": OUT_ELEMWISE_FUSABLE})
