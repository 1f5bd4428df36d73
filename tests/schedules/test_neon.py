"""Kernels for NEON: every form compiled, run under QEMU's user mode, compared with NumPy bit for
bit; and instructions counted, which are the same in every run."""

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
    SCHEDULE_ATTR,
    Conv2dSpec,
    Conv2dTransposeSpec,
    WeightedSpec,
    describe,
    pack_weight,
    reference,
    schedule,
    search_space,
)
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

from .kernels import INT8, INT16, UINT8, random_array
from .test_arm_dsp import conv, count, depthwise, linear, project

MATRIX, DEPTHWISE = "neon.matrix", "neon.depthwise"
# smull and sadalp, sdot, smmla, and ARMv7.
CPUS = ["cortex-a53", "cortex-a76", "armv8.2-i8mm", "armv7-neon"]


def sums(
    spec: WeightedSpec, name: str, folder: Path, weight: np.ndarray | None = None,
    data: np.ndarray | None = None, form: str = MATRIX, choice: dict[str, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What the layer alone computes on a CPU, and what it should."""
    target = get_target(name)
    missing = missing_tools(target)
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} not installed")
    rng = np.random.default_rng(1)
    data = random_array(rng, spec.data_shape, spec.data_dtype) if data is None else data
    if weight is None:
        weight = random_array(rng, spec.plain_weight_shape, spec.weight_dtype)
    expected = reference(spec, data, weight)
    packed = pack_weight(spec, weight, target)
    if packed is not None:
        spec, weight = packed
    inputs, result = describe(spec)
    naive = te.create_prim_func([*inputs, result]).without_attr("global_symbol")
    scheduled = schedule(naive, target, choice)
    assert scheduled.attrs[SCHEDULE_ATTR] == form
    kernel = to_bare(scheduled, "kernel", target, False)
    one = project(kernel, target, [data, weight], expected.shape, folder)
    one = replace(one, outputs=(TensorSpec("out", expected.shape, str(result.dtype)),))
    program = build_program(one, target, folder)
    return run_program(program, [{"data": data}]).outputs[0]["out"], expected


MATRICES = {
    "odd": linear(3, 7, 5),
    "image": conv(7, 9, 3, 6),
    "strided": conv(8, 7, 16, 9, strides=(2, 2), padding=(0, 0, 1, 1), batch=2),
    "rows_apart": conv(5, 9, 24, 3, dilation=(2, 1)),
    "columns_apart": conv(5, 7, 4, 3, pad=0, dilation=(1, 2)),
    "groups": conv(5, 4, 24, 18, groups=2),
    "unsigned": conv(6, 5, 20, 17, (1, 1), 0, **UINT8 | {"weight_dtype": "int8"}),
    "long": linear(1, 200, 11),
}


@pytest.mark.parametrize(
    ("name", "cpu"),
    [
        *((name, "cortex-a53") for name in MATRICES),
        *((name, cpu) for name in ("image", "unsigned", "groups") for cpu in CPUS[1:]),
    ],
)
def test_matrix(name: str, cpu: str, tmp_path: Path) -> None:
    count(MATRICES[name], tmp_path, MATRIX, name=cpu)


@pytest.mark.parametrize(
    ("spec", "cpu"),
    [
        (conv(5, 6, 20, 7, **INT16), "cortex-a76"),
        (conv(4, 5, 6, 5, **INT16), "armv7-neon"),
        (conv(5, 6, 20, 7, **UINT8, weight_zero_point=77), "cortex-a76"),
        (
            Conv2dTransposeSpec(
                **INT8, batch=1, height=4, width=5, in_channels=20, out_channels=6,
                kernel=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1),
            ),
            "armv8.2-i8mm",
        ),
    ],
    ids=["int16", "int16_armv7", "zero_point", "transposed"],
)  # fmt: skip
def test_other_integers(spec: WeightedSpec, cpu: str, tmp_path: Path) -> None:
    np.testing.assert_array_equal(*sums(spec, cpu, tmp_path))


@pytest.mark.parametrize("cpu", ["cortex-a53", "armv7-neon"])
def test_nothing_wraps(cpu: str, tmp_path: Path) -> None:
    """Two products of -128 and -128 do not fit 16 bits."""
    spec = conv(3, 3, 24, 4)
    weight = np.full(spec.plain_weight_shape, -128, np.int8)
    packed = pack_weight(spec, weight, get_target(cpu))
    assert packed is not None and packed[0].chain == 1
    data = np.full(spec.data_shape, -128, np.int8)
    np.testing.assert_array_equal(*sums(spec, cpu, tmp_path, weight, data))


def test_long_chains(tmp_path: Path) -> None:
    """Small weights allow more products in 16 bits."""
    spec = conv(4, 6, 40, 10)
    rng = np.random.default_rng(0)
    weight = rng.integers(-60, 61, spec.plain_weight_shape, "int8")
    packed = pack_weight(spec, weight, get_target("cortex-a53"))
    assert packed is not None and packed[0].chain >= 4
    np.testing.assert_array_equal(*sums(spec, "cortex-a53", tmp_path, weight))


@pytest.mark.parametrize("cpu", ["cortex-a53", "armv7-neon"])
def test_float(cpu: str, tmp_path: Path) -> None:
    spec = Conv2dSpec(
        batch=1, height=6, width=7, in_channels=9, out_channels=6, kernel=(3, 3),
        padding=(1, 1, 1, 1),
    )  # fmt: skip
    found, expected = sums(spec, cpu, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


DEPTHWISES = {
    "3x3": depthwise(7, 9, 24),
    "stride": depthwise(9, 8, 37, strides=(2, 2)),
    "5x5": depthwise(7, 6, 16, 5, 2),
    "7x7": depthwise(8, 8, 17, 7, 3),
    "multiplier": depthwise(5, 6, 8, 2, 0, 2),
    "unsigned": depthwise(6, 5, 25, **UINT8 | {"weight_dtype": "int8"}),
}


@pytest.mark.parametrize(
    ("name", "cpu"),
    [*((name, "cortex-a53") for name in DEPTHWISES), ("stride", "armv7-neon")],
)
def test_depthwise(name: str, cpu: str, tmp_path: Path) -> None:
    count(DEPTHWISES[name], tmp_path, DEPTHWISE, name=cpu)


@pytest.mark.parametrize("cpu", ["cortex-a53", "armv7-neon"])
@pytest.mark.parametrize(
    "more",
    [{"bounds": (-3, 100), "zero_point": 0}, {"bounds": (-128, 20), "fits": False}],
    ids=["inside", "saturating"],
)
def test_clamps(more: dict[str, Any], cpu: str, tmp_path: Path) -> None:
    count(conv(5, 5, 4, 12), tmp_path, MATRIX, name=cpu, **more)


@pytest.mark.parametrize("rule", ["tflite_small", "float64"])
def test_rules(rule: str, tmp_path: Path) -> None:
    count(conv(5, 5, 4, 12), tmp_path, MATRIX, rule, name="cortex-a76")


@pytest.mark.parametrize("cpu", ["cortex-a53", "armv8.2-i8mm"])
def test_choices(cpu: str, tmp_path: Path) -> None:
    """A few of the space, the default first."""
    target, spec = get_target(cpu), conv(5, 7, 16, 20)
    weight = np.random.default_rng(0).integers(-60, 61, spec.plain_weight_shape, "int8")
    packed = pack_weight(spec, weight, target)
    assert packed is not None
    inputs, result = describe(packed[0])
    naive = te.create_prim_func([*inputs, result]).without_attr("global_symbol")
    space = search_space(naive, target)
    assert space is not None
    choices = list(space)
    assert len(choices) > 20 and choices[0] == dict(space.default)
    for number in (len(choices) // 3, 2 * len(choices) // 3):
        folder = tmp_path / str(number)
        np.testing.assert_array_equal(*sums(spec, cpu, folder, weight, choice=choices[number]))


# Instructions a multiply-add, everything counted, of the three forms of AArch64 and of ARMv7.
BOUNDS = {
    "3x3": (conv(16, 16, 32, 32), MATRIX, (0.27, 0.1, 0.08, 0.42)),
    "1x1": (conv(25, 6, 64, 64, (1, 1), 0), MATRIX, (0.34, 0.12, 0.11, 0.5)),
    "depthwise": (depthwise(25, 5, 64), DEPTHWISE, (0.62, 0.62, 0.62, 0.9)),
}


@pytest.mark.parametrize(
    ("name", "number"),
    [*(("3x3", number) for number in range(4)), ("1x1", 0), ("1x1", 2), ("depthwise", 0)],
)
def test_instructions_of_a_multiply_add(name: str, number: int, tmp_path: Path) -> None:
    spec, form, bounds = BOUNDS[name]
    assert count(spec, tmp_path, form, name=CPUS[number]) <= bounds[number]
