"""Kernels by rows: softmax and layer norm, integer ones bit for bit, float ones to rounding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from tvm_compress.schedules import SCHEDULE_ATTR, schedule
from tvm_compress.schedules.layer_norm import FRACTION_BITS, layer_norm
from tvm_compress.schedules.softmax import RECIPROCAL_BITS, softmax, table_bits
from tvm_compress.targets import Target, get_target

from .kernels import assert_same, naive, run

FORM = "default.rows"


def softmax_table(length: int, reciprocal: int, input_scale: float) -> np.ndarray:
    bits = table_bits(length, reciprocal)
    return np.round(2.0**bits * np.exp(-np.arange(256) * input_scale)).astype(np.int32)


def exact_softmax(x: np.ndarray, table: np.ndarray, reciprocal: int, zero_point: int) -> np.ndarray:
    """In Python's integers."""
    result = np.empty(x.shape, np.int64)
    for row in np.ndindex(x.shape[:-1]):
        codes = x[row].astype(np.int64)
        exps = [int(table[d]) for d in codes.max() - codes]
        divisor = sum(exps) << RECIPROCAL_BITS
        for column, e in enumerate(exps):
            whole, rest = divmod(e * reciprocal, divisor)
            up = 2 * rest > divisor or (2 * rest == divisor and whole % 2 == 1)
            result[(*row, column)] = whole + up + zero_point
    return np.clip(result, -128, 127).astype(np.int8)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 64, 130, 1000])
@pytest.mark.parametrize("scale", [1 / 256, 1 / 255, 0.0037])
def test_integer_softmax(main_target: Target, length: int, scale: float) -> None:
    reciprocal, zero_point = round(2**RECIPROCAL_BITS / scale), -128
    func = softmax([3, 5, length], 2, "int8", reciprocal, zero_point, (-128, 127), "int8")
    after = schedule(func, main_target)
    assert after.attrs[SCHEDULE_ATTR] == FORM
    rng = np.random.default_rng(length)
    for input_scale in (0.001, 0.05, 0.3):
        table = softmax_table(length, reciprocal, input_scale)
        x = rng.integers(-128, 128, (3, 5, length), dtype=np.int8)
        (ours,) = run(after, main_target, [x, table], (x.shape, "int8"))
        np.testing.assert_array_equal(ours, exact_softmax(x, table, reciprocal, zero_point))


def test_integer_softmax_of_ties(main_target: Target) -> None:
    """Quotients of exactly half a step, which float32 cannot decide: 1 / (2 k) of 256 steps."""
    length, reciprocal = 512, 256 << RECIPROCAL_BITS
    func = softmax([40, length], 1, "int8", reciprocal, -128, (-128, 127), "int8")
    table = np.zeros(256, np.int32)
    table[0] = 1 << 20  # only the largest code counts: e / sum is one over their number
    x = np.full((40, length), -128, np.int8)
    for row in range(40):
        x[row, : 12 * row + 1] = 5
    (ours,) = run(schedule(func, main_target), main_target, [x, table], (x.shape, "int8"))
    expected = exact_softmax(x, table, reciprocal, -128)
    assert any(256 * 2 % (12 * r + 1) == 0 for r in range(40))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("count", [512, 1024, 3072])
def test_half_of_a_step_rounds_to_even(main_target: Target, count: int) -> None:
    """All codes equal: every quotient is 256 / count, and 512 / 1024 gives exactly a half."""
    reciprocal = (256 if count != 3072 else 256 * 9) << RECIPROCAL_BITS  # 0.5, 0.25, 0.75
    func = softmax([2, count], 1, "int8", reciprocal, 0, (-128, 127), "int8")
    table = softmax_table(count, reciprocal, 0.1)
    x = np.full((2, count), 7, np.int8)
    (ours,) = run(schedule(func, main_target), main_target, [x, table], (x.shape, "int8"))
    np.testing.assert_array_equal(ours, exact_softmax(x, table, reciprocal, 0))


