"""Which layers are stored by their nonzero weights, and that the stored form is the layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tvm_compress.schedules import Conv2dSpec, MatmulSpec, WeightedSpec, reference, sparse_parts
from tvm_compress.schedules.sparse_weight import sparse_candidates
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


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_dense_kernels_of_narrow_groups_waste_their_registers(dtype: str) -> None:
    """A dense kernel takes as long for 8 or 4 outputs a group as for 16, a sparse one computes
    those of neighbouring groups together: measured (28x28, 256 channels, a tenth is left), it takes
    a third of the dense time for 4 and for 8 outputs a group."""
    shares = []
    for groups in (16, 32, 64):
        integers = {"data_dtype": dtype, "weight_dtype": "int8", "acc_dtype": "int32"}
        spec = Conv2dSpec(
            batch=1, height=28, width=28, in_channels=256, out_channels=256, kernel=(3, 3),
            padding=(1, 1, 1, 1), groups=groups, **(integers if dtype == "uint8" else {}),
        )  # fmt: skip
        reads = np.random.default_rng(0).random((groups, spec.reduction_size, 1)) < 0.1
        kept = reads.repeat(spec.columns, axis=2)
        shares.append(sparse_candidates(spec, kept, get_target("x86-64-v4"))[0][0])
    assert max(shares) < 0.4 and max(shares) / min(shares) < 2
