"""Sparse convolutions: encoding, the naive kernel, and the one on vectors of channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tvm import te

from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    SparseConv2dSpec,
    describe,
    prim_func,
    reference,
    schedule,
    search_space,
)
from tvm_compress.schedules.conv2d import reference as dense_reference
from tvm_compress.schedules.saturation import NarrowSums
from tvm_compress.schedules.sparse_conv2d import (
    decode,
    encode,
    group_entries,
    offsets_of,
)
from tvm_compress.targets import Target, get_target

from .kernels import FLOAT_TOLERANCE, random_array, run

LEVELS = ["x86-64-v2", "x86-64-v3", "x86-64-v4"]
SHAPES: list[dict[str, Any]] = [
    {"height": 1, "width": 7, "in_channels": 33, "out_channels": 16, "kernel": (1, 1)},
    {"height": 1, "width": 5, "in_channels": 20, "out_channels": 37, "kernel": (1, 1),
     "is_flat": True},
    {"height": 5, "width": 5, "in_channels": 16, "out_channels": 40, "kernel": (1, 1)},
    {"height": 9, "width": 11, "in_channels": 8, "out_channels": 21, "kernel": (3, 3),
     "padding": (1, 1, 1, 1)},
    {"height": 9, "width": 6, "in_channels": 5, "out_channels": 16, "kernel": (3, 2),
     "strides": (2, 1), "padding": (0, 1, 2, 0), "batch": 2},
    {"height": 8, "width": 64, "in_channels": 4, "out_channels": 64, "kernel": (3, 3),
     "dilation": (2, 2), "padding": (2, 0, 2, 0)},
    {"height": 6, "width": 6, "in_channels": 12, "out_channels": 3, "kernel": (1, 1),
     "strides": (2, 2)},
]  # fmt: skip


def problem(
    block: int, sparsity: float, seed: int = 0, by_channel: bool = False, **fields: Any
) -> tuple[SparseConv2dSpec, list[np.ndarray], np.ndarray]:
    """A layer with `sparsity` of its blocks removed: spec, arguments and dense weight [K, N]."""
    rng = np.random.default_rng(seed)
    fields = {"batch": 1, **fields}
    taps = fields["kernel"][0] * fields["kernel"][1]
    reduction, outputs = taps * fields["in_channels"], fields["out_channels"]
    kept = rng.random((reduction, -(-outputs // block))) >= sparsity
    weight = random_array(rng, (reduction, outputs), "float32")
    weight *= kept.repeat(block, axis=1)[:, :outputs]
    values, positions, starts = encode(weight, block, taps=taps if by_channel else 1)
    spec = SparseConv2dSpec(
        block=block, entries=len(values), longest=int(np.diff(starts).max()),
        by_channel=by_channel, **fields,
    )  # fmt: skip
    data = random_array(rng, spec.data_shape, "float32")
    return spec, [data, values, offsets_of(spec, positions), starts], weight


def expected(spec: SparseConv2dSpec, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    dense = spec.dense
    result = dense_reference(
        dense, data.reshape(dense.data_shape), weight.reshape(dense.weight_shape)
    )
    return result.reshape(spec.output_shape)


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("shape", [(1, 1), (40, 17), (7, 48)])
def test_encoding_round_trip(block: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=shape).astype(np.float32) * (rng.random(shape) < 0.2)
    values, positions, starts = encode(weight, block)
    assert np.array_equal(decode(values, positions, starts, shape), weight)
    # A kept weight that happens to be zero stays an entry.
    kept = np.ones(shape, bool)
    values, positions, starts = encode(np.zeros(shape, np.float32), block, kept)
    assert len(values) == shape[0] * -(-shape[1] // block)
    assert not decode(values, positions, starts, shape).any()


@pytest.mark.parametrize("fields", SHAPES)
@pytest.mark.parametrize("block", [1, 16])
def test_reference_is_the_dense_layer(block: int, fields: dict[str, Any]) -> None:
    spec, inputs, weight = problem(block, 0.7, **fields)
    np.testing.assert_array_equal(reference(spec, *inputs), expected(spec, inputs[0], weight))


def compare(spec: SparseConv2dSpec, target: Target, inputs: list[np.ndarray], func: Any) -> None:
    result = run(func, target, inputs, (spec.output_shape, spec.acc_dtype))[0]
    if target.runs_here():
        wanted = reference(spec, *inputs)
        limit = FLOAT_TOLERANCE * max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(result, wanted, rtol=0, atol=limit)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fields", SHAPES)
def test_blocks(fields: dict[str, Any], level: str) -> None:
    target = get_target(level)
    spec, inputs, _ = problem(16, 0.7, **fields)
    func = schedule(prim_func(spec), target)
    assert func.attrs[SCHEDULE_ATTR] == "sparse"
    compare(spec, target, inputs, func)


@pytest.mark.parametrize("fields", SHAPES[1:3])
def test_epilogue(fields: dict[str, Any]) -> None:
    """Bias and ReLU behind the sums, in one kernel."""
    target = get_target("x86-64-v3")
    spec, inputs, _ = problem(16, 0.7, **fields)
    arguments, acc = describe(spec)
    bias = te.placeholder((spec.out_channels,), "float32", name="bias")
    total = te.compute(acc.shape, lambda *i: acc[i] + bias[i[-1]], name="total")
    out = te.compute(acc.shape, lambda *i: te.max(total[i], 0.0), name="out")
    func = schedule(te.create_prim_func([*arguments, bias, out]), target)
    assert func.attrs[SCHEDULE_ATTR] == "sparse"
    added = random_array(np.random.default_rng(9), (spec.out_channels,), "float32")
    result = run(func, target, [*inputs, added], (spec.output_shape, "float32"))[0]
    wanted = np.maximum(reference(spec, *inputs) + added, 0)
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-4)


def byte_problem(
    sparsity: float, group: int, largest: int = 127, seed: int = 0, **fields: Any
) -> tuple[SparseConv2dSpec, list[np.ndarray]]:
    """The same with bytes, in groups."""
    rng = np.random.default_rng(seed)
    float_spec, _, weight = problem(16, sparsity, seed, **fields)
    codes = rng.integers(-largest, largest + 1, weight.shape)
    codes = np.where(weight != 0, codes, 0).astype(np.int8)
    values, positions, starts = group_entries(*encode(codes, 16, weight != 0), group)
    spec = float_spec.replace(
        data_dtype="uint8", weight_dtype="int8", acc_dtype="int32", group=group,
        entries=len(positions), longest=int(np.diff(starts).max()), pad_value=7,
        chain=NarrowSums((0, 255), 2).longest_chain(values, starts),
    )  # fmt: skip
    data = rng.integers(0, 256, spec.data_shape).astype(np.uint8)
    return spec, [data, values, offsets_of(spec, positions), starts]


BYTE_SHAPES: list[dict[str, Any]] = [
    *SHAPES,
    {"height": 7, "width": 7, "in_channels": 64, "out_channels": 32, "kernel": (3, 3),
     "padding": (1, 1, 1, 1), "batch": 2},
    {"height": 18, "width": 35, "in_channels": 19, "out_channels": 21, "kernel": (3, 3),
     "padding": (1, 1, 1, 1)},
    {"height": 19, "width": 37, "in_channels": 20, "out_channels": 35, "kernel": (3, 3),
     "strides": (2, 2), "padding": (0, 0, 1, 1)},
    {"height": 11, "width": 16, "in_channels": 17, "out_channels": 16, "kernel": (5, 3),
     "strides": (2, 3), "dilation": (1, 2), "padding": (2, 1, 2, 1)},
    {"height": 17, "width": 17, "in_channels": 48, "out_channels": 16, "kernel": (1, 1),
     "strides": (2, 2)},
    {"height": 9, "width": 1, "in_channels": 8, "out_channels": 16, "kernel": (1, 1),
     "strides": (2, 1), "batch": 2},
]  # fmt: skip


@pytest.mark.parametrize("fields", BYTE_SHAPES)
def test_bytes(fields: dict[str, Any]) -> None:
    for sparsity in (0.8, 0.0):
        compare_bytes("x86-64-v4-vnni", *byte_problem(sparsity, 4, **fields))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fields", BYTE_SHAPES[4:6])
def test_bytes_in_pairs(fields: dict[str, Any], level: str) -> None:
    compare_bytes(level, *byte_problem(0.7, 2, **fields))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_bytes_in_chains(level: str) -> None:
    """Weights that prove that several products may be added in 16 bits, data that use it."""
    spec, inputs = byte_problem(0.7, 4, 30, **BYTE_SHAPES[5])
    assert spec.chain >= 2
    inputs[0][:] = 255
    compare_bytes(level, spec, inputs)


def compare_bytes(level: str, spec: SparseConv2dSpec, inputs: list[np.ndarray]) -> None:
    target = get_target(level)
    func = schedule(prim_func(spec), target)
    assert func.attrs[SCHEDULE_ATTR] == "x86.sparse_bytes"
    result = run(func, target, inputs, (spec.output_shape, "int32"))[0]
    if target.runs_here():
        np.testing.assert_array_equal(result, reference(spec, *inputs))


@pytest.mark.parametrize("block", [4, 8, 32, 64])
def test_other_blocks(block: int) -> None:
    target = get_target("x86-64-v3")
    spec, inputs, _ = problem(block, 0.6, seed=2, **SHAPES[3])
    func = schedule(prim_func(spec), target)
    assert func.attrs[SCHEDULE_ATTR] == "sparse"
    compare(spec, target, inputs, func)


@pytest.mark.parametrize("block", [1, 3])
def test_without_a_vector_form(block: int) -> None:
    target = get_target("x86-64-v3")
    spec, inputs, _ = problem(block, 0.6, seed=3, **SHAPES[3])
    compare(spec, target, inputs, schedule(prim_func(spec), target))


def test_all_and_nothing() -> None:
    """Blocks without entries, and a layer with all of them."""
    target = get_target("x86-64-v3")
    for sparsity in (0.0, 0.97):
        spec, inputs, _ = problem(16, sparsity, seed=4, **SHAPES[5])
        compare(spec, target, inputs, schedule(prim_func(spec), target))


def test_every_choice_is_exact() -> None:
    target = replace(get_target("x86-64-v3"), threads=2)
    spec, inputs, _ = problem(32, 0.7, seed=5, **SHAPES[5])
    space = search_space(prim_func(spec), target)
    assert space is not None
    choices = list(space)
    assert len(choices) > 50 and space.contains(choices[0])
    for choice in choices[:: len(choices) // 8]:
        compare(spec, target, inputs, schedule(prim_func(spec), target, choice))
