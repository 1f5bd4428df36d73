"""Sparse linear layers of few rows on x86: encoding by bits, every form against NumPy bit for bit,
instructions, and which form a layer gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    MatmulSpec,
    prim_func,
    reference,
    schedule,
    search_space,
)
from tvm_compress.schedules.dispatch import sparse_forms
from tvm_compress.schedules.lone_layer import lone_layer
from tvm_compress.schedules.sparse_form import SparseForm
from tvm_compress.schedules.sparse_rows import decode, encode, spec_of
from tvm_compress.schedules.sparse_weight import adds_exactly, encoded, sparse_candidates
from tvm_compress.targets import Target, get_target

from .kernels import ICE_LAKE, run

TARGETS = {"ice-lake": ICE_LAKE, **{n: get_target(n) for n in ("x86-64-v4-vnni", "x86-64-v3")}}
BYTES: dict[str, Any] = {"data_dtype": "uint8", "weight_dtype": "int8", "acc_dtype": "int32"}
# One word and less, whole words, several runs of words; outputs of a part of a block and of more;
# data and sums of one shape.
SHAPES = [(1, 3, 5), (3, 70, 33), (1, 256, 16), (2, 601, 47), (1, 32, 32)]


def pruned(
    rows: int, inputs: int, outputs: int, block: int, dtype: str, largest: int = 128
) -> np.ndarray:
    """A weight [K, N] with 70 % zeros, blocks with all and blocks with none of theirs included."""
    rng = np.random.default_rng(inputs + block)
    blocks = -(-outputs // block)
    kept = rng.random((inputs, blocks)) < 0.3
    kept[:, 0], kept[:, -1] = blocks == 1, True
    values: np.ndarray = rng.integers(-largest, largest, (inputs, outputs)).astype(dtype)
    return values * kept.repeat(block, axis=1)[:, :outputs]


def layer(rows: int, weight: np.ndarray) -> MatmulSpec:
    spec = MatmulSpec(rows=rows, in_features=weight.shape[0], out_features=weight.shape[1])
    return spec if weight.dtype == np.float32 else spec.replace(**BYTES)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("group", "shared", "dtype"), [
    (4, True, "int8"), (4, False, "int8"), (1, False, "float32"),
])  # fmt: skip
def test_encoding(shape: tuple[int, int, int], group: int, shared: bool, dtype: str) -> None:
    weight = pruned(*shape, 16 if shared else 1, dtype)
    spec, parts = spec_of(shape[0], weight, group, shared)
    np.testing.assert_array_equal(decode(spec, *parts), weight)
    if not shared:
        kept = np.count_nonzero(weight)
        assert spec.stored == kept + 64 and sum(int(w).bit_count() for w in parts[1]) == kept
    nothing = encode(np.zeros_like(weight), group, shared)
    assert not nothing[0].any() and not nothing[1].any() and len(nothing[0])


def data_of(spec: Any, seed: int = 0) -> np.ndarray:
    """Whole numbers: sums of floats are exact too."""
    return np.random.default_rng(seed).integers(0, 256, spec.data_shape).astype(spec.data_dtype)


@pytest.mark.parametrize("shared", [True, False])
def test_naive_kernel(shared: bool) -> None:
    """The description itself: several runs of words, and floats."""
    weight = pruned(1, 601, 20, 16 if shared else 1, "int8")
    spec, parts = spec_of(2, weight, 4, shared)
    data = data_of(spec)
    [found] = run(prim_func(spec), get_target("x86-64-v2"), [data, *parts], ((2, 20), "int32"))
    np.testing.assert_array_equal(found, data.astype("int32") @ weight.astype("int32"))
    floats, parts = spec_of(2, weight[:70].astype("float32"), 1, shared=False)
    data = data_of(floats)
    [found] = run(prim_func(floats), get_target("x86-64-v2"), [data, *parts], ((2, 20), "float32"))
    np.testing.assert_array_equal(found, data @ weight[:70].astype("float32"))


def forms_of(spec: MatmulSpec, target: Target) -> list[SparseForm]:
    """Those of this kernel."""
    found = list(sparse_forms(spec, target))
    return [form for form in found if form.bits or (form.block == 16 and not form.by_channel)]


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes(name: str, shape: tuple[int, int, int]) -> None:
    """All forms of a target in one library; full bytes of data."""
    check(name, shape, "int8", 20 if name == "x86-64-v3" else 128)
    if name == "x86-64-v3":  # weights that do not prove what chains rely on
        check(name, shape, "int8", 128)


@pytest.mark.parametrize("name", ["ice-lake", "x86-64-v3"])
def test_floats(name: str) -> None:
    check(name, SHAPES[3], "float32", 9)


def check(name: str, shape: tuple[int, int, int], dtype: str, largest: int) -> None:
    target, rows, seen = TARGETS[name], shape[0], set()
    functions: dict[str, Any] = {}
    cases: list[tuple[Any, ...]] = []
    for form in forms_of(layer(rows, np.zeros(shape[1:], dtype)), target):
        weight = pruned(*shape, form.block, dtype, largest)
        spec, parts = encoded(layer(rows, weight), weight[None], form)
        if not adds_exactly(spec, form):
            continue
        func = schedule(prim_func(spec), target)
        assert func.attrs[SCHEDULE_ATTR] == "x86.sparse_rows"
        symbol = f"form{len(cases)}"
        functions[symbol] = func.with_attr("global_symbol", symbol)
        cases.append((symbol, spec, parts, weight))
        seen.add((form.words, form.sums is None))
    assert seen
    library = tvm.tirx.build(tvm.IRModule(functions), target=target.tvm_target())
    if not target.runs_here():
        return
    for symbol, spec, parts, weight in cases:
        data = data_of(spec)
        out = tvm.runtime.tensor(np.full(spec.output_shape, 77, spec.acc_dtype))
        library[symbol](*(tvm.runtime.tensor(array) for array in (data, *parts)), out)
        wanted = data.astype(spec.acc_dtype) @ weight.astype(spec.acc_dtype)
        np.testing.assert_array_equal(reference(spec, data, *parts), wanted)
        np.testing.assert_array_equal(out.numpy(), wanted)


@pytest.mark.parametrize(("name", "block", "dtype", "instructions"), [
    ("ice-lake", 16, "int8", ("vpcompressb", "vpdpbusd")),
    ("ice-lake", 1, "int8", ("vpexpandb", "vpdpbusd")),
    ("ice-lake", 1, "float32", ("vexpandps", "vfmadd")),
    ("x86-64-v3", 16, "int8", ("vpmaddubsw", "vpmaddwd")),
    ("x86-64-v3", 16, "float32", ("vfmadd",)),
])  # fmt: skip
def test_instructions_and_epilogue(
    name: str, block: int, dtype: str, instructions: tuple[str, ...]
) -> None:
    """Bias and what follows it are in the same function; every choice builds."""
    target = TARGETS[name]
    weight = pruned(1, 130, 40, block, dtype, 20)
    dense = layer(1, weight)
    form = next(form for form in forms_of(dense, target) if form.block == block)
    spec, parts = encoded(dense, weight[None], form)
    func = lone_layer(spec)
    choices = list(search_space(func, target) or ())
    assert len(choices) == 4
    data, bias = data_of(spec), np.arange(-20, 20).astype(spec.acc_dtype)
    scheduled = schedule(func, target, choices[1]).with_attr("global_symbol", "kernel")
    library = tvm.tirx.build(tvm.IRModule({"kernel": scheduled}), target=target.tvm_target())
    code = library.inspect_source("asm")
    assert all(instruction in code for instruction in instructions)
    if not target.runs_here():
        return
    out = tvm.runtime.tensor(np.zeros(spec.output_shape, spec.data_dtype))
    library["kernel"](*(tvm.runtime.tensor(array) for array in (data, *parts, bias)), out)
    sums = data.astype(spec.acc_dtype) @ weight.astype(spec.acc_dtype) + bias
    wanted = np.maximum(sums, 0)
    if dtype == "int8":
        wanted = np.clip((sums + 128) >> 8, 0, 255)  # 2**-8 of it, half up
    np.testing.assert_array_equal(out.numpy(), wanted)


def test_forms_by_pattern() -> None:
    """Blocks are found by bits of inputs, single zeros by bits of weights where memory is the
    bound; more rows as before."""
    spec = MatmulSpec(rows=1, in_features=256, out_features=128, **BYTES)
    kept = pruned(1, 256, 128, 16, "int8")[None] != 0
    [best, other] = sparse_candidates(spec, kept, ICE_LAKE)
    assert best[1].words == "16x1 in groups of 4 by bits" and best[0] < 0.6
    assert other[1].words == "1x1 in groups of 4 by bits" and other[0] > 1
    assert all(form.bits for form in sparse_forms(spec, ICE_LAKE))
    assert not any(form.bits for form in sparse_forms(spec.replace(rows=40), ICE_LAKE))
    assert not any(form.bits for form in sparse_forms(spec, TARGETS["x86-64-v4-vnni"]))
