"""Sparse layers of bytes on microcontrollers: every form in one program a core, run under QEMU,
compared with NumPy bit for bit; and instructions against the dense kernel's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import te

from tvm_compress.schedules import (
    Conv2dSpec,
    MatmulSpec,
    describe,
    pack_parts,
    reference,
)
from tvm_compress.schedules.dispatch import sparse_forms
from tvm_compress.schedules.sparse_form import SparseForm
from tvm_compress.schedules.sparse_weight import encoded
from tvm_compress.schedules.weights import weight_codes
from tvm_compress.targets import get_target

from .kernels import UINT8
from .test_arm_dsp import conv, linear, requantisation
from .test_arm_mve import Board, Case

FORMS = {
    "cortex-m4": "arm.sparse",
    "cortex-m55": "arm.mve_sparse",
    "cortex-m0plus": "scalar.sparse",
    "cortex-m3": "scalar.sparse",
    "riscv32imc": "scalar.sparse",
    "riscv64gc": "scalar.sparse",
}
# Widths that are no multiple of a tile; by how many outputs their blocks have.
RAGGED: dict[str, tuple[int, Conv2dSpec | MatmulSpec]] = {
    "odd": (16, linear(5, 33, 19)),
    "one_row": (16, linear(1, 70, 37)),
    "one_row_narrow": (4, linear(1, 21, 13)),
    "one_row_narrowest": (2, linear(1, 9, 5)),
    "pixels": (8, conv(3, 7, 20, 16, (1, 1), 0)),
    "image": (16, conv(6, 11, 3, 18, dilation=(2, 2), pad=2)),
    "batch": (4, conv(4, 5, 6, 20, (2, 3), strides=(3, 2), batch=2)),
    "apart": (2, conv(5, 6, 8, 16, (1, 1), 0, strides=(2, 2))),
    "column": (16, conv(5, 1, 8, 16, (1, 1), 0, strides=(2, 2), batch=2)),
    "without_border": (16, conv(6, 7, 5, 33, pad=0, strides=(2, 1))),
}
UNSIGNED = conv(3, 5, 8, 24, padding=(0, 1, 1, 0), **UINT8 | {"weight_dtype": "int8"})


def pruned(spec: Conv2dSpec | MatmulSpec, block: int, sparsity: float, seed: int = 0) -> np.ndarray:
    """A weight without `sparsity` of its blocks, all those of the last outputs among them."""
    rng = np.random.default_rng(seed)
    size, outputs = spec.reduction_size, spec.columns
    weight = rng.integers(-128, 127, (size, outputs), "int8", endpoint=True)
    kept = rng.random((size, -(-outputs // block))) >= sparsity
    if kept.shape[1] > 1:
        kept[:, -1] = False
    weight *= kept.repeat(block, axis=1)[:, :outputs]
    return weight.reshape(spec.plain_weight_shape)


def case(
    spec: Conv2dSpec | MatmulSpec, weight: np.ndarray, form: SparseForm | None, name: str,
    core: str, rule: str = "float32",
) -> Case:  # fmt: skip
    """A layer, sparse or dense, and its requantisation."""
    rng = np.random.default_rng(0)
    info = np.iinfo(spec.data_dtype)
    data = rng.integers(info.min, info.max, spec.data_shape, spec.data_dtype, endpoint=True)
    acc = reference(spec, data, weight)
    wanted = requantisation(acc, rule, rng)
    found: Any = pack_parts(spec, [weight], get_target(core))
    if form is not None:
        found = encoded(spec, weight_codes(spec, weight), form)
    kernel, parts = found
    np.testing.assert_array_equal(reference(kernel, data, *parts), acc)
    inputs, sums = describe(kernel)
    arrays = [data, *parts, wanted.bias, *wanted.factors]
    tensors = [
        te.placeholder(array.shape, str(array.dtype), name=f"constant{i}")
        for i, array in enumerate(arrays[len(inputs) :])
    ]
    naive = te.create_prim_func([*inputs, *tensors, wanted.describe(sums, tensors)])
    func = naive.without_attr("global_symbol")
    return Case(name, func, arrays, wanted.expected(acc), spec.macs)


@pytest.mark.parametrize("core", list(FORMS))
def test_ragged_shapes(core: str, tmp_path: Path) -> None:
    """All widths of blocks, with blocks that are empty; and that a sparse layer takes as many
    instructions as it is expected to."""
    target = get_target(core)
    counted = conv(4, 12, 32, 32)
    cases: dict[str, Case] = {}
    for number, (name, (block, spec)) in enumerate(RAGGED.items()):
        form = next((f for f in sparse_forms(spec, target) if f.block == block), None)
        if form is None:
            continue
        weight = pruned(spec, block, 0.5 + 0.05 * number, number)
        rule = "rounded_once" if number % 2 else "float32"
        cases[name] = case(spec, weight, form, FORMS[core], core, rule)
    form = sparse_forms(UNSIGNED, target)[0]
    name = FORMS[core].replace("mve_", "")
    cases["unsigned"] = case(UNSIGNED, pruned(UNSIGNED, 16, 0.7), form, name, core)
    form = sparse_forms(counted, target)[0]
    weight = pruned(counted, 16, 0.5)
    cases["sparse"] = case(counted, weight, form, FORMS[core], core)
    dense = FORMS[core].replace("sparse", "matrix")
    cases["dense"] = case(counted, weight, None, dense, core)
    board = Board(cases, tmp_path, target)
    counts = {name: board.check(name) for name in cases}
    stored = encoded(counted, weight_codes(counted, weight), form)[1][0].size
    share = counts["sparse"] / counts["dense"]
    assert share < 0.6, share
    assert share <= 1.1 * form.share(stored, weight.size)
