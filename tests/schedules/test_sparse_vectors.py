"""Sparse layers with NEON and RISC-V's vectors: every form in one program a core, run under QEMU,
compared with NumPy bit for bit; instructions against the dense kernel's, and as predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import te

from tvm_compress.bare.kernel_code import to_bare
from tvm_compress.model import TensorSpec
from tvm_compress.runners import build_program, run_program
from tvm_compress.schedules import (
    Conv2dSpec,
    MatmulSpec,
    describe,
    reference,
    schedule,
    search_space,
)
from tvm_compress.schedules.dispatch import sparse_forms
from tvm_compress.schedules.sparse_weight import encoded
from tvm_compress.schedules.weights import weight_codes
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

from .kernels import UINT8, random_array
from .test_arm_dsp import conv, linear, project
from .test_arm_mve import Board, Case
from .test_sparse_cores import case, pruned

# smull and sadalp, sdot, usdot, ARMv7, and vectors of unknown length.
FORMS = {
    "cortex-a53": "neon.sparse_bytes",
    "cortex-a76": "neon.sparse_bytes",
    "armv8.2-i8mm": "neon.sparse_bytes",
    "armv7-neon": "neon.sparse_bytes",
    "riscv64gcv": "riscv.sparse",
}
# Copied by 16, by 8 and by 4 positions, and byte by byte.
RAGGED: dict[str, Conv2dSpec | MatmulSpec] = {
    "rows": linear(19, 33, 21),
    "pixels": conv(3, 7, 20, 16, (1, 1), 0),
    "wide": conv(4, 18, 17, 40, pad=2, dilation=(2, 2)),
    "batch": conv(5, 9, 16, 20, (2, 3), batch=2),
    "few": conv(5, 4, 24, 18),
    "channels": conv(6, 6, 3, 33),
    "column": conv(9, 1, 8, 20, (1, 1), 0, strides=(2, 1)),
    "apart": conv(9, 6, 16, 16, (1, 1), 0, strides=(2, 1)),
    "strided": conv(7, 35, 17, 20, strides=(2, 2)),
}
UNSIGNED = conv(4, 5, 16, 24, **UINT8 | {"weight_dtype": "int8"})
LAYERS = {"3x3": conv(14, 14, 32, 32), "1x1": conv(14, 14, 64, 64, (1, 1), 0)}


@pytest.mark.parametrize("core", list(FORMS))
def test_ragged_shapes(core: str, tmp_path: Path) -> None:
    """All forms of the core; weights of -128, which shorten chains in 16 bits, in every other."""
    target = get_target(core)
    cases: dict[str, Case] = {}
    specs = {**RAGGED, "unsigned": UNSIGNED}
    if core == "armv8.2-i8mm":  # differs by unsigned data only
        specs = {name: specs[name] for name in ("wide", "unsigned")}
    for index, (name, spec) in enumerate(specs.items()):
        forms = list(sparse_forms(spec, target))
        for number, form in enumerate(forms if name == "wide" else forms[:1]):
            weight = pruned(spec, form.block, 0.5 + 0.2 * number, index)
            if index % 2:
                weight = np.maximum(weight, -127)
            key = f"{name}_{form.block}"
            cases[key] = case(spec, weight, form, FORMS[core], core)
    reads_unsigned = core in ("armv8.2-i8mm", "riscv64gcv")
    assert len({key.partition("_")[0] for key in cases}) == len(specs) - (not reads_unsigned)
    board = Board(cases, tmp_path, target)
    for key in cases:
        board.check(key)


@pytest.mark.parametrize("core", list(FORMS))
def test_instructions_are_as_predicted(core: str, tmp_path: Path) -> None:
    """80 % of the blocks are zero: two thirds of the dense kernel's instructions at most, by which
    the choice between forms is made."""
    target = get_target(core)
    cases: dict[str, Case] = {}
    shares: dict[str, float] = {}
    for name, spec in LAYERS.items():
        form = next(form for form in sparse_forms(spec, target) if form.block == 16)
        weight = np.maximum(pruned(spec, 16, 0.8), -127)
        stored = encoded(spec, weight_codes(spec, weight), form)[1][0]
        shares[name] = form.share(stored.size, weight.size)
        cases[name] = case(spec, weight, form, FORMS[core], core)
        dense = FORMS[core].partition(".")[0] + ".matrix"
        cases[f"{name} dense"] = case(spec, weight, None, dense, core)
    board = Board(cases, tmp_path, target)
    for name, share in shares.items():
        found = board.check(name) / board.check(f"{name} dense")
        assert found < 0.68 and 0.75 * found < share < 1.35 * found


@pytest.mark.parametrize("core", ["cortex-a53", "riscv64gcv"])
def test_choices(core: str, tmp_path: Path) -> None:
    target, spec = get_target(core), conv(5, 9, 20, 20)
    form = next(iter(sparse_forms(spec, target)))
    weight = np.maximum(pruned(spec, form.block, 0.7), -127)
    one = case(spec, weight, form, FORMS[core], core)
    space = search_space(one.func, target)
    assert space is not None
    choices = list(space)
    assert len(choices) > 5 and space.contains(choices[0])
    cases = {
        str(number): replace(one, choice=choices[number])
        for number in range(1, len(choices), len(choices) // 3)
    }
    board = Board(cases, tmp_path, target)
    for name in cases:
        board.check(name)


@pytest.mark.parametrize("core", ["cortex-a53", "armv7-neon", "riscv64gcv"])
def test_floats(core: str, tmp_path: Path) -> None:
    target = get_target(core)
    missing = missing_tools(target)
    if missing:
        pytest.skip(f"{core}: {', '.join(missing)} not installed")
    spec = Conv2dSpec(
        batch=1, height=7, width=9, in_channels=10, out_channels=37, kernel=(3, 3),
        padding=(1, 1, 1, 1),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for form in [form for form in sparse_forms(spec, target) if form.block in (16, 4)]:
        kept = rng.random((spec.reduction_size, -(-37 // form.block))) < 0.3
        weight = random_array(rng, (spec.reduction_size, 37), "float32")
        weight = (weight * kept.repeat(form.block, axis=1)[:, :37]).reshape(spec.weight_shape)
        data = random_array(rng, spec.data_shape, "float32")
        stored, parts = encoded(spec, weight_codes(spec, weight), form)
        inputs, sums = describe(stored)
        naive = te.create_prim_func([*inputs, sums]).without_attr("global_symbol")
        kernel = to_bare(schedule(naive, target), "kernel", target, False)
        folder = tmp_path / str(form.block)
        one: Any = project(kernel, target, [data, *parts], stored.output_shape, folder)
        one = replace(one, outputs=(TensorSpec("out", stored.output_shape, "float32"),))
        found = run_program(build_program(one, target, folder), [{"data": data}]).outputs[0]["out"]
        wanted = reference(spec, data, weight)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
