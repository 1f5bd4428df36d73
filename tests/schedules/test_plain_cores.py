"""Kernels for cores without SIMD and for RISC-V's vectors: run under QEMU, compared with NumPy bit
for bit; and instructions counted, which are the same in every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import te

from tvm_compress.bare.kernel_code import object_file, to_bare
from tvm_compress.runners import build_program, run_program
from tvm_compress.schedules import (
    Conv2dSpec,
    WeightedSpec,
    describe,
    pack_weight,
    reference,
    schedule,
    search_space,
)
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

from .kernels import UINT8
from .test_arm_dsp import Requantisation, conv, count, depthwise, linear, project

FORMS = {
    "cortex-m0plus": "scalar",
    "cortex-m3": "scalar",
    "riscv32imc": "scalar",
    "riscv64gc": "scalar",
    "riscv64gcv": "riscv",
}
WITHOUT_FPU = ("cortex-m0plus", "cortex-m3", "riscv32imc")
RAGGED: dict[str, WeightedSpec] = {
    "odd": linear(3, 7, 5),
    "one_row": linear(1, 70, 11),
    "image": conv(6, 11, 3, 5, dilation=(2, 1)),
    "batch": conv(4, 5, 6, 7, (2, 3), strides=(3, 2), batch=2),
    "column": conv(5, 1, 8, 6, (1, 1), 0, strides=(2, 2), batch=2),
    "unsigned": conv(3, 5, 8, 4, padding=(0, 1, 1, 0), **UINT8 | {"weight_dtype": "int8"}),
    "depthwise": depthwise(6, 5, 3, 3, 1, 2, strides=(2, 1), dilation=(2, 1)),
}
# Instructions a multiply-add of a 1x1 layer, a 3x3 layer and a depthwise one.
BOUNDS = {
    "cortex-m0plus": (4.7, 4.2, 12.5),
    "cortex-m3": (2.4, 2.1, 6.5),
    "riscv32imc": (3.2, 2.9, 8.0),
    "riscv64gc": (1.9, 1.8, 5.4),
    "riscv64gcv": (0.14, 0.20, 0.55),
}
LAYERS = (conv(5, 6, 64, 64, (1, 1), 0), conv(8, 20, 16, 16), depthwise(8, 5, 64))


def form(spec: WeightedSpec, name: str) -> str:
    is_depthwise = isinstance(spec, Conv2dSpec) and spec.is_depthwise
    return f"{FORMS[name]}.{'depthwise' if is_depthwise else 'matrix'}"


@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=["1x1", "3x3", "depthwise"])
@pytest.mark.parametrize("name", list(FORMS))
def test_instructions_of_a_multiply_add(name: str, layer: int, tmp_path: Path) -> None:
    found = count(LAYERS[layer], tmp_path, form(LAYERS[layer], name), name=name)
    assert found <= BOUNDS[name][layer]


@pytest.mark.parametrize("shape", list(RAGGED))
@pytest.mark.parametrize("name", list(FORMS))
def test_ragged_shapes(name: str, shape: str, tmp_path: Path) -> None:
    count(RAGGED[shape], tmp_path, form(RAGGED[shape], name), name=name)


@pytest.mark.parametrize("name", WITHOUT_FPU)
def test_products_near_ties_without_an_fpu(name: str, tmp_path: Path) -> None:
    """Powers of two make exact ties; next to them lie factors of which float32 makes ties."""
    target = get_target(name)
    missing = missing_tools(target)
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} not installed")
    channels = 72
    spec = conv(4, 30, 1, channels, (1, 1), 0)
    random = np.random.default_rng(3)
    data = random.integers(-128, 127, spec.data_shape, np.int8, endpoint=True)
    weight = random.integers(-127, 127, spec.plain_weight_shape, np.int8, endpoint=True)
    exponents = 2.0 ** -np.arange(1, channels // 3 + 1)
    below, above = (np.nextafter(np.float32(1), np.float32(n)) for n in (0, 2))
    factors = np.concatenate([exponents, exponents * below, exponents * above]).astype(np.float32)
    # Sums about as large as codes over the factor, or as 32 bits allow.
    spread = np.minimum(100 / factors, 2.0**30).astype(np.int64)
    bias = random.integers(-spread, spread).astype(np.int32)
    wanted = Requantisation("float32", bias, (factors,), fits=False)
    acc = reference(spec, data, weight)
    packed = pack_weight(spec, weight, target)
    assert packed is not None
    packed_spec, weight = packed
    inputs, sums = describe(packed_spec)
    constants = [
        te.placeholder(array.shape, str(array.dtype), name=f"constant{i}")
        for i, array in enumerate((bias, factors))
    ]
    naive = te.create_prim_func([*inputs, *constants, wanted.describe(sums, constants)])
    kernel = to_bare(schedule(naive.without_attr("global_symbol"), target), "kernel", target, False)
    arrays = [data, weight, bias, factors]
    program = build_program(project(kernel, target, arrays, acc.shape, tmp_path), target, tmp_path)
    found = run_program(program, [{"data": data}]).outputs[0]["out"]
    np.testing.assert_array_equal(found, wanted.expected(acc))
    assert len(np.unique(found)) > 200


def anchor(spec: WeightedSpec, name: str) -> Any:
    """The naive function of a layer as it is packed for a target."""
    weight = np.full(spec.plain_weight_shape, 127, np.int8)  # no four bits
    packed = pack_weight(spec, weight, get_target(name))
    inputs, sums = describe(spec if packed is None else packed[0])
    return te.create_prim_func([*inputs, sums]).without_attr("global_symbol")


@pytest.mark.parametrize("name", ["cortex-m0plus", "riscv64gc"])
def test_choices(name: str, tmp_path: Path) -> None:
    spec = conv(3, 3, 4, 4)
    space = search_space(anchor(spec, name), get_target(name))
    assert space is not None
    choices = list(space)
    assert len(choices) > 2 and choices[0] == dict(space.default)
    # The ends of every parameter; what lies between differs by a number.
    ends = [c for c in choices if all(c[k] in (v[0], v[-1]) for k, v in space.parameters.items())]
    for number, choice in enumerate(ends):
        count(spec, tmp_path / str(number), form(spec, name), name=name, choice=choice)


@pytest.mark.parametrize("name", list(FORMS))
def test_no_library_is_asked_for(name: str) -> None:
    """No runtime, no mathematics, no unwinder."""
    target = get_target(name)
    content = object_file(
        to_bare(schedule(anchor(conv(4, 7, 8, 4), name), target), "kernel", target, False), target
    )
    assert b"kernel" in content
    for library in (b"__aeabi_unwind", b"TVMBackend", b"lrint", b"nearbyint"):
        assert library not in content
