"""Keys of workloads: the same wherever names and calibrated numbers alone differ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tvm
from tvm import te

from tvm_compress.schedules import describe
from tvm_compress.tuning.workload import workload_key, workload_text

from .tuning_tasks import conv_function, conv_spec


def fused(name: str, zero_point: int = 3, clip: float = 127.0, rows: int = 6) -> tvm.tirx.PrimFunc:
    """A convolution with a requantisation behind it; `name` goes into every name there is."""
    inputs, acc = describe(conv_spec(height=rows))
    scale = te.placeholder((16,), "float32", name=f"{name}_scale")
    scaled = te.compute(
        acc.shape, lambda *i: acc[i].astype("float32") * scale[i[-1]], name=f"{name}_scaled"
    )
    out = te.compute(
        acc.shape,
        lambda *i: (te.min(scaled[i], clip).astype("int32") + zero_point).astype("int8"),
        name=f"{name}_out",
    )
    return te.create_prim_func([*inputs, scale, out])


def test_names_do_not_matter() -> None:
    assert workload_key(fused("a")) == workload_key(fused("something_else"))


def test_calibrated_numbers_do_not_matter() -> None:
    assert workload_key(fused("a", 3, 127.0)) == workload_key(fused("a", -9, 100.5))
    one, other = (conv_function(pad_value=value)[0] for value in (-128, 17))
    assert workload_key(one) == workload_key(other)


def test_shapes_numbers_in_indices_and_padding_by_zero_matter() -> None:
    keys = {
        workload_key(func)
        for func in (
            fused("a"),
            fused("a", rows=7),
            conv_function()[0],
            conv_function(pad_value=5)[0],
            conv_function(strides=(2, 2))[0],
            conv_function(dilation=(2, 2), padding=(2, 2, 2, 2))[0],
        )
    }
    assert len(keys) == 6


def test_no_key_without_an_anchor() -> None:
    a = te.placeholder((4,), name="a")
    b = te.compute((4,), lambda i: a[i] + 1.0, name="b")
    assert workload_key(te.create_prim_func([a, b])) is None


def test_text_leaves_numbers_of_values_out_only() -> None:
    text = workload_text(fused("a", zero_point=41, clip=77.5))
    assert text is not None
    assert "41" not in text
    assert "77.5" not in text
    assert '"height": 6' in text


@pytest.mark.parametrize("seed", [0, 1])
def test_stable_across_processes(seed: int) -> None:
    program = (
        "from tvm_compress.startup import start_without_torch; start_without_torch()\n"
        "from tests.tuning.test_workload import *; print(workload_key(fused('b')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={
            "PYTHONHASHSEED": str(seed),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == workload_key(fused("a"))
