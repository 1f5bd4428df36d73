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
from tvm_compress.targets import Target, get_target

from .kernels import UINT8, arguments, run

FORM = "x86.winograd"
OUTPUTS = tuple(winograd.POINTS)
# Of the largest value, for standard normal data and weights; the direct kernels stay below 1e-6.
TOLERANCE = 4e-6


def conv(ci: int, co: int, **fields: Any) -> Conv2dSpec:
    base: dict[str, Any] = {"batch": 1, "height": 9, "width": 11, "kernel": (3, 3)}
    return Conv2dSpec(**{**base, "in_channels": ci, "out_channels": co, **fields})


def square(side: int, channels: int) -> Conv2dSpec:
    return conv(channels, channels, height=side, width=side, padding=(1, 1, 1, 1))


def chosen(outputs: int, **changes: int) -> dict[str, int]:
    """A choice that fits every target and the shapes here."""
    base = {"band": 1, "parts": 1, "positions": 1, "vectors": 1, "early": 0, "unroll": 1}
    return {"outputs": outputs, **base, **changes}


def packed(spec: Conv2dSpec, weight: np.ndarray, target: Target) -> tuple[Any, np.ndarray]:
    found = pack_weight(spec, weight, target)
    assert found is not None
    return found


def check(spec: Conv2dSpec, target: Target, choice: dict[str, int]) -> None:
    """Pack, schedule, compile, run, compare."""
    data, weight = arguments(spec)
    expected = reference(spec, data, weight)
    changed, array = packed(spec, weight, target)
    func = schedule(prim_func(changed), target, choice)
    assert func.attrs[SCHEDULE_ATTR] == FORM
    (result,) = run(func, target, [data, array], (expected.shape, "float32"))
    if target.runs_here():
        assert_close(result, expected)


