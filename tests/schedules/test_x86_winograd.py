"""3x3 convolutions by Winograd's filtering: the matrices, where they are used, and the sums over
ragged shapes."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import te

from tvm_compress.schedules import (
    CHOICE_ATTR,
    SCHEDULE_ATTR,
    Conv2dSpec,
    describe,
    pack_weight,
    prim_func,
    reference,
    schedule,
    search_space,
    winograd,
)
from tvm_compress.schedules.layout import WINOGRAD_OUTPUTS
from tvm_compress.schedules.weights import pack_codes, weight_codes
from tvm_compress.targets import Target, get_target

from .kernels import UINT8, arguments, assert_same, run

FORM = "x86.winograd"
# Of the largest value, for standard normal data and weights: twice what was found over these
# shapes. The direct kernels stay below 1e-6.
TOLERANCE = 4e-6


def conv(ci: int, co: int, **fields: Any) -> Conv2dSpec:
    base: dict[str, Any] = {"batch": 1, "height": 9, "width": 11, "kernel": (3, 3)}
    return Conv2dSpec(**{**base, "in_channels": ci, "out_channels": co, **fields})


def transformed(spec: Conv2dSpec, weight: np.ndarray, outputs: int, target: Target) -> Any:
    """The layer with its weight transformed, whether that pays or not."""
    layout = f"O{min(16, target.lanes(32))}F{outputs}"
    return spec.replace(weight_layout=layout), pack_codes(spec, weight_codes(spec, weight), layout)


def check(
    spec: Conv2dSpec, target: Target, outputs: int, choice: dict[str, int] | None = None
) -> None:
    """Transform, schedule, compile, run, compare."""
    data, weight = arguments(spec)
    expected = reference(spec, data, weight)
    packed, array = transformed(spec, weight, outputs, target)
    func = schedule(prim_func(packed), target, choice)
    assert func.attrs[SCHEDULE_ATTR] == FORM
    (result,) = run(func, target, [data, array], (expected.shape, "float32"))
    if target.runs_here():
        assert_close(result, expected)


def assert_close(result: np.ndarray, expected: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(result / scale, expected / scale, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("outputs", WINOGRAD_OUTPUTS)
def test_matrices(outputs: int) -> None:
    side = outputs + 2
    a, b = winograd.output_matrix(outputs), winograd.data_matrix(outputs)
    random_values = np.random.default_rng(0)
    data, weight = random_values.normal(size=(side, side)), random_values.normal(size=(9, 1))
    u = winograd.transform_weight(outputs, weight).reshape(side, side)
    products = u * (b @ data @ b.T)
    expected = [
        [np.sum(data[i : i + 3, j : j + 3] * weight.reshape(3, 3)) for j in range(outputs)]
        for i in range(outputs)
    ]
    np.testing.assert_allclose(a @ products @ a.T, expected, atol=1e-12)
    restored = winograd.restore_weight(outputs, u.reshape(-1, 1))
    np.testing.assert_allclose(restored, weight, atol=1e-12)


@pytest.mark.parametrize("outputs", WINOGRAD_OUTPUTS)
def test_naive_description_restores_the_weight(outputs: int) -> None:
    spec = conv(5, 18, padding=(1, 0, 2, 1))
    data, weight = arguments(spec)
    target = get_target("host")
    packed, array = transformed(spec, weight, outputs, target)
    assert array.shape == packed.weight_shape
    expected = reference(spec, data, weight)
    assert_same(reference(packed, data, array), expected)
    naive = prim_func(packed).with_attr("tirx.is_scheduled", True)
    (result,) = run(naive, target, [data, array], (expected.shape, "float32"))
    assert_same(result, expected)


@pytest.mark.parametrize("outputs", WINOGRAD_OUTPUTS)
def test_every_target(target: Target, outputs: int) -> None:
    check(conv(20, 40, padding=(1, 1, 1, 1)), target, outputs)


@pytest.mark.parametrize("outputs", WINOGRAD_OUTPUTS)
@pytest.mark.parametrize(
    ("height", "width", "padding"),
    [(6, 6, 0), (4, 8, 1), (7, 5, 1), (4, 4, 2), (17, 6, 1), (8, 13, (0, 2, 1, 0))],
)
def test_ragged_images(
    main_target: Target, outputs: int, height: int, width: int, padding: Any
) -> None:
    sides = padding if isinstance(padding, tuple) else (padding,) * 4
    check(conv(8, 16, height=height, width=width, padding=sides), main_target, outputs)


@pytest.mark.parametrize("channels", [(1, 8), (3, 16), (7, 3), (17, 33), (32, 20), (256, 16)])
def test_ragged_channels(main_target: Target, channels: tuple[int, int]) -> None:
    check(conv(*channels, padding=(1, 1, 1, 1), batch=2), main_target, 4)


@pytest.mark.parametrize("outputs", WINOGRAD_OUTPUTS)
def test_threads(main_target: Target, outputs: int) -> None:
    target = dataclasses.replace(main_target, threads=2)
    spec = conv(64, 80, height=18, width=13, padding=(1, 1, 1, 1))
    check(spec, target, outputs)
    space = search_space(
        prim_func(transformed(spec, arguments(spec)[1], outputs, target)[0]), target
    )
    assert space is not None
    assert set(space.parameters["parts"]) >= {1, 2}


@pytest.mark.parametrize("outputs", WINOGRAD_OUTPUTS)
def test_choices(main_target: Target, outputs: int) -> None:
    """The default is the kernel itself; others give the same result."""
    target = dataclasses.replace(main_target, threads=2)
    spec = conv(48, 72, height=14, width=15, padding=(1, 1, 1, 1), batch=2)
    packed, _ = transformed(spec, arguments(spec)[1], outputs, target)
    space = search_space(prim_func(packed), target)
    assert space is not None and space.template == FORM
    choices = list(space)
    assert choices[0] == space.default and all(space.contains(choice) for choice in choices)
    plain = schedule(prim_func(packed), target)
    chosen = schedule(prim_func(packed), target, space.default)
    assert tvm_ffi.structural_equal(plain, chosen.without_attr(CHOICE_ATTR))
    for choice in random.Random(0).sample(choices, 4):
        check(spec, target, outputs, choice)


@pytest.mark.parametrize("channels", [32, 37])
def test_epilogue(main_target: Target, channels: int) -> None:
    """Bias, residual and ReLU, over whole and partial vectors."""
    spec = conv(16, channels, height=10, width=9, padding=(1, 1, 1, 1))
    data, weight = arguments(spec)
    packed, array = transformed(spec, weight, 4, main_target)
    inputs, acc = describe(packed)
    shape = spec.output_shape
    bias = te.placeholder((channels,), "float32", name="bias")
    other = te.placeholder(shape, "float32", name="other")
    total = te.compute(shape, lambda *i: acc[i] + bias[i[-1]], name="total")
    added = te.compute(shape, lambda *i: total[i] + other[i], name="added")
    out = te.compute(shape, lambda *i: te.max(added[i], 0.0), name="out")
    func = te.create_prim_func([*inputs, bias, other, out]).without_attr("global_symbol")
    func = schedule(func, main_target)
    assert func.attrs[SCHEDULE_ATTR] == FORM
    rng = np.random.default_rng(1)
    extra = [rng.standard_normal(channels, "float32"), rng.standard_normal(shape, "float32")]
    (result,) = run(func, main_target, [data, array, *extra], (shape, "float32"))
    assert_close(result, np.maximum(reference(spec, data, weight) + extra[0] + extra[1], 0))


def test_error_is_near_that_of_direct_sums(main_target: Target) -> None:
    """ReLU'd data, He-initialised weights, 256 channels: the root of the mean squared error stays
    below 2e-6 of the values'."""
    spec = conv(256, 32, height=16, width=16, padding=(1, 1, 1, 1))
    rng = np.random.default_rng(0)
    data = np.maximum(rng.standard_normal(spec.data_shape, "float32"), 0)
    weight = rng.standard_normal(spec.weight_shape, "float32") * np.float32((2 / 9 / 256) ** 0.5)
    expected = reference(spec, data.astype("float64"), weight.astype("float64"))
    for outputs in WINOGRAD_OUTPUTS:
        packed, array = transformed(spec, weight, outputs, main_target)
        func = schedule(prim_func(packed), main_target)
        (result,) = run(func, main_target, [data, array], (expected.shape, "float32"))
        error = np.sqrt(np.mean((result - expected) ** 2) / np.mean(expected**2))
        assert error < 2e-6


