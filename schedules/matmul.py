"""Linear layer: acc[m, n] = sum over k of data[m, k] * w[k, n], the weight known at compile
time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .spec import MatmulSpec
from .weights import decode_weight, kernel_attrs, weight_placeholders, weight_value

if TYPE_CHECKING:
    from tvm import te


def describe(spec: MatmulSpec) -> tuple[list[te.Tensor], te.Tensor]:
    """TE description: arguments (data, weight, [scales, [zero_points]]) and the accumulators."""
    from tvm import te

    data = te.placeholder(spec.data_shape, spec.data_dtype, name="data")
    tensors = weight_placeholders(spec)
    k = te.reduce_axis((0, spec.in_features), name="k")
    acc = te.compute(
        spec.output_shape,
        lambda m, n: te.sum(
            data[m, k].astype(spec.acc_dtype) * weight_value(spec, tensors, (), k, n), axis=k
        ),
        name="matmul",
        attrs=kernel_attrs(spec),
    )
    return [data, *tensors], acc


def reference(spec: MatmulSpec, data: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    """The same in NumPy, summed in float64."""
    return (data.astype(np.float64) @ decode_weight(spec, *weights)[0]).astype(spec.acc_dtype)
