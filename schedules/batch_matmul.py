"""Product of two activations: acc[b, m, n] = sum over k of (a[b, m, k] - za) * (b[b, k, n] -
zb)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .spec import KERNEL_ATTR, BatchMatmulSpec

if TYPE_CHECKING:
    from tvm import te


def describe(spec: BatchMatmulSpec) -> tuple[list[te.Tensor], te.Tensor]:
    """TE description: arguments (a, b) and the accumulators."""
    from tvm import te, tirx

    a = te.placeholder(spec.a_shape, spec.a_dtype, name="a")
    b = te.placeholder(spec.b_shape, spec.b_dtype, name="b")
    k = te.reduce_axis((0, spec.depth), name="k")

    def centred(value: tirx.PrimExpr, zero_point: int) -> tirx.PrimExpr:
        wide = value.astype(spec.acc_dtype)
        return wide - tirx.const(zero_point, spec.acc_dtype) if zero_point else wide

    def product(i: tirx.Var, m: tirx.Var, n: tirx.Var) -> tirx.PrimExpr:
        j = i if spec.b_batch == spec.batch else 0
        other = b[j, n, k] if spec.transpose_b else b[j, k, n]
        return te.sum(
            centred(a[i, m, k], spec.a_zero_point) * centred(other, spec.b_zero_point), axis=k
        )

    acc = te.compute(
        spec.output_shape, product, name="batch_matmul", attrs={KERNEL_ATTR: spec.to_json()}
    )
    return [a, b], acc


def reference(spec: BatchMatmulSpec, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The same in NumPy, summed in float64."""
    right = b.astype(np.float64) - spec.b_zero_point
    if spec.transpose_b:
        right = right.transpose(0, 2, 1)
    return ((a.astype(np.float64) - spec.a_zero_point) @ right).astype(spec.acc_dtype)