@pytest.mark.parametrize("channels", [1, 7, 16, 31, 384])
def test_integer_layer_norm(main_target: Target, channels: int) -> None:
    func = layer_norm([2, 9, channels], "int8", 1e-3, 3, (-128, 127), "int8")
    after = schedule(func, main_target)
    assert after.attrs[SCHEDULE_ATTR] == FORM
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (2, 9, channels), dtype=np.int8)
    gamma = (rng.standard_normal(channels) * 30 * 2**FRACTION_BITS).astype(np.float32)
    beta = rng.integers(-50 << FRACTION_BITS, 50 << FRACTION_BITS, channels, dtype=np.int32)
    arrays, shape = [x, gamma, beta], (x.shape, "int8")
    (ours,) = run(after, main_target, arrays, shape)
    (theirs,) = run(func, get_target("x86-64-v2"), arrays, shape)
    np.testing.assert_array_equal(ours, theirs)


def float_softmax(shape: tuple[int, ...]) -> tvm.tirx.PrimFunc:
    x = te.placeholder(shape, "float32", name="x")
    k1, k2 = (te.reduce_axis((0, shape[-1]), name) for name in ("k1", "k2"))
    peak = te.compute(shape[:-1], lambda *i: te.max(x[(*i, k1)], axis=k1), name="peak")
    exps = te.compute(shape, lambda *i: tirx.exp(x[i] - peak[i[:-1]]), name="exps")
    total = te.compute(shape[:-1], lambda *i: te.sum(exps[(*i, k2)], axis=k2), name="total")
    return naive([x], [te.compute(shape, lambda *i: exps[i] / total[i[:-1]], name="out")])


@pytest.mark.parametrize("shape", [(1, 4, 1), (6, 5), (3, 128), (2, 3, 16), (400, 200)], ids=str)
def test_float_softmax(main_target: Target, shape: tuple[int, ...]) -> None:
    after = schedule(float_softmax(shape), main_target)
    assert after.attrs[SCHEDULE_ATTR] == FORM
    x = (np.random.default_rng(0).standard_normal(shape) * 8).astype(np.float32)
    (ours,) = run(after, main_target, [x], (shape, "float32"))
    wide = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    assert_same(ours, (wide / wide.sum(-1, keepdims=True)).astype(np.float32))


def test_float_sums_that_become_codes_keep_their_order(main_target: Target) -> None:
    x = te.placeholder((4, 40), "float32", name="x")
    k = te.reduce_axis((0, 40), "k")
    total = te.compute((4,), lambda i: te.sum(x[i, k], axis=k), name="total")
    codes = te.compute((4, 40), lambda i, j: (x[i, j] * total[i]).astype("int8"), name="codes")
    assert schedule(naive([x], [codes]), main_target).attrs[SCHEDULE_ATTR] == "default.reduction"


def elementwise(function: Any, values: np.ndarray, target: Target) -> np.ndarray:
    x = te.placeholder(values.shape, "float32", name="x")
    out = te.compute(values.shape, lambda i: function(x[i]), name="out")
    (result,) = run(
        schedule(naive([x], [out]), target), target, [values], (values.shape, "float32")
    )
    return result


SPECIAL = np.array(
    [0, -0.0, 1, -1, 88.7, 88.9, -87, -88, -200, 1e-30, np.inf, -np.inf, np.nan], np.float32
)


def test_exp(main_target: Target) -> None:
    values = np.concatenate([np.linspace(-86, 88.7, 20_003, dtype=np.float32), SPECIAL])
    with np.errstate(over="ignore"):
        expected = np.exp(values.astype(np.float64)).astype(np.float32)
    expected[expected < 2.0**-125] = 0
    np.testing.assert_allclose(elementwise(tirx.exp, values, main_target), expected, rtol=5e-7)


def test_erf(main_target: Target) -> None:
    values = np.concatenate([np.linspace(-6, 6, 20_003, dtype=np.float32), SPECIAL])
    expected = np.array([math.erf(v) for v in values.astype(np.float64)], np.float32)
    np.testing.assert_allclose(elementwise(tirx.erf, values, main_target), expected, rtol=5e-7)
