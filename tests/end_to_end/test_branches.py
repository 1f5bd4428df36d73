"""A network that chooses between two branches by its data: both are quantised and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvm_compress import compress
from tvm_compress.artefact import Artefact
from tvm_compress.importers import load_model
from tvm_compress.relay_passes.select import list_layers
from tvm_compress.verification import verify

SHAPE = [1, 8, 16, 16]


def branching_onnx() -> onnx.ModelProto:
    """stem, then a 3x3 or a 1x1 convolution by the sign of the input's mean, then head."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(
            (0.2 * random.standard_normal(shape)).astype("float32"), name
        )

    def branch(name: str, side: int) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Conv", ["s", f"{name}.weight"], [f"{name}_y"], name=f"/{name}/Conv",
                             pads=[side // 2] * 4),
            helper.make_node("Relu", [f"{name}_y"], [f"{name}_z"]),
        ]  # fmt: skip
        result = helper.make_tensor_value_info(f"{name}_z", TensorProto.FLOAT, SHAPE)
        return helper.make_graph(nodes, name, [], [result], [weight(f"{name}.weight", 8, 8, side, side)])  # noqa: E501  # fmt: skip

    nodes = [
        helper.make_node("Conv", ["x", "stem.weight"], ["s0"], name="/stem/Conv", pads=[1] * 4),
        helper.make_node("Relu", ["s0"], ["s"]),
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["mean", "zero"], ["is_large"]),
        helper.make_node("If", ["is_large"], ["c"], name="/choose/If",
                         then_branch=branch("wide", 3), else_branch=branch("narrow", 1)),
        helper.make_node("Conv", ["c", "head.weight"], ["y"], name="/head/Conv"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "branching",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 16, 16])],
        [
            weight("stem.weight", 8, 3, 3, 3),
            weight("head.weight", 4, 8, 1, 1),
            numpy_helper.from_array(np.float32(0), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def samples(*means: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    shift = np.resize(means, 16).reshape(16, 1, 1, 1)
    return {"x": (random.standard_normal((16, 3, 16, 16)) + shift).astype("float32")}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    out = tmp_path_factory.mktemp("branches") / "out"
    return compress(branching_onnx(), recipe="int8", calibration=samples(0.5, -0.5), out=out)


def rows(artefact: Artefact) -> dict[str, Any]:
    return {row["name"]: row for row in artefact.report["layers"]}


def test_layers_of_branches_are_listed_where_they_run() -> None:
    layers = list_layers(load_model(branching_onnx()).module)
    assert [(layer.name, layer.is_in_branch) for layer in layers] == [
        ("stem", False), ("wide", True), ("narrow", True), ("head", False),
    ]  # fmt: skip


def test_layers_of_branches_are_quantised_and_described(artefact: Artefact) -> None:
    assert {row["scheme"] for row in rows(artefact).values()} == {"int8/channel × int8"}
    wide = rows(artefact)["wide"]
    assert wide["macs"] == 8 * 8 * 9 * 256
    assert wide["bytes_after"] < 0.4 * wide["bytes_before"]
    assert wide["sqnr_db"] > 25


def test_both_ways_run_as_the_float_network_does(artefact: Artefact) -> None:
    session = onnxruntime.InferenceSession(branching_onnx().SerializeToString())
    ours, original = artefact.session(), artefact.session("original")
    for sample in samples(0.5, -0.5)["x"][:4]:
        feed = {"x": sample[None]}
        (wanted,) = session.run(None, feed)
        np.testing.assert_allclose(original.run(feed)["y"], wanted, atol=1e-4)
        noise = ours.run(feed)["y"] - wanted
        assert np.sum(noise**2) < 1e-2 * np.sum(wanted**2)


def test_verification_meets_the_kernels_of_the_branch_that_ran(artefact: Artefact) -> None:
    for mean, ran in ((0.5, "wide"), (-0.5, "narrow")):
        result = verify(artefact, samples(mean))  # type: ignore[arg-type]
        result.require()
        layers = {name for tensor in result.tensors for name in tensor.layers}
        assert layers == {"stem", ran, "head"}


def test_branch_that_no_sample_took_stays_float_and_says_so(tmp_path: Path) -> None:
    found = compress(
        branching_onnx(), recipe="int8", calibration=samples(0.5), out=tmp_path / "out"
    )
    assert rows(found)["narrow"]["scheme"] == "float"
    reasons = {row["name"]: row["reason"] for row in found.report["stayed_float"]}
    assert reasons["narrow"] == "in a branch of an If that no calibration sample took"
    assert all(check["passed"] for check in found.report["checks"])


def test_weights_of_branches_alone(tmp_path: Path) -> None:
    found = compress(branching_onnx(), recipe="int8_w_only", out=tmp_path / "out")
    assert {row["scheme"] for row in rows(found).values()} == {"int8/channel × float"}
