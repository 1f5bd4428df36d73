"""Products of two activations: exact over zero points, ragged sizes and both forms of b."""

from __future__ import annotations

from typing import Any

import pytest
from tvm import te

from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    BatchMatmulSpec,
    describe,
    schedule,
)
from tvm_compress.targets import Target

from .kernels import arguments, assert_same, check, naive, run

FORM = "x86.batch_matmul"
INTEGERS: list[dict[str, Any]] = [
    {"a_dtype": a, "b_dtype": b, "a_zero_point": za, "b_zero_point": zb, "acc_dtype": "int32"}
    for a, b, za, zb in (
        ("int8", "int8", 0, 0),
        ("int8", "int8", -128, 5),
        ("int8", "int8", 127, -128),
        ("uint8", "int8", 0, 7),
        ("uint8", "uint8", 255, 128),
        ("int8", "uint8", 3, 255),
    )
]


def product(**fields: Any) -> BatchMatmulSpec:
    return BatchMatmulSpec(**{"batch": 2, "rows": 13, "depth": 20, "columns": 40, **fields})


@pytest.mark.parametrize("fields", [{}, *INTEGERS], ids=str)
def test_every_dtype_on_every_target(target: Target, fields: dict[str, Any]) -> None:
    check(product(**fields), target, FORM, extreme=True)
    check(product(**fields, transpose_b=True), target, FORM)


@pytest.mark.parametrize("columns", [1, 3, 8, 15, 17, 100])
def test_ragged_columns(main_target: Target, columns: int) -> None:
    check(product(columns=columns), main_target, FORM)
    check(product(columns=columns, **INTEGERS[2]), main_target, FORM)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 64, 65, 1024])
def test_ragged_depth(main_target: Target, depth: int) -> None:
    for transposed in (False, True):
        spec = product(depth=depth, transpose_b=transposed)
        check(spec, main_target, FORM)
        check(spec.replace(**INTEGERS[1]), main_target, FORM)
        check(spec.replace(**INTEGERS[4]), main_target, FORM)


@pytest.mark.parametrize("rows", [1, 6, 7, 8])
@pytest.mark.parametrize("batch", [1, 5])
def test_rows_and_batches(main_target: Target, rows: int, batch: int) -> None:
    check(product(rows=rows, batch=batch, b_batch=1), main_target, FORM)
    check(product(rows=rows, batch=batch, **INTEGERS[1]), main_target, FORM)


def test_large_enough_for_threads(main_target: Target) -> None:
    check(product(batch=1, rows=150, depth=96, columns=200), main_target, FORM)
    check(product(batch=3, rows=150, depth=96, columns=200, **INTEGERS[2]), main_target, FORM)


@pytest.mark.parametrize(
    "fields",
    [
        {"a_dtype": "int16", "b_dtype": "int8", "acc_dtype": "int64"},
        {**INTEGERS[0], "depth": 10_000, "rows": 2, "columns": 3},  # sums could leave int32
    ],
    ids=str,
)
def test_what_it_does_not_take(main_target: Target, fields: dict[str, Any]) -> None:
    check(product(**fields), main_target, "default.batch_matmul")


def test_both_sides_one_tensor(main_target: Target) -> None:
    """x @ x: the block reads one buffer."""
    spec = product(rows=16, depth=16, columns=16)
    (a, _), _ = describe(spec)
    k = te.reduce_axis((0, 16), "k")
    out = te.compute(
        spec.output_shape,
        lambda i, m, n: te.sum(a[i, m, k] * a[i, k, n], axis=k),
        attrs={"tvm_compress.kernel": spec.to_json()},
    )
    func = naive([a], [out])
    after = schedule(func, main_target)
    assert after.attrs[SCHEDULE_ATTR] == FORM
    (x, _) = arguments(spec)
    shape = (spec.output_shape, "float32")
    (ours,), (theirs,) = (run(f, main_target, [x], shape) for f in (after, func))
    assert_same(ours, theirs)


@pytest.mark.parametrize("columns", [5, 32, 37])
def test_epilogue(main_target: Target, columns: int) -> None:
    """Requantisation behind it, in registers."""
    spec = product(columns=columns, **INTEGERS[1])
    inputs, acc = describe(spec)
    bias = te.placeholder((1,), "int32", name="bias")
    out = te.compute(
        spec.output_shape,
        lambda *i: te.max(te.min((acc[i] + bias[0]) >> 10, 127), -128).astype("int8"),
        name="shifted",
    )
    func = naive([*inputs, bias], [out])
    after = schedule(func, main_target)
    assert after.attrs[SCHEDULE_ATTR] == FORM
    arrays = [*arguments(spec), arguments(spec)[0].astype("int32").reshape(-1)[:1]]
    shape = (spec.output_shape, "int8")
    (ours,), (theirs,) = (run(f, main_target, arrays, shape) for f in (after, func))
    assert_same(ours, theirs)
