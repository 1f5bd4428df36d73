"""Sparse convolutions on vectors of positions, for weights whose zeros lie anywhere."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    Conv2dSpec,
    SparseConv2dSpec,
    describe,
    prim_func,
    reference,
    schedule,
    search_space,
    sparse_parts,
)
from tvm_compress.schedules.choice import Choice
from tvm_compress.schedules.matrix import PARALLEL_MACS
from tvm_compress.schedules.paired_entries import pair_entries
from tvm_compress.schedules.saturation import NarrowSums
from tvm_compress.schedules.sparse_conv2d import (
    decode,
    encode,
    group_entries,
    offsets_of,
    positions_of,
)
from tvm_compress.schedules.sparse_weight import encoded, sparse_candidates
from tvm_compress.schedules.spec import SpecError, spec_from_json
from tvm_compress.schedules.x86.dot import ByteDot
from tvm_compress.targets import Target, get_target

from . import test_sparse
from .kernels import assert_same, random_array, run

# Of vpmaddubsw.
_SUMS = NarrowSums((0, 255), 2)
SHAPES: list[dict[str, Any]] = [
    {"height": 1, "width": 7, "in_channels": 33, "out_channels": 16, "kernel": (1, 1)},
    {"height": 1, "width": 5, "in_channels": 20, "out_channels": 37, "kernel": (1, 1),
     "is_flat": True},
    {"height": 7, "width": 7, "in_channels": 18, "out_channels": 40, "kernel": (1, 1), "batch": 2},
    {"height": 9, "width": 11, "in_channels": 8, "out_channels": 21, "kernel": (3, 3),
     "padding": (1, 1, 1, 1)},
    {"height": 9, "width": 6, "in_channels": 5, "out_channels": 16, "kernel": (3, 2),
     "strides": (2, 1), "padding": (0, 1, 2, 0), "batch": 2},
    {"height": 8, "width": 64, "in_channels": 4, "out_channels": 64, "kernel": (3, 3),
     "dilation": (2, 2), "padding": (2, 0, 2, 0)},
    {"height": 7, "width": 2, "in_channels": 12, "out_channels": 17, "kernel": (1, 1),
     "strides": (2, 2)},
    {"height": 19, "width": 37, "in_channels": 20, "out_channels": 35, "kernel": (3, 3),
     "strides": (2, 2), "padding": (0, 0, 1, 1)},
]  # fmt: skip


def problem(
    block: int, sparsity: float, seed: int = 0, **fields: Any
) -> tuple[SparseConv2dSpec, list[np.ndarray]]:
    """A layer with `sparsity` of its blocks removed: spec and arguments."""
    spec, inputs, _ = test_sparse.problem(block, sparsity, seed, by_channel=True, **fields)
    _, _, offsets, starts = inputs
    assert np.array_equal(offsets_of(spec, positions_of(spec, offsets)), offsets)
    assert all(np.all(np.diff(o.astype(int)) > 0) for o in np.split(offsets, starts[1:-1]))
    return spec, inputs


def check(
    spec: SparseConv2dSpec, inputs: list[np.ndarray], target: Target, choice: Choice | None = None,
    form: str = "x86.sparse_planes",
) -> None:  # fmt: skip
    func = schedule(prim_func(spec), target, choice)
    assert func.attrs[SCHEDULE_ATTR] == form
    result = run(func, target, inputs, (spec.output_shape, spec.acc_dtype))[0]
    if target.runs_here():
        assert_same(result, reference(spec, *inputs))


@pytest.mark.parametrize(("fields", "level"), [
    *((fields, level) for fields in SHAPES for level in ("x86-64-v3", "x86-64-v4")),
    (SHAPES[4], "x86-64-v2"),
])  # fmt: skip
def test_floats(fields: dict[str, Any], level: str) -> None:
    block = 1 + fields["in_channels"] % 2
    check(*problem(block, 0.7, **fields), get_target(level))


def in_code(sparsity: float, **fields: Any) -> tuple[SparseConv2dSpec, list[np.ndarray]]:
    """A layer whose spec has the pattern."""
    spec, inputs = problem(1, sparsity, **fields)
    spec = spec.replace(pattern=(*inputs[2].tolist(), *inputs[3].tolist()))
    assert spec_from_json(spec.to_json()) == spec
    return spec, inputs


@pytest.mark.parametrize(("fields", "level"), [
    *((fields, "x86-64-v4") for fields in SHAPES),
    *((fields, "x86-64-v3") for fields in SHAPES[2:7:2]),
])  # fmt: skip
def test_patterns_in_code(fields: dict[str, Any], level: str) -> None:
    sparsity = 0.98 if fields["in_channels"] == 4 else 0.7
    check(*in_code(sparsity, **fields), get_target(level), form="x86.sparse_compiled")


def test_patterns_in_code_on_two_threads() -> None:
    """Groups are shared out: a thread's part has one that does not exist."""
    target = replace(get_target("x86-64-v4"), threads=2)
    fields = {**SHAPES[3], "height": 5, "width": 64, "in_channels": 16, "out_channels": 37}
    spec, inputs = in_code(0.7, **fields)
    assert spec.macs >= PARALLEL_MACS
    check(spec, inputs, target, form="x86.sparse_compiled")


