"""Recipes of 4-bit weights on the shipped example, through the command line."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest

from ..command_line import tvm_compress

IMAGES = 200


@pytest.mark.parametrize("recipe", ["w4a8_group", "codebook4"])
def test_shipped_example(recipe: str, fashion_mnist: Path, tmp_path: Path) -> None:
    model = fashion_mnist / "model.onnx"
    with np.load(fashion_mnist / "test.npz") as data:
        few = {name: data[name][:IMAGES] for name in data.files}
    np.savez(tmp_path / "test.npz", **few)
    result = tvm_compress(
        "compress", model, "--recipe", recipe, "--calib", fashion_mnist / "calibration.npz",
        "--eval", tmp_path / "test.npz", "-o", tmp_path / "out", "--threads", "1", "--json",
    )  # fmt: skip
    report = result.json
    # Few images: the drop is not judged here, but everything else is.
    failed = [check for check in report["checks"] if not check["passed"]]
    assert {check["name"] for check in failed} <= {"accuracy"}, failed
    assert report["exactness"]["differing"] == []
    assert report["stayed_float"] == []
    schemes = [row["scheme"] for row in report["layers"]]
    assert any(scheme.startswith(("a table", "int4/group")) for scheme in schemes)
    held = report["after"]["bytes"]
    if recipe == "codebook4":
        assert held["tables"] > 0
        assert held["tables"] % 16 == 0
    weights = sum(
        math.prod(array.dims) for array in onnx.load(model).graph.initializer if len(array.dims) > 1
    )
    # Half a byte each, but for the first and for padded layers.
    assert held["weights"] < 0.65 * weights
