"""A small network of which most weights are zero, in int8 on an emulated Arm CPU: the same
integers as on x86 without AVX2, where kernels read every weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests.onnx_files import save_onnx, save_samples
from tvm_compress.build import lower
from tvm_compress.targets import get_target

from .test_every_core import Network, require

CORES = ("cortex-a76",)


def network(path: Path) -> Path:
    """3x3, a residual sum behind a second one, 1x1; 80 % of the blocks of 16 outputs of both are
    zero."""
    random = np.random.default_rng(7)
    shapes = {"a_w": (32, 3, 3, 3), "b_w": (32, 32, 3, 3), "c_w": (48, 32, 1, 1)}
    weights: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        kept = random.random((shape[0] // 16, *shape[1:])) >= (0.8 if name != "a_w" else 0)
        weight = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        weights[name] = weight * kept.repeat(16, axis=0)
    nodes = [
        helper.make_node("Conv", ["image", "a_w"], ["a"], "a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["ar"], "a_relu"),
        helper.make_node("Conv", ["ar", "b_w"], ["b"], "b", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["ar", "b"], ["s"], "sum"),
        helper.make_node("Relu", ["s"], ["sr"], "sum_relu"),
        helper.make_node("Conv", ["sr", "c_w"], ["out"], "c"),
    ]
    save_samples(path, random, 16, 3, 9, 7)
    return save_onnx(path, nodes, weights, (1, 3, 9, 7), "out", (1, 48, 9, 7))


@pytest.mark.parametrize("core", CORES)
def test_same_integers(core: str, tmp_path: Path) -> None:
    require(core)
    model = network(tmp_path / "sparse.onnx")
    net = Network(model, model.with_suffix(".npz"), "int8", core)
    shares = lower(net.module, get_target(core)).sparse_kernels
    assert set(shares) == {"b", "c"} and max(shares.values()) < 0.4
    net.check(core, tmp_path / "project")
