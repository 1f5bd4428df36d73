"""Specs and layouts: JSON round trip, refusals, derived sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tvm_compress.schedules import (
    BatchMatmulSpec,
    Conv2dSpec,
    Conv2dTransposeSpec,
    KernelSpec,
    MatmulSpec,
    SpecError,
    spec_from_json,
)
from tvm_compress.schedules.layout import parse_layout
from tvm_compress.schedules.weights import pack_codes, pack_int4, unpack_int4, unpack_weight

CONV = Conv2dSpec(
    batch=1, height=9, width=8, in_channels=6, out_channels=10, kernel=(3, 2), padding=(1, 0, 2, 1)
)
SPECS = [
    CONV,
    CONV.replace(groups=2, strides=(2, 1), dilation=(1, 2), weight_layout="O8I4"),
    CONV.replace(data_dtype="int8", weight_dtype="uint8", acc_dtype="int32", weight_zero_point=9),
    Conv2dTransposeSpec(
        batch=1, height=4, width=5, in_channels=3, out_channels=2, kernel=(2, 2), strides=(2, 2)
    ),
    MatmulSpec(rows=2, in_features=9, out_features=3, weight_dtype="int4", group_size=4),
    MatmulSpec(
        rows=2,
        in_features=9,
        out_features=3,
        data_dtype="uint8",
        acc_dtype="int32",
        weight_dtype="int4",
        group_size=8,
        table_channels=4,
    ),
    BatchMatmulSpec(batch=2, rows=3, depth=4, columns=5, b_batch=1, transpose_b=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.family)
def test_json_round_trip(spec: KernelSpec) -> None:
    assert spec_from_json(spec.to_json()) == spec


@pytest.mark.parametrize("text", ["", "7", "{}", '{"family": "conv9d"}', '{"family": "matmul"}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        spec_from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 4}, "groups"),
        ({"strides": (0, 1)}, "size < 1"),
        ({"padding": (-1, 0, 0, 0)}, "negative"),
        ({"kernel": (20, 2)}, "larger"),
        ({"data_dtype": "int8"}, "summed"),
        ({"data_dtype": "int7"}, "not in"),
        ({"weight_layout": "OIHW"}, "weight layout"),
        ({"group_size": 4}, "group_size"),
        ({"table_channels": 4}, "table_channels"),
        ({"table_channels": 4, "weight_dtype": "int4"}, "integer data"),
        (
            {"group_size": 8, "group_zero_points": True, "weight_dtype": "int4"}
            | {"data_dtype": "uint8", "acc_dtype": "int32"},
            "for float32 data",
        ),
    ],
)
def test_bad_specs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CONV.replace(**changes)


def test_output_size_follows_padding_and_dilation() -> None:
    assert CONV.output_shape == (1, 10, 8, 10)
    assert CONV.replace(dilation=(2, 3)).output_shape == (1, 8, 6, 10)
    assert CONV.macs == 10 * 8 * 10 * 36


@pytest.mark.parametrize("layout", ["O16K4", "O8I4", "O4R2", "O8R1", "O16I1"])
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_packing_loses_nothing(layout: str, weight_dtype: str) -> None:
    spec = CONV.replace(weight_dtype=weight_dtype)
    codes = np.random.default_rng(0).integers(-8, 8, (1, 36, 10)).astype(np.int8)
    packed = pack_codes(spec, codes, layout)
    changed = spec.replace(weight_layout=layout)
    assert packed.shape == changed.weight_shape
    np.testing.assert_array_equal(unpack_weight(changed, packed), codes)


def test_layout_names_round_trip() -> None:
    assert parse_layout("O16R4").name == "O16R4"
    with pytest.raises(ValueError, match="O16X4"):
        parse_layout("O16X4")


def test_int4_has_row_2j_in_the_low_nibble() -> None:
    codes = np.array([[-8], [7], [3]], np.int8)
    np.testing.assert_array_equal(pack_int4(codes), [[0x78], [0x03]])
    np.testing.assert_array_equal(unpack_int4(pack_int4(codes), 3), codes)