def test_code_reads_no_offsets() -> None:
    """An entry is one instruction, its weight an operand in memory or one broadcast before it."""
    target = get_target("x86-64-v4")
    spec, _ = in_code(0.7, **SHAPES[0])
    func = schedule(prim_func(spec), target).with_attr("global_symbol", "main")
    text = tvm.compile(func, target.tvm_target()).mod.inspect_source("asm")
    products = re.findall(r"vfmadd\w+\s.*", text)
    assert len(products) == spec.entries
    assert not re.search(r"zmm.*\(%rsp|\(%rsp.*zmm", text)  # nothing is spilled


def test_pattern_of_another_length_is_refused() -> None:
    spec, _ = in_code(0.7, **SHAPES[0])
    with pytest.raises(SpecError, match="a pattern of"):
        spec.replace(pattern=spec.pattern[1:])


@pytest.mark.parametrize(("share", "is_in_code"), [(0.1, True), (0.3, False)])
def test_few_weights_go_into_code(share: float, is_in_code: bool) -> None:
    spec = Conv2dSpec(batch=1, height=16, width=16, in_channels=32, out_channels=32, kernel=(3, 3),
                      padding=(1, 1, 1, 1))  # fmt: skip
    rng = np.random.default_rng(3)
    kept = rng.random((1, spec.reduction_size, 32)) < share
    forms = [form for _, form in sparse_candidates(spec, kept, get_target("x86-64-v3"))]
    assert forms[0].compiled == is_in_code == any(form.compiled for form in forms)
    stored = encoded(spec, np.where(kept, np.float32(1), np.float32(0)), forms[0])[0]
    assert bool(stored.pattern) == is_in_code


def byte_problem(
    block: int, sparsity: float, sums: NarrowSums | None = None, **fields: Any
) -> tuple[SparseConv2dSpec, list[np.ndarray]]:
    """The same with bytes, in groups of four; or in pairs that `sums` allows."""
    spec, inputs = problem(block, sparsity, **fields)
    rng = np.random.default_rng(1)
    shape = (spec.dense.reduction_size, spec.out_channels)
    kept = decode(inputs[1], positions_of(spec, inputs[2]), inputs[3], shape) != 0
    codes = np.where(kept, rng.choice([-128, -127, 127, 5], shape), 0).astype(np.int8)
    encoded = encode(codes, block, kept, taps=spec.kernel[0] * spec.kernel[1])
    if sums is not None:
        encoded = pair_entries(*encoded, sums)
    values, positions, starts = group_entries(*encoded, ByteDot.group)
    spec = spec.replace(
        data_dtype="uint8", weight_dtype="int8", acc_dtype="int32", group=ByteDot.group,
        entries=len(positions), longest=int(np.diff(starts).max()),
        pad_value=7 * any(spec.padding),
        chain=0 if sums is None else sums.longest_chain(values, starts),
    )  # fmt: skip
    data = rng.integers(0, 256, spec.data_shape).astype(np.uint8)
    return spec, [data, values, offsets_of(spec, positions), starts]


@pytest.mark.parametrize("fields", SHAPES)
def test_bytes(fields: dict[str, Any]) -> None:
    block = {33: 1, 20: 4}.get(fields["in_channels"], 2)
    spec, inputs = byte_problem(block, 0.7, **fields)
    check(spec, inputs, get_target("x86-64-v4-vnni"), form="x86.sparse_byte_planes")


@pytest.mark.parametrize(("fields", "level"), [
    *((fields, "x86-64-v3") for fields in SHAPES),
    *((fields, "x86-64-v4") for fields in SHAPES[4::3]),
])  # fmt: skip
def test_bytes_in_pairs(fields: dict[str, Any], level: str) -> None:
    """Weights of which two saturate vpmaddubsw where their signs agree, data that use it."""
    spec, inputs = byte_problem(1 + fields["in_channels"] % 2, 0.7, _SUMS, **fields)
    assert spec.chain
    inputs[0][:] = np.random.default_rng(2).choice([0, 255], inputs[0].shape)
    check(spec, inputs, get_target(level), form="x86.sparse_byte_planes")


