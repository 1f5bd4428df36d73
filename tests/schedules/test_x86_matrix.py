"""Register-tiled kernels: exact over ragged shapes, every dtype, and the values that would
saturate."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import pytest

from tvm_compress.schedules import (
    Conv2dSpec,
    Conv2dTransposeSpec,
    MatmulSpec,
    WeightedSpec,
    pack_weight,
    prim_func,
    reference,
    schedule,
    search_space,
)
from tvm_compress.schedules.saturation import longest_chain
from tvm_compress.targets import Target, get_target

from .kernels import FLOAT, INT8, INT16, UINT8, arguments, assert_same, check, run

FORM = "x86.matrix"
DTYPES: dict[str, dict[str, Any]] = {
    "float": FLOAT,
    "int8": INT8,
    "uint8": {**UINT8, "weight_zero_point": 128},
    "uint8-wide": {**UINT8, "weight_zero_point": 3},
    "int16": INT16,
    "weight-only": {"weight_dtype": "int8"},
}
W4A8: dict[str, Any] = {**INT8, "data_dtype": "uint8"}
CHANNELS = [(1, 8), (3, 16), (7, 3), (8, 33), (15, 24), (16, 17), (17, 1), (33, 40)]


def conv(ci: int, co: int, **fields: Any) -> Conv2dSpec:
    base: dict[str, Any] = {"batch": 1, "height": 9, "width": 11, "kernel": (3, 3)}
    return Conv2dSpec(**{**base, "in_channels": ci, "out_channels": co, **fields})


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_every_dtype_on_every_target(target: Target, dtypes: dict[str, Any]) -> None:
    pad_value = {"int8": -7, "uint8": 200}.get(dtypes.get("data_dtype", ""), 0)
    check(conv(6, 20, **dtypes, padding=(1, 1, 1, 1), pad_value=pad_value), target, FORM)


@pytest.mark.parametrize(("ci", "co"), CHANNELS)
@pytest.mark.parametrize("dtypes", [FLOAT, INT8], ids=["float", "int8"])
def test_ragged_channels(main_target: Target, ci: int, co: int, dtypes: dict[str, Any]) -> None:
    check(conv(ci, co, **dtypes, padding=(0, 1, 2, 1), strides=(2, 1)), main_target, FORM)


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": 2, "kernel": (1, 1)},
        {"kernel": (1, 1), "strides": (2, 2)},
        {"kernel": (1, 1), "padding": (1, 1, 1, 1), "pad_value": 11},
        {"dilation": (2, 1)},
        {"dilation": (1, 2), "padding": (0, 2, 0, 2), "pad_value": -128},
        {"groups": 2, "padding": (1, 1, 1, 1)},
        {"groups": 2, "kernel": (1, 1), "batch": 2},
        {"height": 1, "kernel": (1, 5), "padding": (0, 2, 0, 2)},
        {"height": 3, "width": 3},
        {"kernel": (9, 11)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [FLOAT, INT8], ids=["float", "int8"])
def test_geometry(main_target: Target, fields: dict[str, Any], dtypes: dict[str, Any]) -> None:
    if not dtypes:
        fields = {k: v for k, v in fields.items() if k != "pad_value"}
    check(conv(10, 18, **fields, **dtypes), main_target, FORM)


@pytest.mark.parametrize("name", ["int8", "uint8", "uint8-wide", "int16"])
def test_extreme_values_do_not_saturate(target: Target, name: str) -> None:
    check(
        conv(64, 16, **DTYPES[name], kernel=(3, 3), padding=(1, 1, 1, 1)),
        target,
        FORM,
        extreme=True,
    )


def test_int16_long_reduction_exceeds_int32(main_target: Target) -> None:
    spec = MatmulSpec(rows=2, in_features=4100, out_features=9, **INT16)
    check(spec, main_target, FORM, extreme=True)


@pytest.mark.parametrize("rows", [1, 2, 13, 14, 15, 50])
@pytest.mark.parametrize("features", [(1, 10), (33, 64), (640, 9)])
def test_linear(rows: int, features: tuple[int, int]) -> None:
    spec = MatmulSpec(rows=rows, in_features=features[0], out_features=features[1])
    check(spec, get_target("host"), FORM)
    check(spec.replace(**INT8), get_target("host"), FORM)


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [8, 32, 64])
@pytest.mark.parametrize("zero_points", [False, True])
def test_group_wise_codes(
    main_target: Target, weight_dtype: str, group_size: int, zero_points: bool
) -> None:
    spec = MatmulSpec(
        rows=3,
        in_features=75,
        out_features=21,
        weight_dtype=weight_dtype,
        group_size=group_size,
        group_zero_points=zero_points,
    )
    check(spec, main_target, FORM)


@pytest.mark.parametrize("in_features", [32, 33])
def test_int4_without_groups(main_target: Target, in_features: int) -> None:
    check(
        MatmulSpec(rows=3, in_features=in_features, out_features=21, weight_dtype="int4"),
        main_target,
        FORM,
    )


@pytest.mark.parametrize("dtypes", [FLOAT, INT8], ids=["float", "int8"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 2)], ids=str)
def test_transposed(main_target: Target, dtypes: dict[str, Any], strides: tuple[int, int]) -> None:
    spec = Conv2dTransposeSpec(
        batch=2,
        height=4,
        width=5,
        in_channels=6,
        out_channels=10,
        kernel=(3, 4),
        strides=strides,
        padding=(1, 0, 0, 1),
        output_padding=(1, 0) if strides != (1, 1) else (0, 0),
        groups=2,
        pad_value=5 if dtypes else 0,
        **dtypes,
    )
    check(spec, main_target, FORM)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_large_layers_in_parallel(threads: int) -> None:
    """Bands, channel groups as tasks, tiles moved back inside: every element is written all the
    same."""
    target = dataclasses.replace(get_target("host"), threads=threads)
    for shape in [(32, 64, 3), (5, 200, 3), (50, 96, 1)]:
        size, channels, kernel = shape
        spec = conv(channels, channels, height=size, width=size, kernel=(kernel, kernel), **INT8)
        check(spec, target, FORM)


def few_bits(spec: WeightedSpec, bits: int, seed: int = 0) -> list[np.ndarray]:
    """Arguments with data at both ends of its range and weights of `bits` bits."""
    data, weight = arguments(spec, seed, extreme=True)
    largest = 2 ** (bits - 1) - 1
    weight = np.random.default_rng(seed).integers(-largest, largest + 1, weight.shape)
    return [data, weight.astype(np.int8)]


PAIRED = ("x86-64-v2", "x86-64-v3", "x86-64-v4")


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("data", ["int8", "uint8"])
def test_chains_are_exact(name: str, bits: int, data: str) -> None:
    fields: dict[str, Any] = {**INT8, "data_dtype": data, "padding": (1, 1, 1, 1), "pad_value": 3}
    spec = conv(37, 21, **fields)
    packed = check(spec, get_target(name), FORM, plain=few_bits(spec, bits))
    assert isinstance(packed, WeightedSpec)
    # Two 7-bit products at most fill 16 bits; half the bits leave room for two more.
    assert packed.chain >= {7: 1, 6: 2, 5: 4, 4: 8, 3: 8}[bits]


@pytest.mark.parametrize(
    "spec",
    [
        conv(10, 18, **INT8, groups=2, padding=(1, 1, 1, 1)),
        conv(8, 9, **INT8, dilation=(1, 2)),
        conv(3, 16, **INT8, strides=(2, 2)),
        conv(64, 16, **INT8, kernel=(1, 1)),
        MatmulSpec(rows=1, in_features=77, out_features=13, **INT8),
        MatmulSpec(rows=9, in_features=640, out_features=9, **INT8),
    ],
    ids=lambda spec: spec.family,
)
def test_chains_of_every_geometry(spec: WeightedSpec) -> None:
    packed = check(spec, get_target("x86-64-v3"), FORM, plain=few_bits(spec, 6))
    assert isinstance(packed, WeightedSpec)
    assert packed.chain


def test_chain_is_as_long_as_the_weights_allow() -> None:
    spec = MatmulSpec(rows=1, in_features=32, out_features=8, **INT8, weight_layout="O8R4")

    def chain(weights: list[int]) -> int:
        packed = np.zeros(spec.weight_shape, np.int8)
        packed[0, 0, : len(weights), 5, 0] = weights
        return longest_chain(spec, packed)

    assert chain([127]) == 8
    assert chain([127, 1, 0, 0]) == 8  # 128 * 255 = 32640
    assert chain([127, 2]) == 1  # 129 * 255 = 32895
    assert chain([0, 127, 2]) == 2  # chains start at even steps
    assert chain([-127, 127, -1, 1]) == 8  # the two signs never meet in the same data
    packed = np.zeros(spec.weight_shape, np.int8)
    packed[0, 0, 3, 2, 2:] = [64, 65]
    assert longest_chain(spec, packed) == 0  # one instruction would saturate
    packed[0, 0, 3, 2, 2:] = [-64, -64]
    assert longest_chain(spec, packed) == 8
    packed[0, 0, 3, 2, 2:] = [-64, -65]
    assert longest_chain(spec, packed) == 0


def test_weights_that_would_saturate_take_another_form(target: Target) -> None:
    spec = MatmulSpec(rows=4, in_features=64, out_features=16, **INT8)
    data, weight = arguments(spec, extreme=True)
    packed = check(spec, target, FORM, plain=[data, np.full_like(weight, 127)])
    assert isinstance(packed, WeightedSpec)
    assert packed.chain == 0


@pytest.mark.parametrize("bits", [0, 6, 8], ids=["float", "6 bits", "8 bits"])
@pytest.mark.parametrize(
    "spec",
    [conv(16, 40, padding=(1, 1, 1, 1)), MatmulSpec(rows=15, in_features=33, out_features=40)],
    ids=["conv", "linear"],
)
def test_every_choice_is_right(main_target: Target, spec: WeightedSpec, bits: int) -> None:
    spec = spec.replace(**INT8) if bits else spec
    plain = few_bits(spec, bits) if bits else arguments(spec)
    packed_spec, weight = pack_weight(spec, plain[1], main_target) or (spec, plain[1])
    func = prim_func(packed_spec)
    space = search_space(func, main_target)
    assert space is not None
    expected = reference(spec, *plain)
    choices = list(itertools.islice(space, 4000))
    assert choices[0] == space.default
    assert len(choices) > 50
    for choice in random.Random(1).sample(choices, 6):
        assert space.contains(choice)
        scheduled = schedule(func, main_target, choice)
        (result,) = run(
            scheduled, main_target, [plain[0], weight], (expected.shape, str(expected.dtype))
        )
        if main_target.runs_here():
            assert_same(result, expected)


@pytest.mark.parametrize(
    "spec",
    [
        MatmulSpec(rows=1, in_features=75, out_features=21, **W4A8),
        MatmulSpec(rows=3, in_features=64, out_features=16, **W4A8),
        MatmulSpec(rows=4, in_features=33, out_features=40, **W4A8),
        conv(48, 10, **W4A8, height=2, width=2, kernel=(1, 1)),
    ],
    ids=["ragged", "even", "odd", "pointwise"],
)
def test_four_bit_weights_are_opened_in_registers(target: Target, spec: WeightedSpec) -> None:
    data, weight = arguments(spec, extreme=True)
    weight = np.random.default_rng(0).integers(-8, 8, weight.shape).astype(np.int8)
    packed = check(spec, target, "x86.nibbles", plain=[data, weight])
    assert isinstance(packed, WeightedSpec)
    assert packed.weight_dtype == "int4"
    assert packed.weight_storage_dtype == "uint8"


def test_four_bit_weights_of_many_positions_stay_bytes() -> None:
    spec = MatmulSpec(rows=64, in_features=64, out_features=16, **W4A8)
    data, weight = arguments(spec)
    packed = check(spec, get_target("host"), FORM, plain=[data, weight // 16])
    assert isinstance(packed, WeightedSpec)
    assert packed.weight_dtype == "int8"
