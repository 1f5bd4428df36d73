"""Which layers are stored by their nonzero weights, and that the stored form is the layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tvm_compress.schedules import Conv2dSpec, MatmulSpec, WeightedSpec, reference, sparse_parts
from tvm_compress.targets import get_target

from .kernels import random_array

CONV: dict[str, Any] = {
    "batch": 1, "height": 6, "width": 5, "in_channels": 64, "out_channels": 64, "kernel": (3, 3),
    "padding": (1, 1, 1, 1),
}  # fmt: skip


def pruned(spec: WeightedSpec, block: int, sparsity: float) -> np.ndarray:
    """A random weight of which blocks of outputs of a group are zero."""
    rng = np.random.default_rng(0)
    columns = spec.columns * spec.groups_of_channels
    kept = rng.random((spec.reduction_size, -(-columns // block))) >= sparsity
    weight = random_array(rng, (spec.reduction_size, columns), spec.weight_dtype)
    return (weight * kept.repeat(block, axis=1)[:, :columns]).reshape(spec.weight_shape)


@pytest.mark.parametrize("spec", [
    Conv2dSpec(**CONV), Conv2dSpec(**CONV, groups=2), Conv2dSpec(**CONV, groups=4),
    MatmulSpec(rows=3, in_features=96, out_features=80),
])  # fmt: skip
def test_stored_form_is_the_layer(spec: Any) -> None:
    weight = pruned(spec, 16, 0.8)
    found = sparse_parts(spec, [weight], get_target("x86-64-v3"))
    assert found is not None
    stored, parts = found
    assert parts[0].size < 0.3 * weight.size
    data = random_array(np.random.default_rng(1), spec.data_shape, "float32")
    np.testing.assert_allclose(
        reference(stored, data, *parts), reference(spec, data, weight), rtol=0, atol=1e-4
    )


def test_what_stays_dense() -> None:
    target = get_target("x86-64-v3")
    spec = Conv2dSpec(**CONV)
    assert sparse_parts(spec, [pruned(spec, 16, 0.05)], target) is None  # too few zeros
    assert sparse_parts(spec, [pruned(spec, 1, 0.1)], target) is None
    depthwise = Conv2dSpec(**CONV, groups=64)
    assert sparse_parts(depthwise, [pruned(depthwise, 16, 0.8)], target) is None