def layout_of(spec: Conv2dSpec, target: Target) -> str:
    weight = np.zeros(spec.plain_weight_shape, spec.weight_storage_dtype)
    packed = pack_weight(spec, weight, target)
    return spec.weight_layout if packed is None else packed[0].weight_layout


def square(side: int, channels: int) -> Conv2dSpec:
    return conv(channels, channels, height=side, width=side, padding=(1, 1, 1, 1))


def test_where_it_pays(main_target: Target) -> None:
    """4 outputs a side where many positions share a weight, 2 where few do; a weight that memory
    is busy with anyway stays as it is."""
    for side, channels in ((56, 64), (28, 128), (14, 256), (32, 16)):
        assert layout_of(square(side, channels), main_target).endswith("F4")
    assert layout_of(square(7, 512), main_target).endswith("F2")
    assert "F" not in layout_of(square(2, 1024), main_target)


@pytest.mark.parametrize(
    "fields",
    [
        {"strides": (2, 2)},
        {"dilation": (2, 2)},
        {"groups": 2},
        {"kernel": (5, 5)},
        {"height": 3},
        {"weight_dtype": "int8"},
        UINT8,
    ],
    ids=str,
)
def test_where_it_does_not_apply(main_target: Target, fields: dict[str, Any]) -> None:
    assert "F" not in layout_of(conv(32, 32, width=28, **fields), main_target)


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
def test_instructions(name: str) -> None:
    """The reduction's loop: a multiply-add for every accumulator and step, one load for every
    register of weights, nothing spilled."""
    target = dataclasses.replace(get_target(name), threads=1)
    spec = square(28, 64)
    packed, _ = transformed(spec, np.zeros(spec.weight_shape, "float32"), 4, target)
    func = schedule(prim_func(packed), target).with_attr("global_symbol", "main")
    text = tvm.compile(func, target.tvm_target()).mod.inspect_source("asm")
    space = search_space(prim_func(packed), target)
    assert space is not None
    positions, vectors = space.default["positions"], space.default["vectors"]
    loops = re.findall(r"\n(\.LBB\d+_\d+):((?:(?!\n\.LBB).)*?)\tj\w+\t\1\n", text, re.DOTALL)
    reductions = [body for _, body in loops if "vfmadd231ps" in body and "vaddps" not in body]
    inner = max(reductions, key=len)  # that of whole tiles
    register = "zmm" if target.vector_bits == 512 else "ymm"
    products = re.findall(rf"vfmadd231ps\t.*, %{register}\d+\n", inner)
    steps = len(products) // (positions * vectors)
    assert steps >= 1 and len(products) == steps * positions * vectors
    assert len(re.findall(rf"vmovup[sd]\t.*, %{register}\d+\n", inner)) <= steps * vectors
    assert "rsp" not in inner and not re.search(r"vmov\w+\t%[xyz]mm\d+, ", inner)