def assert_close(result: np.ndarray, expected: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(result / scale, expected / scale, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_matrices(outputs: int) -> None:
    """Equation 8 of Lavin and Gray, in float64."""
    side = winograd.side(outputs)
    a, b, g = (
        matrix(outputs)
        for matrix in (winograd.output_matrix, winograd.data_matrix, winograd.weight_matrix)
    )
    rng = np.random.default_rng(0)
    data, weight = rng.normal(size=(side, side)), rng.normal(size=(3, 3))
    expected = [
        [np.sum(data[i : i + 3, j : j + 3] * weight) for j in range(outputs)]
        for i in range(outputs)
    ]
    result = a @ ((g @ weight @ g.T) * (b @ data @ b.T)) @ a.T
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_every_target(target: Target, outputs: int) -> None:
    check(conv(20, 40, padding=(1, 1, 1, 1)), target, chosen(outputs, positions=2, vectors=2))


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(
    ("height", "width", "padding"),
    [(6, 6, 0), (4, 8, 1), (7, 5, 1), (4, 4, 2), (17, 6, 1), (8, 13, (0, 2, 1, 0))],
)
def test_ragged_images(
    main_target: Target, outputs: int, height: int, width: int, padding: Any
) -> None:
    sides = padding if isinstance(padding, tuple) else (padding,) * 4
    spec = conv(8, 16, height=height, width=width, padding=sides)
    check(spec, main_target, chosen(outputs, early=1))


@pytest.mark.parametrize("channels", [(1, 8), (3, 16), (7, 3), (17, 33), (32, 20), (256, 16)])
def test_ragged_channels(main_target: Target, channels: tuple[int, int]) -> None:
    spec = conv(*channels, padding=(1, 1, 1, 1), batch=2)
    check(spec, main_target, chosen(4, band=2, positions=4))


@pytest.mark.parametrize("choice", [{"parts": 2, "vectors": 2}, {"early": 1}], ids=str)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_threads(main_target: Target, outputs: int, choice: dict[str, int]) -> None:
    """Parts of the channels, bands, and the weights' transform, on two threads."""
    target = dataclasses.replace(main_target, threads=2)
    spec = conv(64, 80, height=18, width=13, padding=(1, 1, 1, 1))
    check(spec, target, chosen(outputs, band=3, positions=2, **choice))


def test_result_does_not_depend_on_threads() -> None:
    """Tiles that overlap at the end of the image are written in one order."""
    spec = conv(32, 32, height=15, width=14, padding=(1, 1, 1, 1))
    data, weight = arguments(spec)
    results = []
    for threads in (1, 2):
        target = dataclasses.replace(get_target("host"), threads=threads)
        changed, array = packed(spec, weight, target)
        func = schedule(prim_func(changed), target, chosen(4, early=1))
        results += [
            run(func, target, [data, array], (spec.output_shape, "float32"))[0] for _ in range(2)
        ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_choices(main_target: Target, threads: int) -> None:
    """The default is the kernel itself; others give the same result."""
    target = dataclasses.replace(main_target, threads=threads)
    spec = conv(48, 72, height=18, width=21, padding=(1, 1, 1, 1), batch=2)
    changed, _ = packed(spec, arguments(spec)[1], target)
    space = search_space(prim_func(changed), target)
    assert space is not None and space.template == FORM
    choices = list(space)
    assert choices[0] == space.default and all(space.contains(choice) for choice in choices)
    assert {choice["outputs"] for choice in choices} == set(OUTPUTS)
    plain = schedule(prim_func(changed), target)
    default = schedule(prim_func(changed), target, space.default)
    assert tvm_ffi.structural_equal(plain, default.without_attr(CHOICE_ATTR))
    for choice in random.Random(0).sample(choices, 5):
        check(spec, target, dict(choice))


@pytest.mark.parametrize("channels", [32, 37])
def test_epilogue(main_target: Target, channels: int) -> None:
    """Bias, residual and ReLU, over whole and partial vectors."""
    spec = conv(16, channels, height=10, width=9, padding=(1, 1, 1, 1))
    data, weight = arguments(spec)
    changed, array = packed(spec, weight, main_target)
    inputs, acc = describe(changed)
    shape = spec.output_shape
    bias = te.placeholder((channels,), "float32", name="bias")
    other = te.placeholder(shape, "float32", name="other")
    total = te.compute(shape, lambda *i: acc[i] + bias[i[-1]], name="total")
    added = te.compute(shape, lambda *i: total[i] + other[i], name="added")
    out = te.compute(shape, lambda *i: te.max(added[i], 0.0), name="out")
    func = te.create_prim_func([*inputs, bias, other, out]).without_attr("global_symbol")
    func = schedule(func, main_target, chosen(4))
    assert func.attrs[SCHEDULE_ATTR] == FORM
    rng = np.random.default_rng(1)
    extra = [rng.standard_normal(n, "float32") for n in (channels, shape)]
    (result,) = run(func, main_target, [data, array, *extra], (shape, "float32"))
    assert_close(result, np.maximum(reference(spec, data, weight) + extra[0] + extra[1], 0))


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_error_is_near_that_of_direct_sums(main_target: Target, outputs: int) -> None:
    """ReLU'd data, He-initialised weights, 256 channels: the root of the mean squared error stays
    below 2e-6 of the values'."""
    spec = conv(256, 32, height=16, width=16, padding=(1, 1, 1, 1))
    rng = np.random.default_rng(0)
    data = np.maximum(rng.standard_normal(spec.data_shape, "float32"), 0)
    weight = rng.standard_normal(spec.weight_shape, "float32") * np.float32((2 / 9 / 256) ** 0.5)
    expected = reference(spec, data, weight).astype("float64")
    changed, array = packed(spec, weight, main_target)
    func = schedule(prim_func(changed), main_target, chosen(outputs))
    (result,) = run(func, main_target, [data, array], (expected.shape, "float32"))
    assert np.sqrt(np.mean((result - expected) ** 2) / np.mean(expected**2)) < 2e-6


def form_of(spec: Conv2dSpec, target: Target) -> str:
    weight = np.zeros(spec.plain_weight_shape, spec.weight_storage_dtype)
    return str(schedule(prim_func(packed(spec, weight, target)[0]), target).attrs[SCHEDULE_ATTR])


def test_where_it_pays(main_target: Target) -> None:
    """Not where few positions share the transform of a weight, or few channels that of the data."""
    main_target = dataclasses.replace(main_target, threads=1)
    for side, channels in ((56, 64), (28, 128), (14, 256), (32, 16)):
        assert form_of(square(side, channels), main_target) == FORM
    shared = dataclasses.replace(main_target, threads=2)
    assert form_of(square(56, 64), shared) == FORM
    assert form_of(square(32, 16), shared) == "x86.matrix"  # too small for two threads
    assert form_of(square(2, 512), main_target) == "x86.matrix"
    assert form_of(conv(1, 4, padding=(1, 1, 1, 1)), main_target) == "x86.matrix"


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
    base = {"height": 28, "width": 28}
    assert form_of(conv(64, 64, **base), main_target) == FORM
    assert form_of(conv(64, 64, **{**base, **fields}), main_target) == "x86.matrix"


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
def test_instructions(name: str) -> None:
    """The reduction's loop: a multiply-add for every accumulator and step, one load for every
    register of weights, nothing spilled."""
    target = dataclasses.replace(get_target(name), threads=1)
    spec = square(28, 64)
    changed, _ = packed(spec, np.zeros(spec.weight_shape, "float32"), target)
    func = schedule(prim_func(changed), target).with_attr("global_symbol", "main")
    text = tvm.compile(func, target.tvm_target()).mod.inspect_source("asm")
    space = search_space(prim_func(changed), target)
    assert space is not None
    positions, vectors = space.default["positions"], space.default["vectors"]
    loops = re.findall(r"\n(\.LBB\d+_\d+):((?:(?!\n\.LBB).)*?)\tj\w+\t\1\n", text, re.DOTALL)
    store = re.compile(r"\tv?mov\w+\t%[xyz]mm\d+, .*\(")
    reductions = [body for _, body in loops if "vfmadd" in body and not store.search(body)]
    inner = max(reductions, key=len)  # that of whole tiles
    register = "zmm" if target.vector_bits == 512 else "ymm"
    products = re.findall(rf"vfmadd231ps\t.*, %{register}\d+\n", inner)
    steps = len(products) // (positions * vectors)
    assert steps >= 1 and len(products) == steps * positions * vectors
    assert len(re.findall(rf"vmovup[sd]\t.*, %{register}\d+\n", inner)) <= steps * vectors
    assert "rsp" not in inner and not re.search(r"vmov\w+\t%[xyz]mm\d+, ", inner)
