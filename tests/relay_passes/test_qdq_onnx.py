"""Quantised ONNX models, imported and compiled, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_compress.build import build
from tvm_compress.importers import load_model
from tvm_compress.runtime import Session
from tvm_compress.targets import get_target

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


class Builder:
    """Nodes and constants of a small model."""

    def __init__(self, zero_dtype: str) -> None:
        self.dtype = np.dtype(zero_dtype)
        self.rng = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, array: np.ndarray, name: str) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(
        self, op: str, inputs: list[str], out: str, domain: str = "", **attributes: Any
    ) -> str:
        self.nodes.append(
            helper.make_node(op, inputs, [out], name=out, domain=domain, **attributes)
        )
        return out

    def parameters(self, name: str, scale: float, zero_point: int) -> list[str]:
        shift = 128 if self.dtype == np.uint8 else 0
        return [
            self.constant(np.array(scale, np.float32), f"{name}_scale"),
            self.constant(np.array(zero_point + shift, self.dtype), f"{name}_zero"),
        ]

    def weight(self, name: str, shape: tuple[int, ...], axis: int) -> list[str]:
        codes = self.rng.integers(-127, 128, shape).astype(np.int8)
        scales = self.rng.uniform(0.004, 0.012, shape[axis]).astype(np.float32)
        return [
            self.constant(codes, name),
            self.constant(scales, f"{name}_scale"),
            self.constant(np.zeros(shape[axis], np.int8), f"{name}_zero"),
        ]

    def save(self, path: Path, shape: list[int], outputs: dict[str, tuple[int, list[int]]]) -> None:
        graph = helper.make_graph(
            self.nodes, "tiny",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in outputs.items()],
            self.constants,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.save(model, path)


def kind_of(dtype: np.dtype) -> int:
    return TensorProto.UINT8 if dtype == np.uint8 else TensorProto.INT8


def qdq_model(path: Path, dtype: str) -> None:
    """conv + relu, residual add, average pool, linear: each between QuantizeLinear and
    DequantizeLinear."""
    b = Builder(dtype)

    def qdq(x: str, name: str, scale: float, zero_point: int) -> str:
        p = b.parameters(name, scale, zero_point)
        b.node("QuantizeLinear", [x, *p], f"{name}_q")
        return b.node("DequantizeLinear", [f"{name}_q", *p], f"{name}_dq")

    def weight(name: str, shape: tuple[int, ...], axis: int) -> str:
        return b.node("DequantizeLinear", b.weight(name, shape, axis), f"{name}_dq", axis=axis)

    x = qdq("x", "input", 0.0317, 3)
    y = b.node("Conv", [x, weight("w1", (8, 3, 3, 3), 0)], "conv1", pads=[1, 1, 1, 1])
    y = qdq(b.node("Relu", [y], "relu1"), "act1", 0.0291, -128)
    z = b.node("Conv", [y, weight("w2", (8, 1, 3, 3), 0)], "depthwise", group=8, pads=[1, 1, 1, 1])
    z = qdq(z, "act2", 0.0413, 9)
    s = qdq(b.node("Add", [z, y], "sum"), "act3", 0.0511, -20)
    t = qdq(b.node("GlobalAveragePool", [s], "pool"), "act4", 0.0123, -31)
    t = b.node("Flatten", [t], "flat")
    t = qdq(b.node("MatMul", [t, weight("w3", (8, 5), 1)], "linear"), "act5", 0.0107, 2)
    b.node("Identity", [t], "logits")
    b.save(path, [1, 3, 9, 7], {
        "logits": (TensorProto.FLOAT, [1, 5]),
        **{f"act{k}_q": (kind_of(b.dtype), dims) for k, dims in
           ((1, [1, 8, 9, 7]), (2, [1, 8, 9, 7]), (3, [1, 8, 9, 7]), (4, [1, 8, 1, 1]))},
    })  # fmt: skip


def qoperator_model(path: Path, dtype: str) -> None:
    """The same network as QLinearConv, QLinearAdd, QLinearGlobalAveragePool and QLinearMatMul."""
    b = Builder(dtype)
    p = {
        name: b.parameters(name, scale, zero)
        for name, scale, zero in (
            ("input", 0.0317, 3), ("act1", 0.0291, -128), ("act2", 0.0413, 9), ("act3", 0.0511, -20),
            ("act4", 0.0123, -31), ("act5", 0.0107, 2),
        )
    }  # fmt: skip
    b.node("QuantizeLinear", ["x", *p["input"]], "input_q")
    bias = b.constant(b.rng.integers(-9000, 9000, 8).astype(np.int32), "bias")
    b.node("QLinearConv", ["input_q", *p["input"], *b.weight("w1", (8, 3, 3, 3), 0), *p["act1"], bias],
           "act1_q", pads=[1, 1, 1, 1])  # fmt: skip
    b.node("QLinearConv", ["act1_q", *p["act1"], *b.weight("w2", (8, 1, 3, 3), 0), *p["act2"]],
           "act2_q", group=8, pads=[1, 1, 1, 1])  # fmt: skip
    b.node(
        "QLinearAdd",
        ["act2_q", *p["act2"], "act1_q", *p["act1"], *p["act3"]],
        "act3_q",
        "com.microsoft",
    )
    b.node("QLinearGlobalAveragePool", ["act3_q", *p["act3"], *p["act4"]], "act4_q", "com.microsoft",
           channels_last=0)  # fmt: skip
    b.node("Flatten", ["act4_q"], "flat")
    weight = b.weight("w3", (8, 5), 1)
    b.node("QLinearMatMul", ["flat", *p["act4"], *weight, *p["act5"]], "act5_q")
    b.node("DequantizeLinear", ["act5_q", *p["act5"]], "logits")
    b.save(path, [1, 3, 9, 7], {
        "logits": (TensorProto.FLOAT, [1, 5]),
        **{f"act{k}_q": (kind_of(b.dtype), dims) for k, dims in
           ((1, [1, 8, 9, 7]), (2, [1, 8, 9, 7]), (3, [1, 8, 9, 7]), (4, [1, 8, 1, 1]))},
    })  # fmt: skip


def integer_model(path: Path, dtype: str) -> None:
    """ConvInteger and MatMulInteger: int32 results, cast and scaled in float."""
    b = Builder(dtype)
    scale, zero = b.parameters("input", 0.0317, 3)
    b.node("QuantizeLinear", ["x", scale, zero], "input_q")
    w = b.constant(b.rng.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8), "w")
    b.node("ConvInteger", ["input_q", w, zero], "act1_q", pads=[1, 1, 1, 1])
    b.node("Cast", ["act1_q"], "cast", to=TensorProto.FLOAT)
    b.node("Mul", ["cast", b.constant(np.array(0.0003, np.float32), "factor")], "logits")
    b.save(path, [1, 3, 9, 7], {
        "logits": (TensorProto.FLOAT, [1, 4, 9, 7]),
        "act1_q": (TensorProto.INT32, [1, 4, 9, 7]),
    })  # fmt: skip


MODELS = {"QDQ": qdq_model, "QOperator": qoperator_model, "integer": integer_model}


# ONNX Runtime has ConvInteger for uint8 data only.
@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, dtype) for form in ("QDQ", "QOperator") for dtype in ("int8", "uint8")]
    + [("integer", "uint8")],
)
def test_equals_onnx_runtime(form: str, dtype: str, tmp_path: Path) -> None:
    """Every 8-bit tensor and the result over ten inputs: equal, or one step apart on 0.1 %."""
    path = tmp_path / "model.onnx"
    MODELS[form](path, dtype)
    model = load_model(path)
    built = build(model.module, get_target("host"))
    assert built.left_float == ()
    ours = Session(built.executable, model.inputs, model.outputs)
    theirs = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in theirs.get_outputs()]
    rng = np.random.default_rng(1)
    differing = elements = 0
    for _ in range(10):
        x = rng.normal(0, 1.5, (1, 3, 9, 7)).astype(np.float32)
        got = ours.run({"x": x})
        for name, expected in zip(names, theirs.run(None, {"x": x}), strict=True):
            assert got[name].dtype == expected.dtype
            step = {"logits": 0.0107}.get(name, 1.0)
            difference = np.abs(got[name].astype(np.float64) - expected.astype(np.float64)) / step
            assert difference.max() < 1.001, f"{name}: {difference.max()} steps"
            differing += int((difference > 0.5).sum())
            elements += difference.size
    assert differing <= 0.001 * elements
