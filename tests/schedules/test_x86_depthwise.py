"""Depthwise kernels: exact over ragged channels, kernels, strides, multipliers."""

from __future__ import annotations

from typing import Any

import pytest

from tvm_compress.schedules import Conv2dSpec
from tvm_compress.targets import Target

from .kernels import FLOAT, INT8, INT16, UINT8, check

FORM = "x86.depthwise"


def depthwise(channels: int, multiplier: int = 1, **fields: Any) -> Conv2dSpec:
    base: dict[str, Any] = {"batch": 1, "height": 9, "width": 11, "kernel": (3, 3)}
    return Conv2dSpec(
        **{
            **base,
            "in_channels": channels,
            "out_channels": channels * multiplier,
            "groups": channels,
            **fields,
        }
    )


@pytest.mark.parametrize(
    "dtypes",
    [FLOAT, INT8, INT16, {**UINT8, "weight_zero_point": 100}, {"weight_dtype": "int8"}],
    ids=["float", "int8", "int16", "uint8", "weight-only"],
)
def test_every_dtype_on_every_target(target: Target, dtypes: dict[str, Any]) -> None:
    check(depthwise(20, **dtypes, padding=(1, 1, 1, 1)), target, FORM, extreme=True)


@pytest.mark.parametrize("channels", [3, 7, 8, 15, 16, 17, 33])
def test_ragged_channels(main_target: Target, channels: int) -> None:
    check(depthwise(channels, padding=(0, 1, 2, 1), strides=(2, 1)), main_target, FORM)
    check(depthwise(channels, padding=(0, 1, 2, 1), pad_value=-9, **INT8), main_target, FORM)


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel": (5, 5), "padding": (2, 2, 2, 2)},
        {"kernel": (7, 7)},
        {"kernel": (1, 1)},
        {"kernel": (1, 1), "strides": (2, 2)},
        {"kernel": (9, 4), "batch": 2},
        {"dilation": (2, 3)},
        {"multiplier": 2, "padding": (1, 1, 1, 1)},
        {"multiplier": 3},
        {"height": 64, "width": 64, "padding": (1, 1, 1, 1), "strides": (2, 2)},
    ],
    ids=str,
)
def test_geometry(main_target: Target, fields: dict[str, Any]) -> None:
    check(depthwise(20, **fields), main_target, FORM)
    check(depthwise(20, **fields, **INT8), main_target, FORM)
