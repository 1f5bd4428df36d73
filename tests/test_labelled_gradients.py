"""Gradients by channel while calibrating: what the formulas say, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from tvm_compress.calibrate import calibrate
from tvm_compress.data import load_data
from tvm_compress.errors import DataError
from tvm_compress.model import Model, model_from_module
from tvm_compress.relay_passes.numerics.gradient_saliency import taylor
from tvm_compress.relay_passes.observations import Observations
from tvm_compress.targets import get_target

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(0, 0.7, (4, 6, 1, 1)).astype(np.float32)
WANTED = Observations(gradients={"y": 1})


def model(batch: int) -> Model:
    """Scores are the means of a 1x1 convolution of y = max(x, 0)."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([batch, 6, 3, 5], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(op.nn.relu(x), name_hint="y")
            z = builder.emit(op.nn.conv2d(y, relax.const(WEIGHT)), name_hint="a")
            scores = builder.emit_output(op.nn.softmax(op.mean(z, [2, 3])), name_hint="scores")
        builder.emit_func_output(scores)
    return model_from_module(builder.finalize(), "small", "relax")


@pytest.mark.parametrize("batch", [1, 2])
def test_sums_by_channel(batch: int) -> None:
    """Five samples: of the last batch of two only one is real."""
    x = RNG.normal(size=(5, 6, 3, 5)).astype(np.float32)
    labels = np.array([3, 0, 2, 2, 1])
    network = model(batch)
    data = load_data({"x": x, "labels": labels}, network)
    found = calibrate(network, data, WANTED, target=get_target("host")).gradients["y"]
    y = np.maximum(x.astype(np.float64), 0)
    scores = np.einsum("schw,oc->so", y, WEIGHT[:, :, 0, 0]) / 15
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    by_channel = (chances - np.eye(4)[labels]) @ WEIGHT[:, :, 0, 0] / 15  # [S, C], every position
    product = by_channel * y.sum(axis=(2, 3))
    assert (found.axis, found.positions) == (1, 15)
    np.testing.assert_allclose(found.signed, product.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.absolute, np.abs(product).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.squared, (product**2).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.gradient_squared, 15 * (by_channel**2).mean(0), rtol=1e-4)
    np.testing.assert_allclose(taylor(found), np.abs(product / 15).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(taylor(found, order=2), (product**2).mean(axis=0), rtol=1e-4)


def test_labels_are_needed() -> None:
    network = model(1)
    x = np.zeros((2, 6, 3, 5), np.float32)
    for samples in ([{"x": row[None]} for row in x], load_data({"x": x}, network)):
        with pytest.raises(DataError, match="have no labels: add class numbers as `labels`"):
            calibrate(network, samples, WANTED, target=get_target("host"))
    data = load_data({"x": x, "labels": np.array([1, 4])}, network)
    with pytest.raises(DataError, match="labels go from 4 to 4; output 'output' has 4 classes"):
        calibrate(network, data, WANTED, target=get_target("host"))