def test_pairs() -> None:
    """No pair saturates, nothing is lost, and few entries stay alone."""
    rng = np.random.default_rng(4)
    for block, kept in ((1, 0.2), (2, 0.3), (4, 0.3)):
        weight = rng.integers(-128, 128, (900, 24)).astype(np.int8)
        weight *= (rng.random((900, 24 // block)) < kept).repeat(block, axis=1)
        values, positions, starts = encode(weight, block)
        paired, places, ends = pair_entries(values, positions, starts, _SUMS)
        products = paired.reshape(-1, 2, block).astype(int) * 255
        assert np.where(products > 0, products, 0).sum(axis=1).max() < 2**15
        assert np.where(products < 0, products, 0).sum(axis=1).min() >= -(2**15)
        assert np.array_equal(decode(paired, places, ends, weight.shape), weight)
        assert len(values) <= len(paired) < 1.1 * len(values)


def test_signs_that_agree() -> None:
    """Large weights of one sign stay alone: each is followed by a zero."""
    weight = np.full((30, 3), 127, np.int8)
    weight[:, 1] = 0
    paired, _, ends = pair_entries(*encode(weight, 1), _SUMS)
    assert np.array_equal(np.diff(ends), [60, 0, 60])
    assert set(map(tuple, paired.reshape(-1, 2))) == {(127, 0)}


def test_every_choice_of_bytes_is_exact() -> None:
    target = replace(get_target("x86-64-v4-vnni"), threads=2)
    spec, inputs = byte_problem(1, 0.5, **SHAPES[3])
    space = search_space(prim_func(spec), target)
    assert space is not None
    choices = list(space)
    assert len(choices) > 5
    for choice in choices[:: len(choices) // 3]:
        check(spec, inputs, target, choice, "x86.sparse_byte_planes")


@pytest.mark.parametrize("sparsity", [0.0, 0.98])
def test_all_and_nothing(sparsity: float) -> None:
    """Outputs without entries, and a layer with all of them."""
    check(*problem(4, sparsity, **SHAPES[3]), get_target("x86-64-v3"))


def test_generic_schedule() -> None:
    """The description says what offsets by channel mean; where no template takes it, too."""
    target = get_target("x86-64-v3")
    spec, inputs = problem(1, 0.7, **{**SHAPES[4], "out_channels": 3})
    func = schedule(prim_func(spec), target)
    assert str(func.attrs[SCHEDULE_ATTR]).startswith("default")
    if target.runs_here():
        (result,) = run(func, target, inputs, (spec.output_shape, "float32"))
        assert_same(result, reference(spec, *inputs))


@pytest.mark.parametrize(("fields", "threads"), [(SHAPES[2], 1), (SHAPES[7], 2)])
def test_every_choice_is_exact(fields: dict[str, Any], threads: int) -> None:
    target = replace(get_target("x86-64-v3"), threads=threads)
    spec, inputs = problem(1, 0.0, **fields)
    space = search_space(prim_func(spec), target)
    assert space is not None
    choices = list(space)
    assert len(choices) > 20 and space.contains(choices[0])
    for choice in choices[:: len(choices) // 3]:
        check(spec, inputs, target, choice)
    check(spec, inputs, target, {**choices[0], "parts": threads})


def test_epilogue() -> None:
    """Bias, a residual sum and ReLU behind the sums, in one kernel."""
    target = get_target("x86-64-v3")
    spec, inputs = problem(1, 0.7, **SHAPES[2])
    arguments, acc = describe(spec)
    bias = te.placeholder((spec.out_channels,), "float32", name="bias")
    other = te.placeholder(acc.shape, "float32", name="other")
    total = te.compute(acc.shape, lambda *i: acc[i] + bias[i[-1]] + other[i], name="total")
    out = te.compute(acc.shape, lambda *i: te.max(total[i], 0.0), name="out")
    func = schedule(te.create_prim_func([*arguments, bias, other, out]), target)
    assert func.attrs[SCHEDULE_ATTR] == "x86.sparse_planes"
    rng = np.random.default_rng(9)
    added = [random_array(rng, shape, "float32") for shape in ((40,), spec.output_shape)]
    result = run(func, target, [*inputs, *added], (spec.output_shape, "float32"))[0]
    if target.runs_here():
        assert_same(result, np.maximum(reference(spec, *inputs) + added[0] + added[1], 0))


def test_unstructured_zeros_find_the_form() -> None:
    """Of a layer that is worth it, and the stored numbers are the layer's: at most 6 bytes each."""
    target = get_target("x86-64-v3")
    spec = Conv2dSpec(batch=1, height=14, width=14, in_channels=64, out_channels=64, kernel=(3, 3),
                      padding=(1, 1, 1, 1))  # fmt: skip
    rng = np.random.default_rng(3)
    weight = random_array(rng, spec.weight_shape, "float32")
    weight *= rng.random(weight.shape) < 0.05
    found = sparse_parts(spec, [weight], target)
    assert found is not None and found[0].by_channel and found[0].block == 1
    nonzero = np.count_nonzero(weight)
    assert sum(part.nbytes for part in found[1]) <= 6 * nonzero + 4 * 65
    data = random_array(rng, spec.data_shape, "float32")
    assert_same(reference(found[0], data, *found[1]), reference(spec, data, weight))
    weight = random_array(rng, spec.weight_shape, "float32")
    weight *= rng.random(weight.shape) < 0.5
    assert sparse_parts(spec, [weight], target) is None
