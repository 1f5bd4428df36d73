"""The naive kernels compute what their NumPy references say."""

from __future__ import annotations

from typing import Any

import pytest

from tvm_compress.schedules import (
    KERNEL_ATTR,
    BatchMatmulSpec,
    Conv2dSpec,
    Conv2dTransposeSpec,
    KernelSpec,
    MatmulSpec,
    prim_func,
    reference,
)
from tvm_compress.targets import get_target

from .kernels import FLOAT, INT8, INT16, UINT8, arguments, assert_same, run

SMALL: dict[str, Any] = {
    "batch": 2,
    "height": 7,
    "width": 6,
    "in_channels": 6,
    "out_channels": 12,
    "kernel": (3, 2),
}
SPECS: list[KernelSpec] = [
    Conv2dSpec(**SMALL),
    Conv2dSpec(**SMALL, **UINT8, weight_zero_point=100, groups=2, dilation=(1, 2), strides=(2, 1)),
    Conv2dSpec(**SMALL, **INT8, padding=(1, 0, 2, 1), pad_value=-5, weight_layout="O8I4"),
    Conv2dSpec(**SMALL, **INT16, weight_layout="O8K4"),
    Conv2dSpec(**SMALL, weight_dtype="int4", group_size=8, group_zero_points=True),
    Conv2dSpec(**SMALL, **INT8, groups=6),
    Conv2dTransposeSpec(
        **SMALL,
        **INT8,
        strides=(2, 3),
        padding=(1, 0, 2, 1),
        output_padding=(1, 0),
        groups=2,
        pad_value=3,
    ),
    Conv2dTransposeSpec(**SMALL, **FLOAT, strides=(2, 2), padding=(3, 2, 2, 3), dilation=(2, 1)),
    MatmulSpec(rows=3, in_features=33, out_features=10, weight_dtype="int4", group_size=8),
    MatmulSpec(rows=3, in_features=33, out_features=10, weight_dtype="int8", weight_layout="O8R1"),
    BatchMatmulSpec(
        batch=2,
        rows=3,
        depth=5,
        columns=4,
        transpose_b=True,
        a_dtype="int8",
        b_dtype="uint8",
        acc_dtype="int32",
        a_zero_point=3,
        b_zero_point=100,
    ),
    BatchMatmulSpec(batch=2, rows=3, depth=5, columns=4, b_batch=1),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.family}")
def test_naive_kernel_equals_reference(spec: KernelSpec) -> None:
    inputs = arguments(spec)
    expected = reference(spec, *inputs)
    func = prim_func(spec)
    assert func.attrs[KERNEL_ATTR] == spec.to_json()
    assert "global_symbol" not in func.attrs
    (result,) = run(func, get_target("host"), inputs, (expected.shape, str(expected.dtype)))
    assert_same(result, expected)


def test_references_agree_with_torch() -> None:
    """The references are ours too: compare their geometry with somebody else's."""
    torch = pytest.importorskip("torch")
    conv = Conv2dSpec(**SMALL, strides=(2, 1), dilation=(1, 2), groups=3, padding=(1, 2, 1, 2))
    data, weight = arguments(conv)
    x = torch.from_numpy(data).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.conv2d(
        x, torch.from_numpy(weight).permute(3, 2, 0, 1), None, (2, 1), (1, 2), (1, 2), 3
    )
    assert_same(reference(conv, data, weight), theirs.permute(0, 2, 3, 1).numpy())

    turned = Conv2dTransposeSpec(
        **SMALL, strides=(2, 3), padding=(1, 1, 1, 1), output_padding=(1, 0), groups=2
    )
    data, weight = arguments(turned)
    # [kh, kw, in/g, out] -> [in, out/g, kh, kw], group by group
    grouped = torch.from_numpy(weight).reshape(3, 2, 3, 2, 6).permute(3, 2, 4, 0, 1)
    theirs = torch.nn.functional.conv_transpose2d(
        torch.from_numpy(data).permute(0, 3, 1, 2),
        grouped.reshape(6, 6, 3, 2),
        None,
        (2, 3),
        (1, 1),
        (1, 0),
        2,
    )
    assert_same(reference(turned, data, weight), theirs.permute(0, 2, 3, 1).numpy())
