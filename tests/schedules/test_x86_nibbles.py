"""4-bit weights with tables and whole-number scales: exact integers over ragged shapes, and the
instructions that open them."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import tvm

from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    Conv2dSpec,
    MatmulSpec,
    WeightedSpec,
    pack_parts,
    prim_func,
    schedule,
    search_space,
)
from tvm_compress.schedules.weights import pack_int4
from tvm_compress.targets import Target, get_target

from .kernels import run

FORM = "x86.nibbles"
W4A8: dict[str, Any] = {"data_dtype": "uint8", "weight_dtype": "int4", "acc_dtype": "int32"}


def linear(rows: int, k: int, n: int, **fields: Any) -> MatmulSpec:
    return MatmulSpec(rows=rows, in_features=k, out_features=n, **W4A8, **fields)


def conv(ci: int, co: int, **fields: Any) -> Conv2dSpec:
    base: dict[str, Any] = {"batch": 1, "height": 5, "width": 4, "kernel": (3, 3), **W4A8}
    return Conv2dSpec(**{**base, "in_channels": ci, "out_channels": co, **fields})


def integers_and_parts(spec: WeightedSpec, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Whole weights [K, N] and the parts that stand for them: codes, [tables], [scales].

    Extreme values are frequent: codes -8 and 7, table entries 64 and -64, scales 0 and 255."""
    rng = np.random.default_rng(seed)
    k, n = spec.reduction_size, spec.columns
    codes = rng.choice([*range(-8, 8), -8, 7], (k, n)).astype(np.int8)
    parts, values = [pack_int4(codes)], codes.astype(np.int64)
    if spec.table_channels:
        tables = rng.integers(-64, 65, spec.tables_shape).astype(np.int8)
        tables[:, 0], tables[:, 1] = -64, 64
        zero = rng.integers(2, 16, len(tables))
        tables[np.arange(len(tables)), zero] = 0
        parts.append(tables)
        for column in range(n):
            table = tables[column // spec.table_channels]
            values[:, column] = table[codes[:, column] & 15]
    if spec.group_size:
        scales = rng.choice([*range(256), 0, 255, 255], spec.scales_shape).astype(np.uint8)
        parts.append(scales)
        values = values * scales[np.arange(k) // spec.group_size]
    return values, parts


def expected(spec: WeightedSpec, data: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The sums in plain NumPy: a loop over taps, nothing of ours."""
    if isinstance(spec, MatmulSpec):
        return (data.astype(np.int64) @ values).astype(np.int32)
    assert isinstance(spec, Conv2dSpec)
    top, left, bottom, right = spec.padding
    padded = np.pad(
        data.astype(np.int64), ((0, 0), (top, bottom), (left, right), (0, 0)),
        constant_values=spec.pad_value,
    )  # fmt: skip
    taps = values.reshape(*spec.kernel, spec.in_channels, spec.out_channels)
    result = np.zeros(spec.output_shape, np.int64)
    for y, x in itertools.product(range(spec.out_height), range(spec.out_width)):
        sy, sx = y * spec.strides[0], x * spec.strides[1]
        window = padded[:, sy : sy + spec.kernel[0], sx : sx + spec.kernel[1]]
        result[:, y, x] = np.tensordot(window, taps, 3)
    return result.astype(np.int32)


def check(spec: WeightedSpec, target: Target, form: str = FORM) -> WeightedSpec:
    """Pack, schedule, compile, run, compare bit for bit."""
    values, parts = integers_and_parts(spec)
    data = np.random.default_rng(1).choice([0, 1, 77, 254, 255], spec.data_shape).astype(np.uint8)
    sums = expected(spec, data, values)
    result = run_naive(spec, data, parts)
    np.testing.assert_array_equal(result, sums)
    packed, arrays = pack_parts(spec, parts, target) or (spec, parts)
    func = schedule(prim_func(packed), target)
    assert func.attrs[SCHEDULE_ATTR] == form
    (result,) = run(func, target, [data, *arrays], (sums.shape, "int32"))
    if target.runs_here():
        np.testing.assert_array_equal(result, sums)
    return packed


def run_naive(spec: WeightedSpec, data: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """The portable form: the plain description under the generic schedule."""
    target = get_target("x86-64-v2")
    (result,) = run(
        schedule(prim_func(spec), target), target, [data, *parts], (spec.output_shape, "int32")
    )
    return result


FACTORS: dict[str, dict[str, Any]] = {
    "codes alone": {},
    "group 32": {"group_size": 32},
    "group 8": {"group_size": 8},
    "one group": {"group_size": 1000},
    "one table": {"table_channels": 1000},
    "table for 4": {"table_channels": 4},
    "table for 8": {"table_channels": 8},
    "table and groups": {"table_channels": 4, "group_size": 16},
}


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_every_target(target: Target, factors: dict[str, Any]) -> None:
    packed = check(linear(1, 75, 21, **factors), target)
    assert packed.weight_storage_dtype == "uint8"


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("shape", [(32, 16), (33, 17), (31, 1), (64, 40), (100, 15)], ids=str)
@pytest.mark.parametrize(
    "factors", [{"group_size": 32}, {"table_channels": 999}], ids=["groups", "table"]
)
def test_ragged_shapes(
    main_target: Target, rows: int, shape: tuple[int, int], factors: dict[str, Any]
) -> None:
    check(linear(rows, *shape, **factors), main_target)


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_convolutions(main_target: Target, factors: dict[str, Any]) -> None:
    check(conv(33, 18, kernel=(1, 1), **factors), main_target)
    if factors.get("group_size") != 1000:
        check(conv(32, 18, padding=(1, 1, 1, 1), pad_value=9, **factors), main_target)


def test_odd_rows_of_a_table_become_bytes(target: Target) -> None:
    spec = conv(3, 16, table_channels=16)
    packed = check(spec, target, "x86.matrix")
    assert packed.weight_dtype == "int8"


def test_groups_across_rows_keep_their_codes(main_target: Target) -> None:
    spec = conv(16, 8, group_size=32)
    _, parts = integers_and_parts(spec)
    assert pack_parts(spec, parts, main_target) is None
    assert schedule(prim_func(spec), main_target).attrs[SCHEDULE_ATTR] != FORM


@pytest.mark.parametrize("factors", [FACTORS["group 32"], FACTORS["one table"]], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_every_choice_is_right(main_target: Target, factors: dict[str, Any], rows: int) -> None:
    spec = linear(rows, 100, 40, **factors)
    values, parts = integers_and_parts(spec)
    packed = pack_parts(spec, parts, main_target)
    assert packed is not None
    func = prim_func(packed[0])
    space = search_space(func, main_target)
    assert space is not None
    assert space.template == FORM
    choices = list(itertools.islice(space, 2000))
    data = np.full((rows, 100), 255, np.uint8)
    for choice in random.Random(1).sample(choices, min(6, len(choices))):
        scheduled = schedule(func, main_target, choice)
        (result,) = run(scheduled, main_target, [data, *packed[1]], ((rows, 40), "int32"))
        if main_target.runs_here():
            np.testing.assert_array_equal(result, expected(spec, data, values))


def test_chains_are_proven_from_the_table() -> None:
    """A table of small values allows longer chains; one that might saturate takes another form."""
    target = get_target("x86-64-v3")
    spec = linear(1, 64, 16, table_channels=16)
    chains = []
    for largest in (8, 31, 64, 127):
        tables = np.linspace(-largest, largest, 16).round().astype(np.int8)[None]
        tables[0, 8] = 0
        codes = pack_int4(np.full((64, 16), -1, np.int8))  # all of them the last, largest value
        packed = pack_parts(spec, [codes, tables], target)
        assert packed is not None
        chains.append((packed[0].weight_dtype, packed[0].chain))
    assert chains == [("int4", 8), ("int4", 2), ("int4", 1), ("int8", 0)]


def assembly(spec: WeightedSpec, target: Target) -> str:
    """The instructions of the scheduled kernel."""
    _, parts = integers_and_parts(spec)
    packed = pack_parts(spec, parts, target)
    assert packed is not None
    func = schedule(prim_func(packed[0]), target).with_attr("global_symbol", "main")
    library = tvm.tirx.build(tvm.IRModule({"main": func}), target=target.tvm_target())
    return str(library.inspect_source("asm"))


INSTRUCTIONS = {
    "x86-64-v3": ({"vpshufb", "vpmaddubsw", "vpmaddwd"}, "ymm"),
    "x86-64-v4": ({"vpshufb", "vpmaddubsw", "vpmaddwd"}, "zmm"),
    "x86-64-v4-vnni": ({"vpshufb", "vpdpbusd"}, "zmm"),
}
# What opening codes one by one would need.
SCALAR = ("movzbl", "movsbl", "pinsrb", "pextrb", "imull", "sarl", "shrb")


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("rows", [1, 4])
def test_codes_are_opened_in_registers(name: str, factors: dict[str, Any], rows: int) -> None:
    wanted, registers = INSTRUCTIONS[name]
    text = assembly(linear(rows, 512, 64, **factors), get_target(name))
    kernel = text[text.index("\nmain_compute_:") : text.index("__truncsfhf2:")]
    lines = [line.split() for line in kernel.splitlines() if line.startswith("\t")]
    used = {line[0] for line in lines if line}
    assert wanted <= used
    for line in lines:
        if line[0] in wanted:
            assert registers in "".join(line[1:]), line
    assert not [op for op in used if op in SCALAR or op.startswith(("vpinsrb", "vpextrb"))], used


def test_a_scale_of_a_chain_costs_no_instruction_of_its_own() -> None:
    """Groups of 32 on AVX2: as many products and widenings as without groups, no multiplication."""
    target = get_target("x86-64-v3")
    text = assembly(linear(1, 512, 64, group_size=32), target)
    assert "vpmulld" not in text
    assert "vpmaddwd" in text
