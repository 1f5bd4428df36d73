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
RAGGED: dict[str, Conv2dSpec | MatmulSpec] = {
    "odd": linear(5, 33, 19),
    "one_row": linear(1, 70, 37),
    "pixels": conv(3, 7, 20, 16, (1, 1), 0),
    "image": conv(6, 11, 3, 18, dilation=(2, 2), pad=2),
    "batch": conv(4, 5, 6, 20, (2, 3), strides=(3, 2), batch=2),
    "apart": conv(5, 6, 8, 16, (1, 1), 0, strides=(2, 2)),
    "without_border": conv(6, 7, 5, 33, pad=0, strides=(2, 1)),
}
UNSIGNED = conv(3, 5, 8, 24, padding=(0, 1, 1, 0), **UINT8 | {"weight_dtype": "int8"})
# Layers that are counted.
LAYERS: dict[str, Conv2dSpec | MatmulSpec] = {
    "1x1": conv(5, 6, 64, 64, (1, 1), 0),
    "3x3": conv(8, 8, 32, 32),
    "linear": linear(1, 640, 128),
}


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
    """All forms of the core, with blocks that are empty."""
    cases: dict[str, Case] = {}
    target = get_target(core)
    for name, spec in RAGGED.items():
        for number, form in enumerate(sparse_forms(spec, target)):
            weight = pruned(spec, form.block, 0.6 + 0.1 * number, number)
            rule = "rounded_once" if number % 2 else "float32"
            cases[f"{name}_{form.block}"] = case(spec, weight, form, FORMS[core], core, rule)
    for form in list(sparse_forms(UNSIGNED, target))[:1]:
        weight = pruned(UNSIGNED, form.block, 0.7)
        name = FORMS[core].replace("mve_", "")
        cases["unsigned"] = case(UNSIGNED, weight, form, name, core)
    board = Board(cases, tmp_path, target)
    for name in cases:
        board.check(name)
